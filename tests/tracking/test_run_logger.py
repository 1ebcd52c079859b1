"""The MLflow adapter on a temporary SQLite store, read back through MLflow's own client."""

from __future__ import annotations

import contextlib
import http.server
import json
import math
import re
import threading
from collections.abc import Iterator

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking import MlflowClient

from healing.errors import TrackingError
from healing.tracking import open_runs, queries
from healing.tracking.ui import experiment_page


def test_finished_run_with_parameters_metrics_tags_and_inputs(store):
    with open_runs.start("a run", {"stage": "heal"}) as run:
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
        with open_runs.start("a", {"stage": "heal"}) as run:
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
    with open_runs.start("parent", {"stage": "main"}) as parent:
        with open_runs.child(parent, "good", {"stage": "heal"}) as good:
            good.metrics({"x": 1.0})
        with pytest.raises(RuntimeError), open_runs.child(parent, "bad", {}) as bad:
            raise RuntimeError("no")
    client = MlflowClient()
    assert client.get_run(good.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert client.get_run(good.run_id).info.status == "FINISHED"
    assert client.get_run(bad.run_id).info.status == "FAILED"
    assert client.get_run(parent.run_id).info.status == "FINISHED"


def test_interrupted_child_is_killed_not_running(store):
    with open_runs.start("parent", {"stage": "main"}) as parent:
        with pytest.raises(KeyboardInterrupt), open_runs.child(parent, "c", {}) as run:
            raise KeyboardInterrupt
        assert MlflowClient().get_run(run.run_id).info.status == "KILLED"


def test_parameters_that_mlflow_run_logged_first_are_kept(store, monkeypatch):
    """`mlflow run` logs its own spelling of a parameter; logging another one would raise."""
    experiment = mlflow.set_experiment("e")
    outer = MlflowClient().create_run(experiment.experiment_id)
    MlflowClient().log_param(outer.info.run_id, "model", "auto")
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment.experiment_id)
    with open_runs.start("heal nano", {"stage": "heal"}) as run:
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
    with open_runs.start("a", {}) as run:
        for step in range(300):
            run.metrics({f"m{i}": float(i) for i in range(8)}, step)
    assert sum(calls) == 2400
    assert max(calls) <= 1000  # the store's limit per request
    assert len(calls) <= 8


@pytest.mark.parametrize("ending", ["metrics", "nothing", "failure"])
def test_tags_for_later_go_with_the_next_request(store, monkeypatch, ending):
    sent = []
    original = MlflowClient.log_batch

    def spy(self, run_id, **content):
        sent.append({kind: [x.key for x in entries] for kind, entries in content.items()})
        return original(self, run_id, **content)

    with contextlib.suppress(ValueError), open_runs.start("a", {"stage": "heal"}) as run:
        monkeypatch.setattr(MlflowClient, "log_batch", spy)
        run.tags({"phase": "bases"}, later=True)
        run.tags({"phase": "done"}, later=True)
        assert sent == []
        if ending == "metrics":
            run.metrics({"seconds/bases": 1.0})
        if ending == "failure":
            raise ValueError("broken")
    assert (
        sent
        == {
            "metrics": [{"metrics": ["seconds/bases"], "tags": ["phase"]}],
            "nothing": [{"tags": ["phase"]}],
            "failure": [{"tags": ["phase", "failure", "failure_type"]}],
        }[ending]
    )
    assert MlflowClient().get_run(run.run_id).data.tags["phase"] == "done"


def test_search_and_find_finished(store):
    with open_runs.start("p", {"stage": "main"}) as parent:
        with open_runs.child(parent, "one", {"stage": "heal", "fingerprint": "f1"}) as one:
            one.metrics({"loss": math.inf})
        with (
            pytest.raises(RuntimeError),
            open_runs.child(parent, "two", {"stage": "heal", "fingerprint": "f2"}),
        ):
            raise RuntimeError("x")
        found = queries.search(parent.experiment_id, "tags.stage = 'heal'")
        assert [v.name for v in found] == ["one", "two"]
        assert found[0].metrics["loss"] == math.inf  # the store spells it 1.797e308
        done = queries.find_finished(parent.experiment_id, "f1")
        assert done is not None
        assert done.run_id == one.run_id
        assert queries.find_finished(parent.experiment_id, "f2") is None


