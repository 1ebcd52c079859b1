"""The command on a run's page, run as it stands, gives the run's numbers again."""

from __future__ import annotations

import importlib
import pathlib
import re

import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.pretrain import PretrainConfig
from healing.config.resolve import resolve_from_presets
from healing.config.summarize import SummarizeConfig
from healing.config.tune import TuneConfig
from healing.stages.attack import attack
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.heal import heal
from healing.stages.pretrain import pretrain
from healing.stages.summarize import summarize
from healing.stages.tune import tune
from healing.tracking import git_version
from healing.tracking.page_text import plain_tags
from healing.tracking.run_files import read_jsonl
from tests.shell_words import words_of

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 1024, "batch_size": 4,
         "measurement_interval": 4, "verbosity": "quiet"}  # fmt: skip
TIMES = {"seconds", "tokens_per_second"}


@pytest.fixture(autouse=True)
def no_remote(monkeypatch):
    """The command is one for a checkout: this one."""
    found = git_version.Checkout(commit="c" * 40)
    for module in ("attack", "healing_run.page", "tune", "pretrain", "summarize"):
        monkeypatch.setattr(f"healing.stages.{module}.checkout", lambda: found)


def runs(stage: str) -> list:
    (experiment,) = MlflowClient().search_experiments(filter_string="name = 'llm-healing'")
    found = MlflowClient().search_runs([experiment.experiment_id], f"tags.stage = '{stage}'")
    return [r for r in found if r.data.tags.get("role") != "parent"]


def rows(run_id: str) -> list[dict]:
    path = pathlib.Path(MlflowClient().download_artifacts(run_id, "metrics.jsonl"))
    return [{k: repr(v) for k, v in r.items() if k not in TIMES} for r in read_jsonl(path)]


def run_again(run) -> None:
    """What stands in the code block, in this process."""
    note = run.data.tags["mlflow.note.content"]
    words = words_of(re.search(r"```bash\n(.+?)\n```", note, re.DOTALL)[1])
    assert words[:2] == ["python", "-m"]
    result = CliRunner().invoke(importlib.import_module(words[2]).main, words[3:])
    assert result.exit_code == 0, result.output


def test_an_attack_is_repeated(store):
    attack(AttackConfig(**SMALL, arm="random_tokens", attack_steps=4, seed=5))
    (first,) = runs("attack")
    run_again(first)
    second, _ = runs("attack")
    assert rows(second.info.run_id) == rows(first.info.run_id)
    assert second.data.tags["fingerprint"] == first.data.tags["fingerprint"]


def test_a_healing_run_its_replicate_and_its_sham_are_repeated(store):
    run_id, _ = attack(AttackConfig(**SMALL, arm="random_tokens", attack_steps=4))
    wanted = HealConfig(**SMALL, attack_run_id=run_id, healing_steps=4, sham=True, num_runs=2)
    heal(wanted)
    before = {r.info.run_id: r for r in runs("heal")}
    assert len(before) == 4
    for run in before.values():
        known = {r.info.run_id for r in runs("heal")}
        run_again(run)
        new = [r for r in runs("heal") if r.info.run_id not in known]
        assert rows(run.info.run_id) in [rows(r.info.run_id) for r in new]
    page = next(r for r in before.values() if r.data.tags["arm"] != "none")
    note = page.data.tags["mlflow.note.content"]
    assert f"/runs/{run_id}?" in note
    assert f"/runs/{page.data.tags['sham_run_id']}?" in note
    assert f"/runs/{page.data.tags['mlflow.parentRunId']}?" in note
    assert page.data.params["used.attack_run_id"] == run_id
    assert page.data.params["used.device"] == "cpu"


def test_pictures_and_text_are_stored_and_change_no_number(store):
    run_id, _ = attack(AttackConfig(**SMALL, arm="random_tokens", attack_steps=4))
    wanted = {**SMALL, "attack_run_id": run_id, "healing_steps": 4}
    heal(HealConfig(**wanted))
    (shown,) = runs("heal")
    heal(HealConfig(**wanted, log_images=False, log_text=False, log_layers=True))
    plain = next(r for r in runs("heal") if r.info.run_id != shown.info.run_id)
    assert rows(shown.info.run_id) == rows(plain.info.run_id)
    assert shown.data.tags["fingerprint"] == plain.data.tags["fingerprint"]
    settings = [plain_tags(run.data.tags)["settings"] for run in (shown, plain)]
    assert settings[0] == settings[1]
    client = MlflowClient()
    pictures = {
        int(a.path.split("+step+")[1].split("+")[0])
        for a in client.list_artifacts(shown.info.run_id, "images")
    }
    assert pictures == {0, 4}
    assert client.list_artifacts(plain.info.run_id, "images") == []
    table = client.load_table(shown.info.experiment_id, "text.json", [shown.info.run_id])
    assert list(table) == ["opening", "the text goes on", "healthy", "collapsed", "healed"]
    assert len(table) == 4
    assert set(table["healthy"]).isdisjoint(table["collapsed"])
    assert "mlflow.loggedArtifacts" not in plain.data.tags
    assert {"layers/effective_rank_00"} <= plain.data.metrics.keys()
    assert not any(name.startswith("layers/") for name in shown.data.metrics)
    charts = {n.removeprefix("headline/") for n in shown.data.metrics if n.startswith("headline/")}
    assert charts == {"effective_rank", "loss_recovery_pct", "rank_recovery_pct"}
    for name in charts:
        assert shown.data.metrics[f"headline/{name}"] == shown.data.metrics[name]


