"""Reading in bulk gives what the artifacts give, on SQLite and over HTTP, and falls back aloud."""

from __future__ import annotations

import gc
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request

import mlflow
import pytest
from mlflow.exceptions import MlflowException

from healing.errors import TrackingError
from healing.stages.summarize_inputs import (
    from_artifact,
    from_history,
    healer,
    read_runs,
)
from healing.statistics.heal_runs import ENDPOINTS
from healing.tracking import metric_history, open_runs, queries
from healing.tracking.run_files import JsonLines
from healing.tracking.store import MlflowStore

TAGS = {"stage": "heal", "model": "nano", "arm": "haep", "settings": "s", "checkpoint_id": "c",
        "attack_seed": "0", "status": "ok", "spectral_state": "collapsed"}  # fmt: skip


def make_run(folder: pathlib.Path, name: str, rows: list[dict], artifact: bool = True) -> None:
    """A healing run as the heal stage logs it: NaN metrics are left out, the file has them all."""
    with open_runs.start(name, TAGS) as run:
        run.n_params(300_000)
        lines = JsonLines(folder / name / "metrics.jsonl")
        for row in rows:
            lines.append(row)
            logged = {k: v for k, v in row.items() if k != "step" and not math.isnan(v)}
            run.metrics(logged, row["step"])
        run.metrics({"summary/steps": rows[-1]["step"]}, rows[-1]["step"])
        if artifact:
            run.artifact(folder / name / "metrics.jsonl")


def rows(scale: float, steps=(0, 10, 20), **changes) -> list[dict]:
    values = [
        {"step": s, "nonfinite_tokens": 0.0, "loss": 3.0, "rank_recovery_pct": scale * s / 7,
         "loss_recovery_pct": scale * s, "ppl_improvement_pct": -math.inf if s == 10 else 0.1 * s}
        for s in steps
    ]  # fmt: skip
    return [{**row, **changes} for row in values]


def make_three(folder: pathlib.Path) -> None:
    make_run(folder, "one", rows(1.0))
    make_run(folder, "undefined", rows(2.0, rank_recovery_pct=math.nan))
    nothing = dict.fromkeys(("rank_recovery_pct", "loss_recovery_pct", "ppl_improvement_pct"))
    make_run(folder, "locked", rows(3.0, (0, 5), loss=math.nan, **dict.fromkeys(nothing, math.nan)))


def stored() -> list[queries.RunView]:
    return queries.search(queries.find_experiment(""), "tags.stage = 'heal'")


def assert_same(bulk, one_by_one) -> None:
    assert bulk.steps == one_by_one.steps
    for endpoint in ENDPOINTS:
        pairs = zip(bulk.values[endpoint], one_by_one.values[endpoint], strict=True)
        assert all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in pairs), endpoint


def test_bulk_history_is_what_the_artifacts_hold(store):
    make_three(store)
    views = stored()
    found = from_history(views)
    assert len(found) == 3
    for view in views:
        assert_same(found[view.run_id], from_artifact(view, MlflowStore()))
    notes: list[str] = []
    one, undefined, locked = read_runs(views, notes.append)
    assert notes == []
    assert (one.name, one.steps, one.n_params) == ("one", (0, 10, 20), 300_000)
    assert one.final["rank_recovery_pct"] == 20 / 7
    assert one.trajectory["ppl_improvement_pct"][1] == -math.inf
    assert math.isnan(undefined.final["rank_recovery_pct"])
    assert locked.steps == (0, 5)