def test_errors_name_what_is_missing(store):
    with open_runs.start("p", {}) as run:
        pass
    assert queries.find_experiment("") == run.experiment_id
    assert queries.find_experiment(run.experiment_id) == run.experiment_id
    with pytest.raises(TrackingError, match=r"no experiment 'zzz'.*there are: .*llm-healing"):
        queries.find_experiment("zzz")
    with pytest.raises(TrackingError, match="no run 'nope'"):
        queries.get_run("nope")
    with pytest.raises(TrackingError, match="--filter 'bad ==='"):
        queries.search(run.experiment_id, "bad ===", "--filter")
    with pytest.raises(TrackingError, match="cannot be had"):
        queries.download(f"runs:/{run.run_id}/none.json")


@pytest.mark.parametrize(("variable", "value", "said"), [
    ("MLFLOW_RUN_ID", "zzz", "Run with id=zzz not found"),
    ("MLFLOW_EXPERIMENT_ID", "abc", "Invalid experiment ID 'abc'"),
    ("MLFLOW_EXPERIMENT_NAME", "a" * 600, "exceeds the maximum length of 500"),
])  # fmt: skip
def test_what_no_store_has_is_not_the_store_s_fault(store, monkeypatch, variable, value, said):
    monkeypatch.setenv(variable, value)
    with pytest.raises(TrackingError) as raised, open_runs.start("a", {"stage": "attack"}):
        pass
    message = str(raised.value)
    assert message.startswith(f"{variable}='{value[:40]}' cannot be used with sqlite:")
    assert said in message
    assert "unset it, or set it to what is there" in message
    assert "reachable" not in message


