"""Stages end to end on nano with small budgets: files, formulas, reproducibility, lineage."""

from __future__ import annotations

import json
import math
import pathlib
import pickle
from collections import OrderedDict
from dataclasses import replace

import pytest
import torch
from mlflow.tracking import MlflowClient

from entrypoints._resume import config_of_run
from healing.config.attack import AttackConfig
from healing.config.fingerprint import as_params
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.errors import CheckpointError, MatchError, SweepError, TrackingError
from healing.measurements import kept_measurements
from healing.measurements.probe import Probe
from healing.models.blocks import transformer_blocks
from healing.models.checkpoints import CHECKPOINT_NAME, read_checkpoint
from healing.models.loading import load_model
from healing.stages.attack import AttackStage, attack
from healing.stages.cells.events import outcome_of
from healing.stages.cells.heal import (
    heal_cell,
    heal_fingerprint,
    resolve_from_checkpoint,
    settings_of,
)
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.sweep_plan import plan
from healing.stages.driver import Driver
from healing.stages.heal import heal
from healing.stages.launching.launcher import worker_count
from healing.stages.stage import settled
from healing.stages.summarize import summarize
from healing.stages.summarize_inputs import read_runs
from healing.stages.sweep import sweep
from healing.stages.terminal.console import Console
from healing.tracking import queries
from healing.tracking.page_text import plain_tags
from healing.tracking.run_files import JsonLines, plain, read_jsonl
from healing.training.trainer import Trainer
from tests.rewritten import rewritten

pytestmark = pytest.mark.slow

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 1024, "batch_size": 4,
         "measurement_interval": 4, "verbosity": "quiet"}  # fmt: skip
FAST_ATTACK = {"attack_steps": 8, "search_steps": 1, "search_candidates": 2, "baseline_draws": 3,
               "rayleigh_draws": 2, "curvature_tokens": 128}  # fmt: skip
SIX_FILES = (
    "metrics.jsonl", "config.json", "healing_summary.json", "plots/recovery_trajectory.png",
    "plots/perplexity_recovery.png", "plots/spectral_decay_three_state.png",
)  # fmt: skip


def make_attack(arm: str = "random_tokens", **changes) -> tuple[str, pathlib.Path]:
    return attack(AttackConfig(**({**SMALL, **FAST_ATTACK, "arm": arm} | changes)))


def heal_config(**changes) -> HealConfig:
    return HealConfig(**({**SMALL, "healing_steps": 10} | changes))


def run_folder(root: pathlib.Path, pattern: str = "*_run*") -> pathlib.Path:
    found = (root / "experiments/results/priority5_healing/raw_data").glob(pattern)
    (folder,) = (path for path in found if not path.name.startswith("."))  # locks are hidden
    return folder


@pytest.fixture
def checkpoint(store) -> pathlib.Path:
    return make_attack()[1]


def test_attack_run_holds_trajectory_files_and_checkpoint(store):
    run_id, path = make_attack("haep")
    stored = MlflowClient().get_run(run_id)
    assert stored.data.tags["stage"] == "attack"
    assert stored.data.tags["catalyst"] in ("found", "failed")
    assert stored.data.params["attack.attack_lr"] == "0.02"
    assert stored.data.params["n_params"] == "309792"
    history = MlflowClient().get_metric_history(run_id, "alignment")
    assert [m.step for m in history] == [*range(9)]  # nano's curve has every step
    raw = torch.load(path, weights_only=True)
    assert set(raw) == {
        "step", "model_state_dict", "checkpoint_type", "description", "config", "digests"
    }  # fmt: skip
    assert raw["config"]["model"] == "nano"
    artifacts = {a.path for a in MlflowClient().list_artifacts(run_id, "plots")}
    names = ("overview", "rank_by_block", "rank_collapse", "spectral_decay")
    assert artifacts == {f"plots/{name}.png" for name in names}
    assert MlflowClient().list_artifacts(run_id, "checkpoints")[0].path.endswith(CHECKPOINT_NAME)


