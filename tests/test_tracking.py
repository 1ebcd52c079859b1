"""The MLflow adapter on a temporary SQLite store, read back through MLflow's own client."""

from __future__ import annotations

import math

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from healing import tracking
from healing.tracking import TrackingError


def test_finished_run_with_parameters_metrics_tags_and_inputs(store):
    with tracking.start("a run", {"stage": "heal"}) as run:
        run.params("heal", {"model": "nano", "healing_lr": 1e-3})
        run.metrics({"loss": 2.0, "rank": math.nan}, 0)
        run.metrics({"loss": 1.5, "rank": math.inf}, 10)
        run.dataset("stdlib-probe", "abc123", "probe", {"corpus": "stdlib"})
    stored = MlflowClient().get_run(run.run_id)
    assert stored.info.status == "FINISHED"
    assert stored.info.run_name == "a run"
    assert stored.data.params == {"heal.model": "nano", "model": "nano", "heal.healing_lr": "0.001"}
    assert stored.data.tags["stage"] == "heal"
    history = MlflowClient().get_metric_history(run.run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(0, 2.0), (10, 1.5)]
    assert stored.inputs.dataset_inputs[0].dataset.digest == "abc123"
    assert stored.inputs.dataset_inputs[0].tags[0].value == "probe"


def test_failed_run_keeps_what_was_logged_and_says_why(store):
    ids = []

    def failing_stage() -> None:
        with tracking.start("a", {"stage": "heal"}) as run:
            ids.append(run.run_id)
            run.metrics({"loss": 2.0}, 3)
            raise ValueError("broken\nthing")

    with pytest.raises(ValueError, match="broken"):
        failing_stage()
    stored = MlflowClient().get_run(ids[0])
    assert stored.info.status == "FAILED"
    assert stored.data.metrics["loss"] == 2.0
    assert stored.data.tags["failure"] == "broken thing"
    assert stored.data.tags["failure_type"] == "ValueError"


def test_children_are_nested_and_fail_alone(store):
    with tracking.start("parent", {"stage": "main"}) as parent:
        with tracking.child(parent, "good", {"stage": "heal"}) as good:
            good.metrics({"x": 1.0})
        with pytest.raises(RuntimeError), tracking.child(parent, "bad", {}) as bad:
            raise RuntimeError("no")
    client = MlflowClient()
    assert client.get_run(good.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert client.get_run(good.run_id).info.status == "FINISHED"
    assert client.get_run(bad.run_id).info.status == "FAILED"
    assert client.get_run(parent.run_id).info.status == "FINISHED"


def test_interrupted_child_is_killed_not_running(store):
    with tracking.start("parent", {"stage": "main"}) as parent:
        with pytest.raises(KeyboardInterrupt), tracking.child(parent, "c", {}) as run:
            raise KeyboardInterrupt
        assert MlflowClient().get_run(run.run_id).info.status == "KILLED"


def test_parameters_that_mlflow_run_logged_first_are_kept(store, monkeypatch):
    """`mlflow run` logs its own spelling of a parameter; logging another one would raise."""
    experiment = mlflow.set_experiment("e")
    outer = MlflowClient().create_run(experiment.experiment_id)
    MlflowClient().log_param(outer.info.run_id, "model", "auto")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment.experiment_id)
    with tracking.start("heal nano", {"stage": "heal"}) as run:
        run.params("heal", {"model": "nano"})
    stored = MlflowClient().get_run(outer.info.run_id)
    assert run.run_id == outer.info.run_id
    assert stored.data.params == {"model": "auto", "heal.model": "nano"}
    assert stored.data.tags["mlflow.runName"] == "heal nano"


def test_metrics_are_sent_together(store, monkeypatch):
    calls = []
    original = MlflowClient.log_batch

    def spy(self, run_id, metrics=(), params=(), tags=(), **options):
        if metrics:
            calls.append(len(metrics))
        return original(self, run_id, metrics=metrics, params=params, tags=tags, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", spy)
    with tracking.start("a", {}) as run:
        for step in range(300):
            run.metrics({f"m{i}": float(i) for i in range(8)}, step)
    assert sum(calls) == 2400
    assert max(calls) <= 1000  # the store's limit per request
    assert len(calls) <= 8


def test_search_and_find_finished(store):
    with tracking.start("p", {"stage": "main"}) as parent:
        with tracking.child(parent, "one", {"stage": "heal", "fingerprint": "f1"}) as one:
            one.metrics({"loss": math.inf})
        with (
            pytest.raises(RuntimeError),
            tracking.child(parent, "two", {"stage": "heal", "fingerprint": "f2"}),
        ):
            raise RuntimeError("x")
        found = tracking.search(parent.experiment_id, "tags.stage = 'heal'")
        assert [v.name for v in found] == ["one", "two"]
        assert found[0].metrics["loss"] == math.inf  # the store spells it 1.797e308
        done = tracking.find_finished(parent.experiment_id, "f1")
        assert done is not None
        assert done.run_id == one.run_id
        assert tracking.find_finished(parent.experiment_id, "f2") is None


def test_errors_name_what_is_missing(store):
    with tracking.start("p", {}) as run:
        pass
    assert tracking.find_experiment("") == run.experiment_id
    assert tracking.find_experiment(run.experiment_id) == run.experiment_id
    with pytest.raises(TrackingError, match=r"no experiment 'zzz'.*there are: .*llm-healing"):
        tracking.find_experiment("zzz")
    with pytest.raises(TrackingError, match="no run 'nope'"):
        tracking.get_run("nope")
    with pytest.raises(TrackingError, match="--filter 'bad ==='"):
        tracking.search(run.experiment_id, "bad ===")
    with pytest.raises(TrackingError, match="cannot be had"):
        tracking.download(f"runs:/{run.run_id}/none.json")


def test_unusable_store(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with (
        pytest.raises(TrackingError, match="check MLFLOW_TRACKING_URI"),
        tracking.start("a", {}),
    ):
        pass