def test_pictures_of_an_attack_are_stored_by_step_and_change_no_number(store):
    wanted = {**SMALL, "arm": "random_tokens", "attack_steps": 6, "target_rank_reduction": 1.0,
              "measurement_interval": 2}  # fmt: skip
    attack(AttackConfig(**wanted))
    (shown,) = runs("attack")
    attack(AttackConfig(**wanted, log_images=False))
    plain = next(r for r in runs("attack") if r.info.run_id != shown.info.run_id)
    assert rows(shown.info.run_id) == rows(plain.info.run_id)
    assert shown.data.tags["fingerprint"] == plain.data.tags["fingerprint"]
    client = MlflowClient()
    pictures = {
        int(a.path.split("+step+")[1].split("+")[0])
        for a in client.list_artifacts(shown.info.run_id, "images")
    }
    assert pictures == {*range(7)}
    assert client.list_artifacts(plain.info.run_id, "images") == []
    plots = [
        {a.path.removeprefix("plots/") for a in client.list_artifacts(r.info.run_id, "plots")}
        for r in (shown, plain)
    ]
    assert plots[0] - plots[1] == {"rank_by_block.png"}
    assert not plots[1] - plots[0]


def test_the_map_of_an_attack_is_what_its_blocks_measured(store):
    """Each share is the block's logged rank over the one logged at step 0."""
    config = AttackConfig(**SMALL, arm="random_tokens", attack_steps=4, target_rank_reduction=1.0)
    cell = resolve_from_model(resolve_from_presets(config))
    outcome = outcome_of(attack_cell(cell))
    logged = [
        [r.metrics()[f"layers/effective_rank_{block:02d}"] for block in range(4)]
        for r in outcome.records
    ]
    assert [r.step for r in outcome.records] == [0, 1, 2, 3, 4]
    expected = [[now / first for now, first in zip(r, logged[0], strict=True)] for r in logged]
    assert outcome.rank_shares().tolist() == [pytest.approx(r) for r in expected]
    assert outcome.rank_shares()[1].max() < 1.0


@pytest.mark.slow
def test_a_search_is_repeated(store):
    wanted = {**SMALL, "attack_steps": 4, "arms": "random_tokens", "seeds": "100", "trials": 3,
              "token_budget": 1024, "rungs": 2, "batch_sizes": "4",
              "output_dir": "first"}  # fmt: skip
    tune(TuneConfig(**wanted))
    (first,) = pages("tune")
    before = {r.info.run_id for r in runs("trial")}
    run_again(first)
    second, _ = pages("tune")
    drawn = [r for r in runs("trial") if r.info.run_id not in before]
    assert len(drawn) == len(before) == 3
    same = {k: v for k, v in first.data.metrics.items() if not k.startswith("seconds")}
    assert {k: second.data.metrics[k] for k in same} == same
    assert second.data.tags["study"] == first.data.tags["study"]


def test_a_training_and_a_summary_are_repeated(store):
    pretrain(PretrainConfig(tokens_per_parameter=0.009, batch_size=2, sequence_length=256,
                            measurement_interval=2, max_documents=300, threads=1, seed=3,
                            output_dir="first", verbosity="quiet"))  # fmt: skip
    (first,) = pages("pretrain")
    run_again(first)
    second, _ = pages("pretrain")
    assert histories(second) == histories(first)

    run_id, _ = attack(AttackConfig(**SMALL, arm="random_tokens", attack_steps=4))
    heal(HealConfig(**SMALL, attack_run_id=run_id, healing_steps=4))
    summarize(SummarizeConfig(filter="tags.model = 'nano'", confidence=0.9, figure_style="serif",
                              verbosity="quiet"))  # fmt: skip
    (first,) = pages("summarize")
    run_again(first)
    second, _ = pages("summarize")
    assert histories(second) == histories(first)
    assert second.data.params["summarize.confidence"] == "0.9"
    drawn = MlflowClient().download_artifacts(second.info.run_id, "paper/fig_recovery.pdf")
    assert b"STIXGeneral" in pathlib.Path(drawn).read_bytes()


def pages(stage: str) -> list:
    """Runs of a stage, the newest first."""
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    return list(client.search_runs(experiments, f"tags.stage = '{stage}'"))


def histories(run) -> dict[str, list]:
    client = MlflowClient()
    return {
        name: [(m.step, repr(m.value)) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if not name.startswith(("seconds", "tokens_per_second"))
    }
