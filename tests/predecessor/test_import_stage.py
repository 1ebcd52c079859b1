"""Import end to end on a temporary store: times, marks, never twice, never pooled."""

from __future__ import annotations

import json
import math
import shutil

import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from entrypoints import import_results as import_command
from entrypoints import summarize as summarize_command
from healing.config.import_results import ImportConfig
from healing.config.summarize import SummarizeConfig
from healing.errors import TrackingError
from healing.predecessor.import_stage import import_results
from healing.predecessor.records import LegacyError, read_run
from healing.predecessor.summarize_stage import find_results, summarize_imported
from healing.stages.summarize import find_runs
from healing.tracking import open_runs, run_logger
from tests.conftest import SHARED_DATA
from tests.legacy_folders import (
    AFTER,
    BEFORE,
    CONFIG,
    attack_rows,
    heal_rows,
    healing_summary,
    write_run,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def records(store):
    root = store / "records"
    for number, after in enumerate((2.5, 2.1, 1.9), 1):
        write_run(root / "scaling" / f"run{number:02d}_fp16", attack_rows(2.0, after))
    write_run(root / "demo" / "again_fp16", attack_rows(2.0, 2.5, second=20))
    write_run(root / "healing" / "run01_fp16", heal_rows(), summary=healing_summary())
    return root


def config(root, **changes) -> ImportConfig:
    return ImportConfig(folder=str(root), verbosity="quiet", **changes)


def stored(query: str = ""):
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    return client.search_runs([experiment], query, order_by=["attributes.start_time ASC"])


def test_recorded_run_keeps_its_times_numbers_and_files(records):
    done = import_results(config(records))
    assert (len(done.new), done.known, done.skipped) == (5, (), ())
    (run,) = stored("tags.folder = 'run01_fp16' and tags.kind = 'attack'")
    source = read_run(records / "scaling" / "run01_fp16", records)
    assert (run.info.start_time, run.info.end_time) == (source.start_ms, source.end_ms)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "scaling/run01_fp16"
    tags = run.data.tags
    assert (tags["source"], tags["legacy_metrics"]) == ("neuroentropy", "true")
    assert (tags["stage"], tags["model"], tags["arm"]) == ("import_results", "70m", "haep")
    assert tags["fingerprint"] == source.fingerprint
    assert run.data.params["legacy.attack.learning_rate"] == "0.0001"
    assert (run.data.params["model"], run.data.params["arm"]) == ("70m", "haep")
    assert run.data.metrics["legacy/rank_change_pct"] == pytest.approx(25.0)
    client = MlflowClient()
    history = client.get_metric_history(run.info.run_id, "legacy/treatment_effective_rank")
    assert [(m.step, m.timestamp, m.value) for m in history] == [
        (10, source.points[1].time_ms, 2.2)
    ]
    # Nothing under this project's own metric names, on which charts and summaries are made.
    assert all(k.startswith(("legacy/", "rederived/")) for k in run.data.metrics)
    path = client.download_artifacts(run.info.run_id, "singular_values.json")
    with open(path) as stream:
        assert json.load(stream) == {"healthy": BEFORE, "collapsed": AFTER}
    names = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert names == {"config.json", "metrics.jsonl", "singular_values.json"}


def test_healing_run_says_that_nothing_had_collapsed(records):
    import_results(config(records))
    (run,) = stored("tags.kind = 'heal'")
    assert run.data.tags["rank_undefined_reason"] == "the attack raised the rank by 6.2 %"
    assert run.data.metrics["legacy/rank_recovery_pct"] == 0.0
    assert run.data.metrics["legacy/unclamped_recovery_pct"] == pytest.approx(2.0)
    assert "undefined: the attack raised the rank" in run.data.tags["mlflow.note.content"]
    assert not any(k.startswith("rederived/") for k in run.data.metrics)
    names = {a.path for a in MlflowClient().list_artifacts(run.info.run_id)}
    assert names == {"config.json", "metrics.jsonl", "healing_summary.json"}


def test_what_was_imported_is_not_imported_again(records):
    import_results(config(records))
    shutil.copytree(records / "scaling" / "run01_fp16", records / "copy" / "run01_fp16")
    write_run(records / "scaling" / "run04_fp16", attack_rows(2.0, 2.2))
    done = import_results(config(records))
    assert [r.folder.name for r in done.new] == ["run04_fp16"]
    assert len(done.known) == 6
    assert len(stored("tags.legacy_metrics = 'true'")) == 6
    parent = stored("tags.role = 'parent'")[-1]
    assert (parent.data.tags["runs"], parent.data.tags["known_runs"]) == ("1", "6")


def test_two_folders_of_the_same_bytes_are_one_run(records):
    shutil.copytree(records / "scaling" / "run01_fp16", records / "copy" / "run01_fp16")
    done = import_results(config(records))
    assert (len(done.new), len(done.known)) == (5, 1)
    assert len(stored("tags.legacy_metrics = 'true'")) == 5


def test_interrupted_import_is_taken_up_again(records, monkeypatch):
    calls = []
    original = run_logger.RunLogger.recorded

    def fail_second(self, points):
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        original(self, points)

    monkeypatch.setattr(run_logger.RunLogger, "recorded", fail_second)
    with pytest.raises(OSError, match="disk full"):
        import_results(config(records))
    assert len(import_results(config(records)).new) == 4
    assert len(find_results(SummarizeConfig())) == 5


def test_malformed_runs_are_skipped_named_and_counted(records):
    (records / "scaling" / "run02_fp16" / "metrics.jsonl").write_text('{"step": 0}\n')
    (records / "healing" / "run01_fp16" / "config.json").unlink()
    with pytest.raises(LegacyError, match=r"2 of 5 recorded runs skipped; first: .*: no config"):
        import_results(config(records))
    assert len(stored("tags.legacy_metrics = 'true'")) == 3
    (parent,) = stored("tags.role = 'parent'")
    assert (parent.info.status, parent.data.tags["skipped_runs"]) == ("FAILED", "2")
    note = parent.data.tags["mlflow.note.content"]
    assert "run02_fp16/metrics.jsonl:1: timestamp None is not an ISO date" in note


def test_what_the_store_refuses_of_one_run_keeps_no_other(records):
    named = [{**row, "é<>!": 1.0} for row in attack_rows(2.0, 2.2)]
    write_run(records / "scaling" / "run00_fp16", named)
    deep = write_run(records / "scaling" / "run09_fp16", attack_rows(2.0, 2.3))
    with (deep / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 1' + "0" * 5000 + "}\n")
    (deep / "config.json").write_text(json.dumps({**CONFIG, "x": "y" * 7000}))
    first = r"2 of 7 recorded runs skipped; first: .*run00_fp16: MLflow takes no name 'legacy/é<>!'"
    with pytest.raises(LegacyError, match=first):
        import_results(config(records))
    assert len(find_results(SummarizeConfig())) == 5
    assert len(stored("tags.legacy_metrics = 'true'")) == 5
    (parent,) = stored("tags.role = 'parent'")
    assert "run09_fp16" in parent.data.tags["mlflow.note.content"]


def test_a_run_that_fails_while_it_is_stored_keeps_no_other(records, monkeypatch):
    """A refusal that nothing foresaw: its run is FAILED, the others are imported."""
    original = run_logger.RunLogger.recorded

    def refuse_one(self, points):
        if len(points) == 4:  # the healing run's three, and what is derived
            raise TrackingError("not this one")
        original(self, points)

    monkeypatch.setattr(run_logger.RunLogger, "recorded", refuse_one)
    with pytest.raises(LegacyError, match=r"1 of 5 recorded runs skipped; first: .*not this one"):
        import_results(config(records))
    runs = stored("tags.legacy_metrics = 'true'")
    assert sorted(r.info.status for r in runs) == ["FAILED", *["FINISHED"] * 4]


def test_command_ends_with_one_line_and_a_code(records):
    (records / "scaling" / "run02_fp16" / "metrics.jsonl").write_text("{")
    done = CliRunner().invoke(import_command.main, ["--folder", str(records)])
    assert done.exit_code == 1
    assert "error: 1 of 5 recorded runs skipped; first: " in done.output
    assert "metrics.jsonl:1: not JSON" in done.output
    assert "4 recorded runs imported from `records`" in done.output
    for folder, message in (("", "--folder is empty"), ("nowhere", "is not a folder")):
        done = CliRunner().invoke(import_command.main, ["--folder", folder])
        assert done.exit_code == 1
        assert message in done.output


def heal_run(name: str, **tags) -> None:
    with open_runs.start(name, {"stage": "heal", **tags}):
        pass


def test_legacy_and_new_runs_are_never_pooled(records):
    import_results(config(records))
    with pytest.raises(TrackingError, match="no healing runs match"):
        find_runs(SummarizeConfig())
    heal_run("new")
    heal_run("marked", legacy_metrics="true")  # even one that calls itself a healing run
    assert [v.name for v in find_runs(SummarizeConfig())] == ["new"]
    names = {r.name for r in find_results(SummarizeConfig(legacy=True))}
    assert len(names) == 5
    assert "new" not in names


def test_legacy_summary_is_stored_and_repeatable(records):
    import_results(config(records))
    for _ in range(2):  # the first summary is not a run of the second
        summary = summarize_imported(SummarizeConfig(legacy=True, verbosity="quiet"))
        (group,) = summary.groups
        assert (group.n_recorded, group.n_distinct, group.n_up, group.n_down) == (4, 3, 2, 1)
        assert group.change.point == pytest.approx((25.0 + 5.0 - 5.0) / 3)
        assert len(summary.healing) == 1
    run = stored("tags.stage = 'summarize'")[0]
    names = {a.path for a in MlflowClient().list_artifacts(run.info.run_id)}
    assert names == {"legacy_summary.json", "legacy_summary.md", "legacy_summary.csv"}
    assert run.data.metrics["legacy/70m-haep-adamw-fp16/rose"] == 2.0
    only = summarize_imported(
        SummarizeConfig(legacy=True, verbosity="quiet", filter="tags.kind = 'heal'")
    )
    assert not only.groups


def test_legacy_command(records):
    import_results(config(records))
    done = CliRunner().invoke(summarize_command.main, ["--legacy", "true"])
    assert done.exit_code == 0
    assert "70m    haep  adamw" in done.output
    assert "Of 1 healing runs the attack had raised the rank in 1" in done.output
    missing = CliRunner().invoke(
        summarize_command.main, ["--legacy", "true", "--filter", "tags.model = '1b'"]
    )
    assert missing.exit_code == 1
    assert "no imported runs match" in missing.output


@pytest.mark.skipif(
    not (SHARED_DATA / "neuroentropy").is_dir(),
    reason=f"the predecessor's records are not at {SHARED_DATA}/neuroentropy",
)
def test_recorded_runs_of_the_predecessor(store):
    done = import_results(config(SHARED_DATA / "neuroentropy"))
    assert (len(done.new), done.skipped) == (68, ())
    summary = summarize_imported(SummarizeConfig(legacy=True, verbosity="quiet"))
    found = {(g.model, g.arm, g.optimizer, g.precision): g for g in summary.groups}
    assert len(found) == 9
    big = found["1b", "haep", "adamw", "fp16"]
    assert (big.n_recorded, big.n_distinct, big.n_up, big.n_down) == (13, 10, 10, 0)
    assert big.change.point == pytest.approx(7.65, abs=0.01)  # published as a reduction by 7.65 %
    text = found["410m", "random_text", "adamw", "fp16"]
    assert (text.n_recorded, text.n_distinct) == (3, 1)
    assert math.isnan(text.change.low)
    assert [r.change_pct > 0 for r in summary.healing] == [True, True, False]
