"""The Python API: what a notebook gets, and what it leaves as it was."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

import healing
from healing import api
from healing.errors import ConfigError
from healing.measurements.probe import Probe
from healing.models.loading import load_model, state_digest
from tests.conftest import ROOT

SMALL = {"sequence_length": 64, "probe_tokens": 1024, "batch_size": 4, "measurement_interval": 4,
         "progress": False}  # fmt: skip
ATTACK = {**SMALL, "attack_steps": 8, "target_rank_reduction": 1.0, "baseline_draws": 3}


@pytest.fixture(scope="module")
def collapsed(tmp_path_factory):
    keep = tmp_path_factory.mktemp("attack")
    return api.attack("nano", "random_tokens", keep=keep, **ATTACK)


@pytest.fixture(scope="module")
def healed(collapsed, tmp_path_factory):
    return api.heal(collapsed, steps=8, keep=tmp_path_factory.mktemp("heal"), **SMALL)


def test_an_attack_gives_numbers_a_figure_a_table_and_the_model(collapsed):
    summary = collapsed.summary()
    rank = collapsed.trajectory[-1]["effective_rank"]
    assert rank == pytest.approx(summary["collapsed_effective_rank"], rel=1e-12)
    assert collapsed.config["arm"] == "random_tokens"
    assert len(collapsed.fingerprint) == 16
    assert collapsed.figure("rank_collapse")._repr_png_()[:4] == b"\x89PNG"
    assert list(collapsed.to_frame()["step"]) == [*range(9)]
    assert "random_tokens" in collapsed._repr_markdown_()
    model = collapsed.model()
    assert state_digest(model.state_dict()) != load_model("nano").digest
    with pytest.raises(ConfigError, match="no figure 'x': there are overview, rank_by_block"):
        collapsed.figure("x")


def test_healing_goes_on_from_the_attack_in_memory(collapsed, healed):
    assert healed.trajectory[0]["loss"] == collapsed.trajectory[-1]["loss"]
    assert healed.verdict == healed.summary()["verdict"]
    assert set(healed.figures) == {
        "overview",
        "rank_by_block",
        "recovery_trajectory", "perplexity_recovery", "spectral_decay_three_state",
    }  # fmt: skip
    assert math.isfinite(healed.summary()["loss_recovery_pct"])
    again = api.heal(collapsed.checkpoint, steps=8, **SMALL)
    assert [r["loss"] for r in again.trajectory] == [r["loss"] for r in healed.trajectory]
    other = api.heal(collapsed, steps=8, replicate=1, **SMALL)
    assert other.trajectory[-1]["loss"] != healed.trajectory[-1]["loss"]


def test_the_api_and_the_command_line_give_the_same_numbers(store, collapsed):
    from click.testing import CliRunner

    from entrypoints.attack import main

    words = "--model nano --arm random_tokens --sequence-length 64 --probe-tokens 1024 " \
            "--batch-size 4 --measurement-interval 4 --attack-steps 8 --baseline-draws 3 " \
            "--target-rank-reduction 1 --verbosity quiet"  # fmt: skip
    assert CliRunner().invoke(main, words.split()).exit_code == 0
    (path,) = (store / "experiments").rglob("metrics.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["effective_rank"] for r in rows] == [
        r["effective_rank"] for r in collapsed.trajectory
    ]


def test_a_sham_is_healed_once_and_results_are_summarized_from_memory(collapsed, healed):
    one = api.heal(collapsed, steps=8, sham=True, **SMALL)
    two = api.heal(collapsed, steps=8, replicate=0, sham=True, **SMALL)
    assert one.tags["sham_run_id"] == two.tags["sham_run_id"]
    assert "loss_recovery_sham_pct" in one.trajectory[-1]
    found = api.summarize([healed])
    (row,) = found.to_frame().to_dict("records")
    assert (row["model"], row["arm"]) == ("nano", "random_tokens")
    assert "random" in str(found)
    assert "nano" in found._repr_markdown_()


@pytest.mark.slow
def test_a_sweep_without_tracking_leaves_no_store(store):
    (store / "mlflow.db").unlink()
    found = api.sweep(
        ["nano"], ["random_tokens"], [0], keep=store / "kept", healing_steps=2, attack_steps=2,
        batch_size=4, sequence_length=64, measurement_interval=2, sham=False, progress=False,
    )  # fmt: skip
    assert found.summary.groups[0].n_runs == 1
    assert {p.name for p in store.iterdir()} == {"kept"}


def test_tracked_runs_go_to_the_experiment_named_and_leave_mlflows_state(store, collapsed):
    before = dict(os.environ)
    with mlflow.start_run(experiment_id=mlflow.create_experiment("mine")) as active:
        done = api.heal(collapsed, steps=2, track="healing", **SMALL)
        assert mlflow.active_run().info.run_id == active.info.run_id
    run = MlflowClient().get_run(done.run_id)
    assert MlflowClient().get_experiment(run.info.experiment_id).name == "healing"
    assert run.info.status == "FINISHED"
    assert dict(os.environ) == before


@pytest.mark.slow
def test_a_landscape_of_a_healing_run(healed):
    found = api.landscape(
        healed, curvature_tokens=64, gradient_batches=8, eigenvalues=1, lanczos_iterations=4,
        density_iterations=3, perturbations=1, escape_steps=2, progress=False,
    )  # fmt: skip
    assert found.summary()["collapsed_is_minimum"] in ("yes", "no", "undetermined")
    assert "loss_barriers" in found.figures


def test_measure_takes_a_name_or_a_model_with_a_probe(nano, corpus):
    probe = Probe.of(corpus, nano, 1024, 64)
    by_model = api.measure(nano.model, probe=probe)
    assert by_model.loss == api.measure("nano", probe=probe, device="cpu").loss
    with pytest.raises(ConfigError, match="a loaded model needs probe="):
        api.measure(nano.model)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: api.attack(atack_steps=3), "unknown setting 'atack_steps': did you mean 'attack"),
        (lambda: api.attack(attack_steps=-3), "--attack-steps must be at least 0, got -3"),
        (lambda: api.heal("x.pt", zzzzz=1), "unknown setting 'zzzzz': choose from model, "),
        (lambda: api.options("swim"), "no stage 'swim': choose from attack, heal"),
    ],
)
def test_what_is_wrong_is_said(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert message in str(caught.value)


def test_what_there_is(capsys):
    assert "haep" in api.arms()
    assert set(api.methods()) >= {"full", "lora"}
    assert api.models()["70m"] == "EleutherAI/pythia-70m"
    assert "--healing-lr" in api.options("heal")["healing_lr"]
    assert set(healing.__all__) <= set(dir(healing))
    for name in healing.__all__:
        assert getattr(healing, name) is getattr(api, name)
    with pytest.raises(AttributeError, match="no attribute 'heel'"):
        healing.heel  # noqa: B018


@pytest.mark.slow
def test_the_example_runs():
    main = runpy.run_path(str(ROOT / "examples" / "own_model.py"))["main"]
    threads = torch.get_num_threads()
    assert math.isfinite(main(steps=4))
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_the_ten_lines_of_the_docs_work(tmp_path):
    text = (ROOT / "docs" / "api.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 10
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "rank" in done.stdout