def test_healing_writes_six_files_that_obey_the_formulas(store, checkpoint):
    (outcome,) = heal(heal_config(collapsed_checkpoint=str(checkpoint)))
    folder = run_folder(store)
    assert all((folder / name).is_file() for name in SIX_FILES)
    rows = read_jsonl(folder / "metrics.jsonl")
    summary = json.loads((folder / "healing_summary.json").read_text())
    assert [row["step"] for row in rows] == [0, 4, 8, 10]
    first, last = rows[0], rows[-1]
    healthy, collapsed = summary["original_loss"], first["loss"]
    expected = 100 * (last["loss"] - collapsed) / (healthy - collapsed)
    assert last["loss_recovery_pct"] == pytest.approx(expected)
    assert summary["loss_recovery_pct"] == last["loss_recovery_pct"]
    assert last["ppl_improvement_pct"] == pytest.approx(
        100 * (first["perplexity"] - last["perplexity"]) / first["perplexity"]
    )
    rank = summary["original_rank"], first["effective_rank"], last["effective_rank"]
    if summary["rank_undefined_reason"]:
        assert summary["rank_recovery_pct"] == "NaN"
    else:
        assert summary["rank_recovery_pct"] == pytest.approx(
            100 * (rank[2] - rank[1]) / (rank[0] - rank[1])
        )
    assert summary["verdict"] == MlflowClient().get_run(_only_heal_run()).data.tags["verdict"]
    assert outcome.status == "ok"
    # Every measure of the panel starts at its own 0, and ends where the summary says.
    for name, value in summary["panel"].items():
        logged = [row[f"panel/{name}_recovery_pct"] for row in rows]
        assert logged[0] in (0.0, "NaN") or math.isnan(logged[0])
        assert value == "NaN" if math.isnan(logged[-1]) else value == logged[-1]
    (attacked,) = MlflowClient().search_runs(
        [MlflowClient().get_run(_only_heal_run()).info.experiment_id], "tags.stage = 'attack'"
    )
    assert summary["weight_change"] == pytest.approx(attacked.data.metrics["weight_change"])
    per_step = rows[1]["tokens"] / rows[1]["step"]  # as the run itself counted them
    for name in ("rank", "loss"):
        steps, tokens = (summary[f"half_recovery_{unit}_{name}"] for unit in ("steps", "tokens"))
        assert tokens == ("NaN" if steps == "NaN" else pytest.approx(per_step * steps))
    (read,) = read_runs([queries.get_run(_only_heal_run())])
    assert read.tokens_per_step == per_step


def _only_heal_run() -> str:
    experiment = MlflowClient().get_experiment_by_name("llm-healing")
    (run,) = MlflowClient().search_runs([experiment.experiment_id], "tags.stage = 'heal'")
    return run.info.run_id


def test_mlflow_holds_the_same_as_the_local_folder(store, checkpoint):
    heal(heal_config(collapsed_checkpoint=str(checkpoint), log_layers=True))
    run_id, client = _only_heal_run(), MlflowClient()
    names = {a.path for a in client.list_artifacts(run_id)}
    assert {"metrics.jsonl", "config.json", "healing_summary.json", "plots"} <= names
    rows = read_jsonl(run_folder(store) / "metrics.jsonl")
    for name in ("effective_rank", "loss", "spectral_gap", "layers/effective_rank_03"):
        history = client.get_metric_history(run_id, name)
        assert [(m.step, m.value) for m in history] == [(r["step"], r[name]) for r in rows]
    run = client.get_run(run_id)
    assert run.data.params["heal.healing_lr"] == "0.001"  # resolved, not `auto`
    assert run.data.params["model"] == "nano"
    assert {i.dataset.name for i in run.inputs.dataset_inputs} == {"stdlib-train", "stdlib-probe"}
    assert run.data.tags["attack_run_id"]
    assert "Rank recovery **" in run.data.tags["mlflow.note.content"]


def without_times(folder: pathlib.Path) -> list[dict]:
    rows = read_jsonl(folder / "metrics.jsonl")
    timed = ("seconds", "tokens_per_second")
    return [{k: plain(v) for k, v in row.items() if k not in timed} for row in rows]


def test_same_seed_same_bytes_other_seed_other(store, checkpoint, tmp_path):
    seen = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        heal(heal_config(collapsed_checkpoint=str(checkpoint), seed=seed, output_dir=name))
        (folder,) = (tmp_path / name / "priority5_healing/raw_data").glob("nano*")
        seen.append(without_times(folder))
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]
    assert seen[0][0]["loss"] == seen[2][0]["loss"]  # the same collapsed state


def test_attack_is_reproducible(store):
    digests = []
    for name in ("a", "b"):
        _, path = make_attack("haep", output_dir=name)
        digests.append(read_checkpoint(path).state)
    assert all(torch.equal(v, digests[1][k]) for k, v in digests[0].items())


def test_heal_by_attack_run_id(store):
    run_id, _ = make_attack()
    (outcome,) = heal(heal_config(attack_run_id=run_id))
    assert outcome.checkpoint.config["attack_run_id"] == run_id


def test_heal_from_a_runs_uri(store):
    run_id, _ = make_attack()
    uri = f"runs:/{run_id}/checkpoints/{CHECKPOINT_NAME}"
    (outcome,) = heal(heal_config(collapsed_checkpoint=uri))
    assert outcome.checkpoint.config["attack_run_id"] == run_id


def test_directory_scan_makes_a_child_per_checkpoint_and_replicate(store):
    make_attack(seed=0)
    make_attack(seed=1)
    outcomes = heal(
        heal_config(checkpoint_dir="experiments", runs_per_checkpoint=2, healing_steps=4)
    )
    assert len(outcomes) == 4
    experiment = MlflowClient().get_experiment_by_name("llm-healing").experiment_id
    runs = MlflowClient().search_runs([experiment], "tags.stage = 'heal'")
    parents = [r for r in runs if r.data.tags.get("role") == "parent"]
    children = [r for r in runs if r.data.tags.get("role") != "parent"]
    assert (len(parents), len(children)) == (1, 4)
    parent_id = parents[0].info.run_id
    assert {r.data.tags["mlflow.parentRunId"] for r in children} == {parent_id}
    assert len({plain_tags(r.data.tags)["checkpoint_id"] for r in children}) == 2
    first, second = outcomes[0], outcomes[1]
    assert first.records[-1].measurement.loss != second.records[-1].measurement.loss


