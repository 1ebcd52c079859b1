"""What a store refuses for good: kept with the reason, told once, and no other request's loss.

The store is MLflow's own, the outboxes are written here line by line.
"""

from __future__ import annotations

import http.server
import json
import pathlib
import shutil
import threading
from collections.abc import Iterator

import mlflow
import pytest
from click.testing import CliRunner, Result
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from entrypoints.sync import main as sync
from healing.errors import OutageError, TrackingError
from healing.tracking import open_runs
from healing.tracking.page_text import has_tag
from healing.tracking.sending import sender
from healing.tracking.sending.outbox import PLACE, Request
from healing.tracking.sending.requests import (
    ARTIFACT,
    END,
    LOCAL_ID,
    Messenger,
    batch,
    create,
)

OWN = "f" * 32
BAD = "a metric?!*"


def requests(experiment: str = "x", points: tuple[str, ...] = ("loss", BAD)) -> list[Request]:
    metrics = [Metric(name, 2.0, 1_000, 0) for name in points]
    return [
        create(OWN, {"name": experiment}, "left", {"stage": "heal"}, 1_000),
        batch(OWN, "metrics", metrics=metrics, tags={"arm": "haep"}),
        Request(OWN, ARTIFACT, {"path": "note.txt", "folder": None}),
        Request(OWN, END, {"status": "FINISHED", "time": 5_000}),
    ]


def left(output: pathlib.Path, given: list[Request]) -> pathlib.Path:
    """An outbox as a dead process leaves it."""
    folder = output / PLACE / "1"
    folder.mkdir(parents=True)
    lines = [json.dumps([r.run, r.kind, r.content]) for r in given]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    (output / "note.txt").write_text("kept")
    return folder


def synced(output: pathlib.Path, *options: str) -> Result:
    return CliRunner().invoke(sync, [str(output), *options])


def made(experiment: str = "x"):
    client = MlflowClient()
    found = client.get_experiment_by_name(experiment)
    (run,) = client.search_runs([found.experiment_id], has_tag(LOCAL_ID, OWN)[0])
    files = [f.path for f in client.list_artifacts(run.info.run_id)]
    return run, files


def test_a_refused_name_costs_neither_the_other_names_nor_the_end(store, monkeypatch) -> None:
    output = store / "out"
    folder = left(output, requests())
    done = synced(output)
    assert done.exit_code == 1
    assert "sent 3 request(s) of 1" in done.output
    (line,) = [t for t in done.stderr.splitlines() if t.startswith("error")]
    assert line.startswith("error: 1 request(s) will not be taken by the store, and stay in ")
    assert str(folder) in line
    assert BAD in line
    run, files = made()
    assert (run.info.status, run.info.end_time) == ("FINISHED", 5_000)
    assert (run.data.metrics, run.data.tags["arm"], files) == ({"loss": 2.0}, "haep", ["note.txt"])
    (kept,) = (json.loads(t) for t in (folder / "refused.jsonl").read_text().split("\n") if t)
    assert (kept["number"], kept["kind"], kept["run"]) == (1, "batch", OWN)
    assert BAD in kept["reason"]
    # Nothing is asked a second time, and it is told as long as it is there.
    with monkeypatch.context() as patched:
        patched.setattr(Messenger, "__call__", lambda *_args, **_options: pytest.fail("asked"))
        again = synced(output)
    assert (again.exit_code, BAD in again.stderr, again.output) == (1, True, again.stderr)
    assert synced(output, "--refused").exit_code == 1
    assert made()[0].info.end_time == 5_000


def test_what_a_deleted_run_was_told_is_sent_once_it_is_restored(store) -> None:
    output = store / "out"
    folder = left(output, requests(points=("loss",))[:1])
    assert synced(output).exit_code == 0  # made, and ended as KILLED
    run, _ = made()
    MlflowClient().delete_run(run.info.run_id)
    left(output, requests(points=("loss",)))
    done = synced(output)
    assert done.exit_code == 1
    # MLflow takes a file of a deleted run.
    assert "2 request(s) will not be taken" in done.stderr
    assert "runs restore --run-id" in done.stderr
    MlflowClient().restore_run(run.info.run_id)
    done = synced(output, "--refused")
    assert done.exit_code == 0, done.output
    assert f"sent 2 request(s) of 1: {run.info.run_id}\n" in done.output
    run, files = made()  # one run still
    assert (run.info.status, run.data.metrics, files) == ("FINISHED", {"loss": 2.0}, ["note.txt"])
    assert not folder.parent.exists()