def test_unusable_store(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with (
        pytest.raises(TrackingError, match="check MLFLOW_TRACKING_URI"),
        open_runs.start("a", {}),
    ):
        pass


# A store that fails in mid-run


def failing(*_args, **_options):
    raise MlflowException("not\ntaken", error_code=INVALID_PARAMETER_VALUE)


CALLS = {
    "log_batch": {
        "parameters": lambda run, path: run.params("heal", {"x": 1}),
        "parameters ": lambda run, path: run.n_params(5),
        "tags": lambda run, path: run.tags({"x": 1}),
        "tags ": lambda run, path: run.describe("text"),
        "metrics": lambda run, path: (run.metrics({"x": 1.0}), run.flush()),
    },
    "log_artifact": {"artifact m.jsonl": lambda run, path: run.artifact(path)},
    "log_inputs": {"data set d": lambda run, path: run.dataset("d", "x", "probe", {})},
}


@pytest.mark.parametrize(
    ("method", "what"), [(method, what) for method, calls in CALLS.items() for what in calls]
)
def test_every_call_that_fails_is_one_clear_line(store, monkeypatch, method, what):
    path = store / "m.jsonl"
    path.write_text("{}\n")
    with open_runs.start("a", {"stage": "heal"}) as run, monkeypatch.context() as broken:
        broken.setattr(MlflowClient, method, failing)
        with pytest.raises(TrackingError) as caught:
            CALLS[method][what](run, path)
        run._buffer = []
    text = str(caught.value)
    assert text.startswith(f"{what.strip()} of run {run.run_id} could not be stored in sqlite:///")
    assert "(not taken): make that store reachable" in text
    assert "files written so far stay" in text
    assert "\n" not in text


def test_a_file_that_cannot_be_copied_is_such_a_failure_too(store):
    with (
        open_runs.start("a", {}) as run,
        pytest.raises(TrackingError, match=r"artifact none\.json .* could not be stored"),
    ):
        run.artifact(store / "none.json")


@pytest.mark.parametrize("method", ["log_batch", "set_terminated", "log_artifact"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_broken_store_does_not_hide_why_the_run_failed(store, monkeypatch, method, nested):
    path = store / "m.jsonl"
    path.write_text("{}\n")

    def stage() -> None:
        with open_runs.start("p", {}) as parent:
            if not nested:
                broken_stage(parent)
            with open_runs.child(parent, "c", {}) as run:
                broken_stage(run)

    def broken_stage(run) -> None:
        run.metrics({"loss": 1.0}, 1)
        run.rescue(path)
        monkeypatch.setattr(MlflowClient, method, failing)
        raise ValueError("the reason")

    with pytest.raises(ValueError, match="the reason"):
        stage()
    assert mlflow.active_run() is None


def test_the_end_of_a_run_that_cannot_be_stored_is_told(store, monkeypatch):
    def stage() -> None:
        with open_runs.start("p", {}):
            monkeypatch.setattr(MlflowClient, "set_terminated", failing)

    with pytest.raises(TrackingError, match=r"the end of run \w+ could not be stored"):
        stage()


def test_a_child_and_a_view_that_cannot_be_stored(store, monkeypatch):
    with open_runs.start("p", {}) as parent, monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "create_run", failing)
        broken.setattr(MlflowClient, "set_experiment_tag", failing)
        with (
            pytest.raises(TrackingError, match="run 'c' could not be stored"),
            open_runs.child(parent, "c", {}),
        ):
            pass
        with pytest.raises(TrackingError, match="the views of experiment 1 could not be stored"):
            experiment_page.publish(parent.experiment_id)


def test_marking_a_run_that_never_began_needs_no_store(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    open_runs.mark_failed("a bad option")  # no such run: the user sees the reason in any case


def test_a_failed_run_keeps_its_growing_files_and_its_last_metrics(store):
    path = store / "metrics.jsonl"
    path.write_text('{"step": 0}\n')
    ids = []

    def stage() -> None:
        with open_runs.start("a", {}) as run:
            ids.append(run.run_id)
            run.rescue(store / "never_written.json", path)
            run.metrics({"loss": 2.0}, 3)
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        stage()
    client = MlflowClient()
    assert [a.path for a in client.list_artifacts(ids[0])] == ["metrics.jsonl"]
    assert client.get_run(ids[0]).data.metrics == {"loss": 2.0}
    assert client.get_run(ids[0]).data.tags["failure"] == "no"
    with open_runs.start("b", {}) as fine:
        fine.rescue(path)
    assert client.list_artifacts(fine.run_id) == []  # one that ends well stores its own


class Stub(http.server.BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as a run needs."""

    def answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        experiment = {"experiment_id": "1", "name": "llm-healing", "lifecycle_stage": "active",
                      "artifact_location": self.server.folder}  # fmt: skip
        info = {"run_id": "r1", "experiment_id": "1", "status": "RUNNING", "start_time": 1,
                "lifecycle_stage": "active", "artifact_uri": self.server.folder}  # fmt: skip
        replies = {
            "get-by-name": {"experiment": experiment},
            "get": {"experiment": experiment, "run": {"info": info, "data": {}}},
            "create": {"run": {"info": info, "data": {}}},
            "update": {"run_info": info},
        }
        name = self.path.split("?")[0].rsplit("/", 1)[-1]
        body = json.dumps(replies.get(name, {})).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = answer  # noqa: N815

    def log_message(self, *_args) -> None:
        pass


@pytest.fixture
def server(store, monkeypatch) -> Iterator[http.server.ThreadingHTTPServer]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    found = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    found.folder = str(store / "artifacts")
    threading.Thread(target=found.serve_forever, daemon=True).start()
    mlflow.set_tracking_uri(f"http://127.0.0.1:{found.server_port}")
    yield found
    found.shutdown()
    found.server_close()


def test_a_server_that_stops_answering_is_one_line(server, store):
    local = store / "metrics.jsonl"

    def stage() -> None:
        with open_runs.start("a", {"stage": "heal"}) as run:
            run.rescue(local)
            for step in range(3):
                local.write_text("{}\n" * (step + 1))
                run.metrics({"loss": 1.0}, step)
                if step == 1:
                    server.shutdown()
                    server.server_close()
                run.flush()

    with pytest.raises(TrackingError) as caught:
        stage()
    text = str(caught.value)
    assert re.match(r"\d request\(s\) could not be stored: metrics of run r1 could not", text)
    assert "stored in http://127.0.0.1:" in text
    assert "\n" not in text
    assert local.read_text() == "{}\n" * 3  # it went on
    assert mlflow.active_run() is None