def test_one_bad_checkpoint_does_not_stop_the_others(store):
    make_attack(seed=0)
    bad = store / "experiments" / "z" / CHECKPOINT_NAME
    bad.parent.mkdir(parents=True)
    bad.write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="1 of 2 checkpoints failed"):
        heal(heal_config(checkpoint_dir="experiments", healing_steps=2))
    experiment = MlflowClient().get_experiment_by_name("llm-healing").experiment_id
    runs = MlflowClient().search_runs([experiment], "tags.stage = 'heal'")
    # The parent, the healed checkpoint, and a run of its own for the one that could not be.
    assert sorted(r.info.status for r in runs) == ["FAILED", "FAILED", "FINISHED"]


def test_without_a_checkpoint_a_fresh_attack_comes_first(store):
    (outcome,) = heal(heal_config(arm="random_text", healing_steps=2, attack_steps=3))
    assert outcome.checkpoint.config["arm"] == "random_text"
    assert (outcome.checkpoint.config["attack_steps"], outcome.checkpoint.step) == (3, 3)
    experiment = MlflowClient().get_experiment_by_name("llm-healing").experiment_id
    stages = [r.data.tags["stage"] for r in MlflowClient().search_runs([experiment])]
    assert sorted(stages) == ["attack", "heal"]


def test_sham_is_undefined(store):
    (outcome,) = heal(heal_config(arm="none", healing_steps=4))
    summary = outcome.summary()
    assert summary["verdict"] == summary["verdict_loss"] == "undefined"
    assert math.isnan(summary["rank_recovery_pct"])
    assert summary["spectral_state"] == "unchanged"


def test_the_checkpoint_decides_the_model(store, checkpoint):
    loaded = read_checkpoint(checkpoint)
    assert resolve_from_checkpoint(heal_config(model="auto"), loaded, checkpoint).model == "nano"
    with pytest.raises(CheckpointError, match="checkpoint of model nano, --model says micro"):
        resolve_from_checkpoint(heal_config(model="micro"), loaded, checkpoint)


def test_a_checkpoint_that_names_no_model_is_matched_strictly(store, checkpoint):
    old = rewritten(checkpoint, store / "old.pt", lambda data: data.pop("config"))
    assert len(heal(heal_config(collapsed_checkpoint=str(old), healing_steps=2))) == 1
    with pytest.raises(CheckpointError, match="not a checkpoint of model micro"):
        heal(heal_config(collapsed_checkpoint=str(old), model="micro"))


def test_cells_are_pure_functions_of_picklable_configurations(store, checkpoint):
    config = resolve_from_checkpoint(heal_config(), read_checkpoint(checkpoint), checkpoint)
    cell = pickle.loads(pickle.dumps(HealCell(config, str(checkpoint))))
    before = sorted(store.rglob("*"))
    first, again = outcome_of(heal_cell(cell))[0], outcome_of(heal_cell(cell))[0]
    assert first.fingerprint == again.fingerprint
    assert first.records[-1].measurement.loss == again.records[-1].measurement.loss
    assert sorted(store.rglob("*")) == before


def test_settings_part_budgets_but_not_seeds(store, checkpoint):
    loaded = read_checkpoint(checkpoint)

    def settings(match: str = "", **changes) -> str:
        config = resolve_from_checkpoint(heal_config(**changes), loaded, checkpoint)
        made = replace(loaded, config={**loaded.config, "noise_match": match})
        return settings_of(HealCell(config, str(checkpoint)), made, {"train": "d"})

    assert settings(seed=5) == settings(device="cpu") == settings()
    assert settings(healing_steps=11) != settings()
    assert settings(match="norm") != settings(match="scale")


def test_a_checkpoint_of_other_weights_has_no_healthy_reference_here(store, checkpoint):
    change = {"healthy_digest": "0123456789abcdef"}
    rewritten(checkpoint, store / "other.pt", lambda data: data["config"].update(change))
    with pytest.raises(CheckpointError, match="was made from other weights of nano"):
        heal(heal_config(collapsed_checkpoint=str(store / "other.pt")))


def altered(checkpoint: pathlib.Path, name: str, change) -> str:
    """A copy of a checkpoint whose weights a function has changed in place."""
    path = checkpoint.parent / f"{name}.pt"
    return str(rewritten(checkpoint, path, lambda data: change(data["model_state_dict"])))


def cell_of(path: object, **changes) -> HealCell:
    config = heal_config(**({"healing_steps": 3, "probe_tokens": 512} | changes))
    return HealCell(
        resolve_from_checkpoint(config, read_checkpoint(pathlib.Path(str(path))), path), str(path)
    )


