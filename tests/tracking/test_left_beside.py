"""What an earlier command left is sent beside a computation, and waited for where it is looked for.

The store is MLflow's own, slow or silent for the run that was left.
"""

from __future__ import annotations

import json
import pathlib
import threading
import time
from collections.abc import Callable

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from healing.tracking import store as stores
from healing.tracking.sending import left_behind
from healing.tracking.sending.outbox import PLACE, Request
from healing.tracking.sending.requests import END, Messenger, batch, create
from healing.tracking.sending.store_errors import store_address
from healing.tracking.store import MlflowStore

LEFT = "f" * 32
POINTS = 6


def left(output: pathlib.Path) -> pathlib.Path:
    """A finished run that a dead process could not send."""
    given = [
        create(LEFT, {"name": "llm-healing"}, "left", {"fingerprint": "f-left"}, 1_000),
        *(batch(LEFT, "m", metrics=[Metric("loss", 1.0, n, n)]) for n in range(POINTS)),
        Request(LEFT, END, {"status": "FINISHED", "time": 5_000}),
    ]
    folder = output / PLACE / "1"
    folder.mkdir(parents=True)
    lines = [json.dumps([r.run, r.kind, r.content]) for r in given]
    (folder / "requests.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "about.json").write_text(json.dumps({"process": "", "store": store_address()}))
    return folder


def for_the_left_run(monkeypatch: pytest.MonkeyPatch, first: Callable[[], object]) -> None:
    """Do something before each request of it."""
    carry_out = Messenger.__call__

    def slowed(self, request, file, *, again) -> None:
        if request.run == LEFT:
            first()
        carry_out(self, request, file, again=again)

    monkeypatch.setattr(Messenger, "__call__", slowed)


def test_a_computation_begins_beside_it_and_a_lookup_waits(store, monkeypatch) -> None:
    monkeypatch.setattr(stores, "BLOCKING_SECONDS", 0.5)
    folder, said = left(store / "out"), list[str]()
    for_the_left_run(monkeypatch, lambda: time.sleep(0.4))
    kept, began = MlflowStore(), time.monotonic()
    with kept.start("r", {"stage": "heal"}, store / "out", said.append) as run:
        assert kept.close_left_running(run.experiment_id) == []
        assert kept.find_finished(run.experiment_id, "another") is None
        assert time.monotonic() - began < 0.4 * POINTS, "nobody waited"
        assert folder.exists()
        found = kept.find_finished(run.experiment_id, "f-left")
    assert found is not None
    assert (found.status, found.metrics["loss"]) == ("FINISHED", 1.0)
    assert not folder.parent.exists()
    assert [text for text in said if "sent 8 request(s) of an earlier process" in text]


def test_a_summary_has_all_of_it(store, monkeypatch) -> None:
    monkeypatch.setattr(stores, "BLOCKING_SECONDS", 0.1)
    left(store / "out")
    for_the_left_run(monkeypatch, lambda: time.sleep(0.2))
    kept = MlflowStore()
    with kept.start("r", {"stage": "summarize"}, store / "out") as run:
        kept.catch_up()
        found = MlflowClient().search_runs([run.experiment_id], "tags.fingerprint = 'f-left'")
        assert [r.info.status for r in found] == ["FINISHED"]


def test_a_store_that_hangs_for_it_holds_neither_begin_nor_end_up(store, monkeypatch) -> None:
    for module, name in (
        (stores, "BLOCKING_SECONDS"),
        (left_behind, "ENDING_SECONDS"),
        (left_behind, "GOES_ON_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.5)
    folder, goes_on = left(store / "out"), threading.Event()
    for_the_left_run(monkeypatch, lambda: goes_on.wait(60))
    kept, began = MlflowStore(), time.monotonic()
    with kept.start("r", {"stage": "heal"}, store / "out") as run:
        assert kept.find_finished(run.experiment_id, "f-left") is None
    assert time.monotonic() - began < 10.0, "0.5 s each, and the run itself"
    assert (folder / "requests.jsonl").exists()
    goes_on.set()
    (thread,) = [t for t in threading.enumerate() if t.name == "what was left"]
    thread.join(30)
    assert folder.exists(), "the command had ended: what was under way was the last"
    again: list[str] = []
    with MlflowStore().start("r", {"stage": "heal"}, store / "out", again.append):
        pass
    assert again == [f"sent {POINTS + 1} request(s) of an earlier process (run {made()})"]
    assert not folder.parent.exists()


def made() -> str:
    client = MlflowClient()
    found = client.search_runs([e.experiment_id for e in client.search_experiments()])
    (run,) = [r for r in found if r.data.tags.get("fingerprint") == "f-left"]
    return str(run.info.run_id)