def test_a_run_that_cannot_be_made_is_refused_with_all_that_it_was_told(store) -> None:
    client = MlflowClient()
    gone = client.create_experiment("gone")
    client.delete_experiment(gone)
    output = store / "out"
    other = [r if r.run != OWN else Request("e" * 32, r.kind, r.content) for r in requests("y")]
    folder = left(output, requests("gone") + other)
    done = synced(output)
    assert "5 request(s) will not be taken" in done.stderr, done.stderr
    lines = (folder / "refused.jsonl").read_text().split("\n")
    reasons = [json.loads(line)["reason"] for line in lines if line]
    assert all("gone" in why for why in reasons[:4]), reasons
    (run,) = client.search_runs([client.get_experiment_by_name("y").experiment_id])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 2.0})
    client.restore_experiment(gone)
    done = synced(output, "--refused")
    assert "2 request(s) will not be taken" in done.stderr  # the name, of both
    assert made("gone")[0].info.status == "FINISHED"


def test_a_file_that_is_nowhere_and_one_outside_are_refused_alone(store) -> None:
    output = store / "out"
    for number, place in enumerate(("nowhere.txt", "../../etc/passwd")):
        given = requests(f"x{number}", ("loss",))
        given[2] = Request(OWN, ARTIFACT, {"path": place, "folder": None})
        folder = left(output, given)
        done = synced(output)
        assert "1 request(s) will not be taken" in done.stderr
        assert pathlib.Path(place).name in done.stderr
        assert made(f"x{number}")[0].info.status == "FINISHED"
        folder.rename(store / f"seen{number}")


@pytest.fixture
def somebody_else() -> Iterator[list[int]]:
    """A server that is none of MLflow's; the list holds the status that it answers with."""
    status = [404]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status[0])
            self.end_headers()
            self.wfile.write(b"<html>log in</html>")

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
    yield status
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("answer", "code"), [(404, 1), (200, 75)])
def test_who_is_no_store_refuses_nothing(store, somebody_else, answer, code) -> None:
    somebody_else[0] = answer
    output = store / "out"
    folder = left(output, requests(points=("loss",)))
    done = synced(output)
    assert (done.exit_code, "is not sent" in done.stderr) == (code, True)
    assert not (folder / "refused.jsonl").exists()
    mlflow.set_tracking_uri(f"sqlite:///{store}/mlflow.db")
    assert synced(output).exit_code == 0
    assert made()[0].info.status == "FINISHED"


def test_another_store_is_told_everything_that_this_one_refused(store, empty_database) -> None:
    output = store / "out"
    shutil.copy(empty_database, store / "other.db")
    left(output, requests())
    assert synced(output).exit_code == 1
    mlflow.set_tracking_uri(f"sqlite:///{store}/other.db")
    assert synced(output, "--refused").exit_code == 1
    run, files = made()
    assert (run.info.status, run.data.metrics, files) == ("FINISHED", {"loss": 2.0}, ["note.txt"])


def test_a_run_is_ended_as_it_ended_whatever_was_refused(store, monkeypatch) -> None:
    """A name that is refused after an outage: the command fails with it, its run is FINISHED."""
    carry_out, away = Messenger.__call__, threading.Event()

    def cut_off(self, request, file, *, again) -> None:
        if away.is_set():
            raise mlflow_is_away()
        carry_out(self, request, file, again=again)

    monkeypatch.setattr(Messenger, "__call__", cut_off)
    monkeypatch.setattr("healing.tracking.run_logger.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(sender, "PATIENCE", 30.0)
    output, said, ids = store / "out", list[str](), list[str]()

    def computed() -> None:
        keep = output / PLACE
        with open_runs.start("r", {"stage": "heal"}, keep=keep, say=said.append) as run:
            ids.append(run.run_id)
            away.set()
            run.metrics({BAD: 1.0, "loss": 2.0}, 0)
            away.clear()
            run.metrics({"loss": 1.0}, 1)

    with pytest.raises(TrackingError, match=r"1 request.s. will not be taken.*--refused"):
        computed()
    run = MlflowClient().get_run(ids[0])
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})
    history = MlflowClient().get_metric_history(ids[0], "loss")
    assert [(p.step, p.value) for p in history] == [(0, 2.0), (1, 1.0)]
    assert len([text for text in said if BAD in text]) == 1
    assert "1 request(s) will not be taken" in synced(output).stderr


def mlflow_is_away() -> Exception:
    return OutageError("nobody there")