UP, DOWN = (f"gpt_neox.layers.1.mlp.dense_{name}.weight" for name in ("h_to_4h", "4h_to_h"))


def overflowing(state) -> None:
    """Feed-forward activations of block 1 times 3e4 (beyond fp16), its output as it was."""
    state[UP] *= 3e4
    state[DOWN] /= 3e4


@pytest.mark.parametrize(
    ("bad", "where", "origin", "module"),
    [
        (math.nan, ("lm_head.weight", 3), "forward", "lm_head"),
        (math.inf, ("gpt_neox.layers.2.attention.dense.weight", 0), "forward",
         "gpt_neox.layers.2.attention.dense"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_weight_that_is_not_finite_is_a_lockout(
    store, checkpoint, bad, where, origin, module, precision
):
    key, row = where
    path = altered(checkpoint, "bad", lambda state: state[key][row].fill_(bad))
    locked = outcome_of(heal_cell(cell_of(path, precision=precision, healing_steps=12)))[0]
    summary = locked.summary()
    assert summary["status"] == "lockout"
    assert (summary["nonfinite_origin"], summary["nonfinite_module"]) == (origin, module)
    assert summary["nonfinite_step"] == 0
    assert summary["verdict"] == summary["verdict_loss"] == "undefined"
    assert "cannot compute in fp32" in summary["rank_undefined_reason"]
    assert summary["control_origin"] == ""  # a lockout needs no control


def test_a_broken_weight_that_no_text_uses_is_a_lockout_too(store, checkpoint, corpus):
    used = torch.cat([corpus.windows(s, load_model("nano").tokenizer, 64).flatten()
                      for s in ("train", "probe")]).unique()  # fmt: skip
    unused = sorted(set(range(2048)) - set(used.tolist()))[-1]
    path = altered(
        checkpoint, "unused", lambda state: state["gpt_neox.embed_in.weight"][unused].fill_(1e999)
    )
    summary = outcome_of(heal_cell(cell_of(path)))[0].summary()
    assert (summary["status"], summary["nonfinite_origin"]) == ("lockout", "weights")
    assert summary["nonfinite_module"] == "gpt_neox.embed_in.weight"


@pytest.mark.parametrize("mode", ["pure", "autocast"])
def test_what_only_fp16_cannot_hold_is_a_format_overflow(store, checkpoint, mode):
    path = altered(checkpoint, "large", overflowing)
    summary = outcome_of(heal_cell(cell_of(path, precision="fp16", precision_mode=mode)))[
        0
    ].summary()
    assert summary["status"] == "format_overflow"
    module = UP.removesuffix(".weight")
    assert (summary["nonfinite_origin"], summary["nonfinite_module"]) == ("forward", module)
    assert summary["nonfinite_step"] == 1
    # The healthy model computes, and where weights are fp16 it is AdamW that fails.
    assert summary["control_origin"] == {"pure": "update", "autocast": "none"}[mode]
    assert math.isnan(summary["rank_recovery_pct"])
    assert math.isnan(summary["loss_recovery_pct"])
    assert module in summary["status_reason"]
    assert summary["loss_undefined_reason"] == summary["status_reason"]
    assert outcome_of(heal_cell(cell_of(path)))[0].status == "ok"


@pytest.mark.parametrize("arm", ["none", "random_tokens"])
def test_pure_fp16_adamw_is_an_optimiser_artifact_whatever_it_heals(store, arm):
    path = make_attack(arm)[1]
    summary = outcome_of(heal_cell(cell_of(path, precision="fp16", precision_mode="pure")))[
        0
    ].summary()
    assert summary["status"] == "optimiser_artifact"
    assert (summary["nonfinite_origin"], summary["control_origin"]) == ("update", "update")
    assert (summary["nonfinite_step"], summary["steps"]) == (1, 1)
    assert "healthy model fails the same way" in summary["status_reason"]


def test_diverging_is_told_from_what_any_model_would_do(store, checkpoint):
    hot = outcome_of(heal_cell(cell_of(checkpoint, healing_lr=1e30)))[0]
    assert hot.status == "optimiser_artifact"
    assert hot.summary()["loss_undefined_reason"]
    once = outcome_of(heal_cell(cell_of(checkpoint, healing_lr=1e30, healing_steps=1)))[0]
    assert once.status == "optimiser_artifact"  # seen on the probe: no step is left to fail
    assert once.summary()["nonfinite_step"] == 2
    # A slope of 1e18 makes of a rate of 1e21 a weight that float32 cannot hold; a slope of 1 not.
    steep = altered(checkpoint, "steep", lambda state: state["lm_head.weight"].mul_(1e18))
    config = {"healing_optimizer": "sgd", "healing_lr": 1e21, "healing_steps": 2}
    diverged = outcome_of(heal_cell(cell_of(steep, **config)))[0]
    assert diverged.summary()["nonfinite_origin"] == "update"
    assert diverged.status == "diverged"
    assert diverged.summary()["control_origin"] == "none"


def test_status_and_failure_are_stored_with_the_run(store, checkpoint):
    path = altered(checkpoint, "large", overflowing)
    heal(heal_config(collapsed_checkpoint=path, precision="fp16", healing_steps=2))
    run = MlflowClient().get_run(_only_heal_run())
    tags = run.data.tags
    assert (tags["status"], tags["nonfinite_origin"]) == ("format_overflow", "forward")
    assert (tags["nonfinite_module"], tags["nonfinite_step"]) == (UP.removesuffix(".weight"), "1")
    assert tags["control_origin"] == "none"
    assert tags["status_reason"] in tags["mlflow.note.content"]
    assert run.data.params["heal.precision"] == "fp16"
    rows = read_jsonl(run_folder(store) / "metrics.jsonl")
    assert [row["nonfinite_steps"] for row in rows] == [0, 2]
    # fp16's overflow is inside block 1: the outputs of the blocks are as small as ever.
    assert 0 < rows[0]["layers/headroom_01"] < 0.1
    stored = json.loads((run_folder(store) / "healing_summary.json").read_text())
    assert stored["status_reason"] == tags["status_reason"]
    summary = summarize(SummarizeConfig(verbosity="quiet"))
    (group,) = summary.groups
    assert group.statuses == {"format_overflow": 1}
    band = group.bands["loss_recovery_pct"]  # not even the 0 % of its step 0
    assert all(math.isnan(interval.point) for interval in band.intervals)


def test_the_mode_of_fp32_is_no_setting_and_that_of_fp16_is(store, checkpoint):
    loaded = read_checkpoint(checkpoint)

    def marks(**changes) -> tuple[str, str]:
        cell = cell_of(checkpoint, **changes)
        return heal_fingerprint(cell, loaded, "d", {}), settings_of(cell, loaded, {})

    assert marks(precision_mode="pure") == marks()
    assert len({marks(), marks(precision="fp16"), marks(precision="bf16")}) == 3
    assert marks(precision="fp16", precision_mode="pure") != marks(precision="fp16")


@pytest.mark.parametrize("stage", ["attack", "heal"])
def test_what_a_failed_run_measured_is_kept_with_it(store, checkpoint, monkeypatch, stage):
    calls = []
    original = Probe.measure

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return original(self, *arguments)

    stages = {
        "heal": lambda: heal(heal_config(collapsed_checkpoint=str(checkpoint))),
        "attack": lambda: make_attack(seed=1, attack_steps=12),
    }
    # What other tests of this process have measured already is not taken: calls are counted.
    monkeypatch.setattr(kept_measurements, "_KEPT", OrderedDict())
    monkeypatch.setattr(Probe, "measure", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        stages[stage]()
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    (run,) = client.search_runs(
        [experiment], f"tags.stage = '{stage}' and attributes.status = 'FAILED'"
    )
    assert run.data.tags["failure"] == "out of luck"
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {
        "config.json", "metrics.jsonl",
    }  # fmt: skip
    local = pathlib.Path(client.download_artifacts(run.info.run_id, "metrics.jsonl"))
    assert [row["step"] for row in read_jsonl(local)] == {"heal": [0, 4], "attack": [0, 1, 2]}[
        stage
    ]


def test_a_failed_attack_fails_its_noise_and_is_listed(store, monkeypatch):
    original = AttackStage.prepare

    def failing(stage, config, tools):
        if config.arm == "haep" and config.seed == 1:
            raise CheckpointError("no luck")
        return original(stage, config, tools)

    monkeypatch.setattr(AttackStage, "prepare", failing)
    with pytest.raises(SweepError, match=r"2 cell\(s\) failed; first: nano haep seed 1: no luck"):
        sweep(small_sweep(arms="haep,gaussian_noise"))
    (folder,) = (store / "experiments/results/summaries").iterdir()
    text = (folder / "summary.md").read_text()
    assert "Failed runs (2)" in text
    assert "the attack haep that it refers to failed" in text


def small_sweep(**changes) -> SweepConfig:
    values = {"models": "nano", "arms": "random_tokens,none", "seeds": "0,1", "healing_steps": 4,
              "attack_steps": 4, "batch_size": 4, "sequence_length": 64, "verbosity": "quiet",
              "measurement_interval": 2, "noise_match": "norm", "sham": False}  # fmt: skip
    return SweepConfig(**(values | changes))


def test_sweep_runs_every_cell_once_and_summarizes(store):
    summary = sweep(small_sweep())
    assert [(g.arm, g.n_runs) for g in summary.groups] == [("none", 2), ("random_tokens", 2)]
    assert summary.groups[0].verdict == "undefined"
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    stages = [r.data.tags["stage"] for r in client.search_runs([experiment])]
    assert {s: stages.count(s) for s in set(stages)} == {
        "main": 1, "attack": 2, "heal": 4, "summarize": 1,
    }  # fmt: skip
    again = sweep(small_sweep())
    stages = [r.data.tags["stage"] for r in client.search_runs([experiment])]
    assert (stages.count("heal"), stages.count("attack")) == (4, 2)
    finals = [g.intervals["loss_recovery_pct"].point for g in summary.groups]
    repeats = [g.intervals["loss_recovery_pct"].point for g in again.groups]
    assert plain(finals) == plain(repeats)
    more = sweep(small_sweep(seeds="0,1,2"))
    assert more.groups[1].n_checkpoints == 3
    stages = [r.data.tags["stage"] for r in client.search_runs([experiment])]
    assert stages.count("heal") == 6


def test_workers_change_no_number(store, tmp_path):
    finals = []
    for workers, experiment in ((1, "one"), (2, "two")):
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("MLFLOW_EXPERIMENT_ID", raising=False)
            patch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
            summary = sweep(
                small_sweep(workers=workers, output_dir=experiment, arms="haep,gaussian_noise")
            )
        finals.append([list(g.means["loss_recovery_pct"].means) for g in summary.groups])
    assert plain(finals[0]) == plain(finals[1])


def test_plan_puts_the_noise_after_what_it_is_matched_to():
    chains = plan(SweepConfig(arms="gaussian_noise,haep,spectral", seeds="4"))
    order = ["none", "haep", "spectral", "gaussian_noise"]
    assert [[c.arm for c in chain] for chain in chains] == [order, order]
    assert [chain[0].model for chain in chains] == ["micro", "nano"]
    assert worker_count(SweepConfig(workers=3)) == 3
    assert worker_count(SweepConfig(models="70m", device="cpu")) == 1


def test_plan_has_a_cell_per_draw_and_what_a_ray_needs():
    config = SweepConfig(
        models="nano,micro", arms="ray,sharpened_spectrum,low_rank_noise,haep,random_text",
        seeds="7,nano=0-1", control_draws=2, sham=False,
    )  # fmt: skip
    chains = plan(config)
    assert [(c[0].model, c[0].seed) for c in chains] == [("micro", 7), ("nano", 0), ("nano", 1)]
    assert [(c.arm, c.matched_to, c.direction, c.draw) for c in chains[0]] == [
        ("haep", "", "", 0), ("random_text", "", "", 0), ("ray", "haep", "random_text", 0),
        ("sharpened_spectrum", "haep", "", 0), ("low_rank_noise", "haep", "", 0),
        ("low_rank_noise", "haep", "", 1),
    ]  # fmt: skip
    both = plan(replace(config, noise_match="rank+loss"))  # the readout's noise is drawn
    assert [(c.arm, c.draw) for c in both[0] if c.arm == "ray"] == [("ray", 0), ("ray", 1)]
    assert config.match_of("gaussian_noise") == "loss"
    assert config.match_of("low_rank_noise") == "rank"


def test_controls_of_a_sweep_are_matched_and_numbered(store):
    """Noise of another attack, rays along another, several draws; all pooled with their kind."""
    settings = {
        "arms": "ray,low_rank_noise,random_text,haep", "seeds": "3", "attack_steps": 10,
        "healing_steps": 2, "noise_match": "auto", "control_draws": 2, "noise_rank": 2,
    }  # fmt: skip
    summary = sweep(small_sweep(**settings))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    runs = client.search_runs([experiment])
    by = {
        (r.data.tags["stage"], r.data.tags["arm"], r.data.tags.get("draw", "")): r.data
        for r in runs
        if r.data.tags["stage"] in ("attack", "heal")
    }
    assert set(by) >= {
        (stage, arm, draw)
        for stage in ("attack", "heal")
        for arm, draw in (("low_rank_noise", "0"), ("low_rank_noise", "1"), ("ray", "0"))
    }
    healed = [plain_tags(by["heal", "low_rank_noise", draw].tags) for draw in "01"]
    assert healed[0]["settings"] == healed[1]["settings"]
    assert healed[0]["checkpoint_id"] != healed[1]["checkpoint_id"]
    reference = plain_tags(by["heal", "haep", ""].tags)["checkpoint_id"]
    assert {t["reference_checkpoint_id"] for t in healed} == {reference}
    ray = plain_tags(by["heal", "ray", "0"].tags)
    assert (ray["direction_arm"], ray["reference_checkpoint_id"]) == ("random_text", reference)
    text = by["attack", "random_text", ""].tags
    assert by["attack", "ray", "0"].tags["direction_run_id"] != ""
    assert by["attack", "low_rank_noise", "1"].params["attack.noise_rank"] == "2"
    assert by["attack", "haep", ""].params["attack.noise_rank"] == "1"
    assert text.get("direction_run_id", "") == ""
    noise = next(g for g in summary.groups if g.arm == "low_rank_noise")
    assert (noise.n_runs, noise.noise_match) == (2, "rank")
    ranks = [by["attack", "haep", ""].metrics["summary/collapsed_effective_rank"]]
    ranks += [
        by["attack", arm, draw].metrics["summary/collapsed_effective_rank"]
        for arm, draw in (("low_rank_noise", "0"), ("low_rank_noise", "1"), ("ray", "0"))
    ]
    assert ranks[1:] == pytest.approx([ranks[0]] * 3, rel=0.02)


def test_matched_noise_in_a_sweep_refers_to_the_attack_of_its_seed(store):
    sweep(small_sweep(arms="gaussian_noise,haep", seeds="3"))
    folder = run_folder(store, "*gaussian_noise*attack*")
    config = json.loads((folder / "config.json").read_text())
    assert "haep_seed3" in config["reference_checkpoint"]
    noise = read_jsonl(folder / "metrics.jsonl")[-1]["weight_change"]
    haep = read_jsonl(run_folder(store, "*haep*attack*") / "metrics.jsonl")[-1]["weight_change"]
    assert noise == pytest.approx(haep, rel=1e-3)


def test_noise_in_a_sweep_is_matched_in_damage_by_default(store):
    sweep(small_sweep(arms="gaussian_noise,haep", seeds="3", noise_match="loss", sham=True))
    noise = read_jsonl(run_folder(store, "*gaussian_noise*attack*") / "metrics.jsonl")
    haep = read_jsonl(run_folder(store, "*haep*attack*") / "metrics.jsonl")
    assert noise[-1]["loss"] == pytest.approx(haep[-1]["loss"], rel=0.02)
    assert [row["step"] for row in noise] == list(range(len(noise)))
    smaller = min(haep[-1]["loss"], haep[-1]["loss"] - haep[0]["loss"])
    assert noise[-1]["match_error_pct"] == pytest.approx(
        100 * (noise[-1]["loss"] - haep[-1]["loss"]) / smaller, abs=1e-3
    )
    experiment = MlflowClient().get_experiment_by_name("llm-healing").experiment_id
    (run,) = MlflowClient().search_runs([experiment], "tags.noise_match = 'loss' and "
                                        "tags.stage = 'attack'")  # fmt: skip
    (reference,) = MlflowClient().search_runs([experiment], "tags.stage = 'attack' and "
                                              "tags.arm = 'haep'")  # fmt: skip
    assert run.data.tags["reference_run_id"] == reference.info.run_id
    history = MlflowClient().get_metric_history(run.info.run_id, "noise_scale")
    assert [m.value for m in history] == [row["noise_scale"] for row in noise[1:]]
    (folder,) = (store / "experiments/results/summaries").iterdir()
    text = (folder / "summary.md").read_text()
    assert "Gaussian noise of equal loss (damage-matched)" in text
    assert "## Recovery against the sham" in text


def test_noise_that_cannot_do_the_damage_fails_and_keeps_its_trajectory(store):
    run_id, _ = make_attack("haep", target_rank_reduction=1.0)
    wanted = {"arm": "gaussian_noise", "match": "rank", "reference_run_id": run_id}
    with pytest.raises(MatchError, match=r"rank stays between .* closest was .* % off\) at"):
        make_attack(**wanted)
    experiment = MlflowClient().get_experiment_by_name("llm-healing").experiment_id
    (run,) = MlflowClient().search_runs([experiment], "tags.arm = 'gaussian_noise'")
    assert run.info.status == "FAILED"
    assert "closest was" in run.data.tags["failure"]
    assert len(MlflowClient().get_metric_history(run.info.run_id, "match_error_pct")) == 21


def test_the_sham_is_healed_once_and_recovery_refers_to_it_step_by_step(store, checkpoint):
    config = heal_config(collapsed_checkpoint=str(checkpoint), sham=True)
    heal(config)
    heal(replace(config, output_dir="again"))
    experiment = MlflowClient().get_experiment_by_name("llm-healing").experiment_id
    runs = MlflowClient().search_runs([experiment], "tags.stage = 'heal'")
    shams = [r for r in runs if r.data.tags["arm"] == "none"]
    assert (len(runs), len(shams)) == (3, 1)
    healed = [r for r in runs if r.data.tags["arm"] != "none"]
    assert {r.data.tags["sham_run_id"] for r in healed} == {shams[0].info.run_id}
    reference = read_jsonl(run_folder(store, "*_none_*") / "metrics.jsonl")
    rows = read_jsonl(run_folder(store, "*random_tokens*_run*") / "metrics.jsonl")
    for row, sham in zip(rows, reference, strict=True):
        expected = 100 * (row["loss"] - rows[0]["loss"]) / (sham["loss"] - rows[0]["loss"])
        assert row["loss_recovery_sham_pct"] == pytest.approx(expected)
    assert rows[-1]["loss_recovery_sham_pct"] != rows[-1]["loss_recovery_pct"]
    # At step 0 the sham is the healthy model.
    summary = json.loads(
        (run_folder(store, "*random_tokens*_run*") / "healing_summary.json").read_text()
    )
    assert reference[0]["loss"] == pytest.approx(summary["original_loss"])


def test_the_sham_takes_the_same_batches(store, checkpoint):
    """A sham of a checkpoint that holds the healthy weights is that checkpoint's own healing."""
    _, path = make_attack("none")
    (own,) = heal(heal_config(collapsed_checkpoint=str(path)))
    config = resolve_from_checkpoint(
        heal_config(sham=True), read_checkpoint(checkpoint), checkpoint
    )
    sham = outcome_of(heal_cell(HealCell(config, str(checkpoint)).sham_cell()))[0]
    assert [r.measurement.loss for r in sham.records] == [r.measurement.loss for r in own.records]


@pytest.mark.slow
def test_replicates_that_finished_before_are_left_out_of_what_goes_on(store, checkpoint):
    """As ``--resume-run-id`` of a parent whose first child had finished."""
    given = {"collapsed_checkpoint": str(checkpoint), "healing_steps": 2}
    heal(heal_config(**given))
    (second,) = heal(heal_config(**given, num_runs=2), Driver(Console("quiet"), again=True))
    assert second.cell.replicate == 1
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    (parent,) = client.search_runs([experiment], "tags.role = 'parent'")
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["mlflow.note.content"] == "2 of 2 healing runs done."
    finished = client.search_runs([experiment], "tags.stage = 'heal' and tags.verdict != ''")
    assert sorted(plain_tags(run.data.tags)["replicate"] for run in finished) == ["0", "1"]


def test_summary_of_a_query_with_a_failed_run(store, checkpoint):
    heal(heal_config(collapsed_checkpoint=str(checkpoint), healing_steps=2))
    with pytest.raises(CheckpointError):
        heal(heal_config(collapsed_checkpoint="nowhere.pt"))
    summary = summarize(SummarizeConfig(verbosity="quiet"))
    assert len(summary.groups) == 1
    assert [r.failure for r in summary.failed] == [
        f"no checkpoint at {store}/nowhere.pt: give the path of one"
    ]
    (folder,) = (store / "experiments/results/summaries").iterdir()
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    figures = ("mean_recovery", "final_recovery", "half_recovery", "recovery_against_parameters")
    assert names == {
        "summary.json", "summary.csv", "summary.md", "report.html", "budgets.csv", "measures.csv",
        "overview.png",
        *(f"figures/{f}.{kind}" for f in figures for kind in ("png", "pdf")),
        "paper/recovery_table.tex", "paper/recovery_macros.tex", "paper/fig_recovery.pdf",
        "paper/fig_recovery.png", "paper/addressing_irreversibility.tex",
    }  # fmt: skip
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    (run,) = client.search_runs([experiment], "tags.stage = 'summarize'")
    stored = {f.path for parent in ("", "figures", "paper")
              for f in client.list_artifacts(run.info.run_id, parent) if not f.is_dir}  # fmt: skip
    assert stored == {*names, "summary_table.json"}  # a table that the UI shows
    name = "mean/nano-random_tokens/loss_recovery_pct_mean"
    assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == [0, 2]
    with pytest.raises(TrackingError, match="no healing runs match"):
        summarize(SummarizeConfig(filter="tags.model = 'micro'", verbosity="quiet"))


def test_jsonl_round_trip_keeps_nan_and_infinity(tmp_path):
    lines = JsonLines(tmp_path / "a" / "m.jsonl")
    lines.append({"step": 0, "x": math.nan, "y": -math.inf, "z": 0.1})
    text = (tmp_path / "a" / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["x"] == "NaN"
    (row,) = read_jsonl(tmp_path / "a" / "m.jsonl")
    assert math.isnan(row["x"])
    assert (row["y"], row["z"]) == (-math.inf, 0.1)


def test_gradient_checkpointing_recomputes_and_changes_nothing_else(store, checkpoint):
    path = str(checkpoint)
    plain_run, _ = outcome_of(heal_cell(HealCell(resolve_from_presets(heal_config()), path)))
    saving = resolve_from_presets(heal_config(gradient_checkpointing=True))
    saved, healed = outcome_of(heal_cell(HealCell(saving, path)))
    finals = [r.records[-1].measurement.loss for r in (plain_run, saved)]
    assert finals[1] == pytest.approx(finals[0], rel=1e-5)
    calls = []
    model = healed.model
    block = transformer_blocks(model)[0]
    handle = block.attention.register_forward_pre_hook(lambda *_: calls.append(1))
    ids = torch.zeros(1, 8, dtype=torch.int64)
    Trainer(model, resolve_from_presets(heal_config(healing_lr=1e-9))).step(ids)
    handle.remove()
    assert len(calls) == 2  # once forward, once again in the backward pass


def test_loaded_model_is_healthy_whatever_ran_before(store, checkpoint):
    assert load_model("nano").digest == load_model("nano").digest


def test_a_parameter_of_a_run_is_never_auto():
    """What nothing replaced is another stage's or the machine's; what was chosen is there."""
    resolved = resolve_from_presets(HealConfig(model="nano", arm="haep"))
    before, kept = as_params(resolved), settled(resolved)
    assert before["attack_steps"] == before["device"] == "auto"
    assert "auto" not in kept.values()
    assert kept == {name: value for name, value in before.items() if value != "auto"}
    asked = replace(resolved, healing_steps="auto")  # its default is a number
    assert settled(asked)["healing_steps"] == "auto"
    again = config_of_run(HealConfig(), "heal", {f"heal.{k}": str(v) for k, v in kept.items()})
    assert again == replace(resolved, resume_run_id="")