@pytest.fixture
def server(tmp_path):
    """A real tracking server on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    uri, log = f"http://127.0.0.1:{port}", tmp_path / "server.log"
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port),
             "--backend-store-uri", f"sqlite:///{tmp_path}/served.db",
             "--artifacts-destination", f"{tmp_path}/served"],
            stdout=stream, stderr=stream, cwd=tmp_path,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )  # fmt: skip
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"{uri}/health", timeout=5)
                break
            except OSError:
                assert process.poll() is None, log.read_text()
                time.sleep(0.5)
        else:
            pytest.fail(f"the server did not start: {log.read_text()}")
        yield uri
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_over_http(store, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    mlflow.set_tracking_uri(server)
    make_three(store)
    views = stored()
    downloads: list[str] = []
    original = queries.download
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(queries, "download", lambda uri, folder: downloads.append(uri))
        assert [r.name for r in read_runs(views)] == ["one", "undefined", "locked"]
    assert downloads == []
    assert queries.download is original
    found = from_history(views)
    folder = store / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    for view in views:
        assert_same(found[view.run_id], from_artifact(view, MlflowStore()))
    assert not list(folder.iterdir())  # a thousand runs would leave a thousand folders
    monkeypatch.setattr(metric_history, "BULK_HISTORY", "/ajax-api/2.0/mlflow/metrics/none")
    with pytest.raises(TrackingError, match="no bulk history of loss"):
        metric_history.metric_page([views[0].run_id], "loss")


def test_runs_without_history_are_read_from_their_artifact(store):
    make_run(store, "whole", rows(1.0))
    with open_runs.start("bare", TAGS) as run:
        run.n_params(300_000)
        lines = JsonLines(store / "bare" / "metrics.jsonl")
        for row in rows(2.0):
            lines.append(row)
        run.artifact(store / "bare" / "metrics.jsonl")
    notes: list[str] = []
    whole, bare = read_runs(stored(), notes.append)
    assert notes == [
        "1 of 2 runs are read one by one from metrics.jsonl: their logged history is not whole"
    ]
    assert bare.trajectory["rank_recovery_pct"] == tuple(2.0 * s / 7 for s in (0, 10, 20))
    assert whole.finished
    assert bare.finished


def test_a_history_that_ends_too_early_is_not_used(store):
    """Its own summary says how many steps the run took."""
    make_run(store, "lost", rows(1.0))
    with open_runs.start("more", {}) as run:
        pass
    client = mlflow.tracking.MlflowClient()
    (view,) = stored()
    client.log_metric(view.run_id, "summary/steps", 30.0, step=30)
    notes: list[str] = []
    read_runs(stored(), notes.append)
    assert "1 of 1 runs are read one by one" in notes[0]
    assert run.run_id


def test_store_without_bulk_history(store, monkeypatch):
    make_three(store)
    views = stored()

    def refuse(run_ids, metric):
        raise TrackingError("NoStore has no bulk history")

    expected = read_runs(views)
    monkeypatch.setattr(metric_history, "metric_page", refuse)
    notes: list[str] = []
    found = read_runs(views, notes.append)
    assert notes == ["3 of 3 runs are read one by one from metrics.jsonl: NoStore has no bulk "
                     "history"]  # fmt: skip
    assert [r.steps for r in found] == [r.steps for r in expected]
    assert found[0] == expected[0]


def test_metric_page_names_what_failed(store, monkeypatch):
    make_run(store, "one", rows(1.0))
    (view,) = stored()

    class Bare:
        pass

    class Broken:
        def get_metric_history_bulk(self, run_ids, metric, count):
            raise MlflowException("gone")

    for backend, message in (
        (Bare(), "Bare has no bulk history"), (Broken(), "no bulk history of loss: gone")
    ):  # fmt: skip
        client = type("Client", (), {"_tracking_client": type("T", (), {"store": backend})})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(metric_history, "MlflowClient", client)
            with pytest.raises(TrackingError, match=message):
                metric_history.metric_page([view.run_id], "loss")


@pytest.mark.parametrize("was_on", [True, False])
def test_garbage_collection_is_left_as_it_was(was_on):
    try:
        (gc.enable if was_on else gc.disable)()

        def paused_and_failing():
            with metric_history.collection_paused():
                assert not gc.isenabled()
                raise KeyError("x")

        with pytest.raises(KeyError):
            paused_and_failing()
        assert gc.isenabled() == was_on
    finally:
        gc.enable()


def test_tokens_per_step_come_from_the_configuration_or_the_metric(store):
    make_run(store, "by metric", [{**row, "tokens": 96.0 * row["step"]} for row in rows(1.0)])
    make_run(store, "unknown", rows(1.0))
    make_run(store, "by configuration", rows(1.0))
    make_run(store, "uneven", [{**row, "tokens": 7.0 + row["step"]} for row in rows(1.0)])
    client = mlflow.tracking.MlflowClient()
    for name, value in (("heal.batch_size", "8"), ("heal.sequence_length", "128")):
        client.log_param(stored()[2].run_id, name, value)
    assert [r.tokens_per_step for r in read_runs(stored())] == [96, 0, 1024, 0]


@pytest.mark.parametrize(
    ("rate", "said"),
    [("0.004494303097145379", "AdamW at 0.004494"), ("0.001", "AdamW at 0.001"),
     ("1e-05", "AdamW at 1e-05"), ("of a stranger", "AdamW at of a stranger"), ("", "")],
)  # fmt: skip
def test_a_rate_that_a_search_drew_is_said_in_four_digits(rate, said):
    params = {"heal.healing_optimizer": "adamw", "heal.healing_lr": rate}
    assert healer(queries.RunView("r", "r", "FINISHED", "1", params, {}, {})) == said


def test_a_run_that_runs_is_no_failed_one(store):
    make_run(store, "done", rows(1.0))
    with open_runs.start("open", {**TAGS, "fingerprint": "f"}) as run:
        done, running = read_runs(stored())
    assert (running.run_id, running.running, running.finished) == (run.run_id, True, False)
    assert running.failure == ""
    beat = mlflow.tracking.MlflowClient().get_run(run.run_id).data.tags["heartbeat"]
    assert running.heard == f"last heard of at {beat[:10]} {beat[11:19]} UTC"
    assert (done.running, done.fingerprint) == (False, "")
    assert read_runs(stored())[1].fingerprint == ""  # finished, but without a trajectory
    client = mlflow.tracking.MlflowClient()
    client.set_terminated(run.run_id, "KILLED")
    killed = read_runs(stored())[1]
    assert (killed.running, killed.failure) == (False, "status KILLED")


def test_failed_and_unreadable_runs_keep_their_reason(store):
    with pytest.raises(RuntimeError), open_runs.start("broken", TAGS):
        raise RuntimeError("out of memory")
    for name, content in (("malformed", '{"step"'), ("wrong", '{"x": 1}'), ("empty", "")):
        with open_runs.start(name, TAGS) as run:
            (store / "metrics.jsonl").write_text(content)
            run.artifact(store / "metrics.jsonl")
    with open_runs.start("none", TAGS):
        pass
    with open_runs.start("untagged", {k: v for k, v in TAGS.items() if k != "status"}) as run:
        (store / "metrics.jsonl").write_text('{"step": 0}')
        run.artifact(store / "metrics.jsonl")
    failures = {r.name: r.failure for r in read_runs(stored())}
    assert failures["broken"] == "out of memory"
    assert failures["untagged"].startswith("it lacks the tag or parameter 'status'")
    line = "metrics.jsonl of malformed is malformed: ValueError: metrics.jsonl, line 1: Expecting"
    assert failures["malformed"].startswith(line)
    assert failures["wrong"] == "metrics.jsonl of wrong is malformed: KeyError: 'step'"
    assert failures["empty"] == "metrics.jsonl of empty does not begin with step 0"
    assert "cannot be had" in failures["none"]
    assert json.dumps(failures)
