"""Runs of other machines: which are under way, and which were left. What another machine's process
does to the store is done here by MLflow's own client.
"""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from healing.progress import Stop, Stopped
from healing.stages.driver import Driver
from healing.stages.terminal.console import Console
from healing.tracking import open_runs
from healing.tracking.processes import this_process
from healing.tracking.queries import get_run
from healing.tracking.sending import heartbeat, left_running
from healing.tracking.sending.heartbeat import HEARTBEAT, Heart
from healing.tracking.sending.kept_states import StoredSnapshots
from healing.tracking.sending.left_running import LeftRunning, Listener
from healing.tracking.snapshots import FileSnapshots, Kept
from healing.tracking.store import MlflowStore
from tests.stages.test_driver import Config, Toy

ELSEWHERE = replace(this_process(), host="node7").text()


def at(seconds: float) -> str:
    """A heartbeat of so long ago."""
    when = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    return when.isoformat(timespec="seconds")


def left(experiment_id: str, beat: str, **tags: str) -> str:
    """A run that is under way on another machine, or was."""
    own = {"process": ELSEWHERE, "fingerprint": "f6"} | ({HEARTBEAT: beat} if beat else {})
    return str(MlflowClient().create_run(experiment_id, tags={**own, **tags}).info.run_id)


def status(run_id: str) -> str:
    return str(MlflowClient().get_run(run_id).info.status)


@pytest.fixture
def experiment(store) -> str:
    return str(MlflowClient().create_experiment("e"))


def test_a_process_says_that_its_runs_are_under_way(store, monkeypatch):
    times = iter(range(10**6))
    monkeypatch.setattr(open_runs, "_HEART", Heart(0.05))
    monkeypatch.setattr(heartbeat, "beat", lambda: {HEARTBEAT: f"beat {next(times)}"})
    client, own = MlflowClient(), MlflowStore()

    def beats(run: Any) -> str:
        return str(client.get_run(run.run_id).data.tags[HEARTBEAT])

    def renewed(*runs: Any) -> None:
        before, end = {run.run_id: beats(run) for run in runs}, time.monotonic() + 30
        while any(beats(run) == before[run.run_id] for run in runs):
            assert time.monotonic() < end
            time.sleep(0.05)

    with own.start("parent", {"stage": "main"}) as parent:
        with own.child(parent, "child", {"stage": "heal"}) as child:
            renewed(parent, child)
        after = beats(child)
        renewed(parent)
        assert beats(child) == after, "one that is over has none"
    after = beats(parent)
    time.sleep(0.3)
    assert beats(parent) == after
    assert not [t for t in threading.enumerate() if t.name == "heartbeat" and t.is_alive()]


def test_a_run_is_made_with_a_heartbeat_that_is_now_in_utc(store):
    with MlflowStore().start("r", {"stage": "heal"}) as run:
        said = MlflowClient().get_run(run.run_id).data.tags[HEARTBEAT]
    assert abs(datetime.datetime.fromisoformat(said).timestamp() - time.time()) < 60


@pytest.mark.parametrize("skew", [-14 * 3600, 0, 14 * 3600], ids=["behind", "same", "ahead"])
def test_a_run_of_another_machine_is_left_once_its_heartbeat_stays(experiment, skew):
    """Whatever the clocks say."""
    clock = iter([0.0, 60.0, 89.0, *range(100, 1000, 20)])
    listener = Listener(lambda: float(next(clock)))
    run_id = left(experiment, at(-skew))
    assert listener.is_under_way(get_run(run_id)), "at first nothing is known"
    assert listener.is_under_way(get_run(run_id))
    assert listener.is_under_way(get_run(run_id))
    MlflowClient().set_tag(run_id, HEARTBEAT, at(-skew - 30))
    assert listener.is_under_way(get_run(run_id)), "it is heard of at 100 s"
    heard = [listener.is_under_way(get_run(run_id)) for _ in range(12)]
    assert heard == [True] * 8 + [False] * 4, "180 s later it is given up"


def test_the_time_that_a_store_was_away_is_nobodys_silence(experiment):
    clock = iter([0.0, 10_000.0, 20_000.0, 20_030.0])
    listener = Listener(lambda: next(clock))
    run_id = left(experiment, at(0))
    assert [listener.is_under_way(get_run(run_id)) for _ in range(4)] == [True] * 4


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({HEARTBEAT: at(90_000)}, False),
        ({HEARTBEAT: "soon"}, False),
        ({HEARTBEAT: at(80_000)}, True),
        ({"process": "{}", HEARTBEAT: at(0)}, True),  # whose it is does not matter
        ({"process": this_process().text()}, False),  # nobody else's
        ({"process": replace(this_process(), start_ticks=1).text(), HEARTBEAT: at(0)}, False),
    ],
    ids=["over a day", "no time", "under a day", "nobody's", "own", "gone from here"],
)
def test_what_one_look_says(experiment, tags, expected):
    assert Listener().is_under_way(get_run(left(experiment, "", **tags))) == expected


def test_a_run_that_is_over_or_older_than_heartbeats_is_not_under_way(experiment):
    over, old = left(experiment, at(0)), left(experiment, "")
    MlflowClient().set_terminated(over, "KILLED")
    assert not Listener().is_under_way(get_run(over))
    assert not Listener().is_under_way(get_run(old))
    assert Listener().find(experiment, "f6") is None


def test_left_runs_of_other_machines_are_ended_once_they_are_silent(experiment):
    client, said, now = MlflowClient(), list[str](), [0.0]
    silent, alive, old = left(experiment, at(0)), left(experiment, at(0)), left(experiment, "")
    long_ago, made = left(experiment, at(10**6)), client.create_run(experiment).info.run_id
    closing = LeftRunning(experiment, Listener(lambda: now[0]), said.append, seconds=3600)
    (line,) = closing.close()
    assert (long_ago in line, status(long_ago)) == (True, "KILLED")
    for _ in range(7):
        now[0] += 30
        client.set_tag(alive, HEARTBEAT, at(-now[0]))
        closing.look()
    closing.end()
    (line,) = said
    assert silent in line
    assert "process" in line
    assert "node7" in line
    assert [status(i) for i in (silent, alive, old, made)] == ["KILLED", *["RUNNING"] * 3]
    assert client.get_run(silent).data.tags["failure"].startswith("nothing is heard of process")


def test_it_goes_on_beside_a_command_and_ends_with_it(store, monkeypatch):
    monkeypatch.setattr(left_running, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(LeftRunning.__init__, "__defaults__", (0.05,))
    said = list[str]()
    own = MlflowStore()
    with own.start("command", {"stage": "main"}) as run:
        silent = left(run.experiment_id, at(0))
        assert own.close_left_running(run.experiment_id, said.append) == []
        end = time.monotonic() + 30
        while not said:
            assert time.monotonic() < end
            time.sleep(0.05)
        assert status(silent) == "KILLED"
        other = left(run.experiment_id, at(0))
        monkeypatch.setattr(left_running, "SILENT_SECONDS", 1e9)
        own.close_left_running(run.experiment_id, said.append)
    time.sleep(0.2)
    assert status(other) == "RUNNING"
    assert not [t for t in threading.enumerate() if t.name == "ends left runs" and t.is_alive()]


def driver(own: MlflowStore, **changes: Any) -> Driver:
    return Driver(Console("quiet"), own, **changes)


def test_a_cell_that_another_machine_computes_is_waited_for(store, monkeypatch):
    monkeypatch.setattr("healing.stages.driver.OTHERS_SECONDS", 0.05)
    own, late, client = MlflowStore(), Toy(), MlflowClient()
    with driver(own).process("late", {"stage": "toy"}) as parent:
        other = left(parent.experiment_id, at(0))
        looks = iter(range(10))
        found = Listener.find

        def looking(listener, experiment_id, fingerprint):
            assert fingerprint == "f6"
            if next(looks) == 3:
                client.set_terminated(other, "FINISHED")
            return found(listener, experiment_id, fingerprint)

        monkeypatch.setattr(Listener, "find", looking)
        done = driver(own).run_cell(late, Config(str(store)), parent=parent, reuse=True)
    assert next(looks) == 4
    assert late.computed == []
    assert (done.run_id, done.reused) == (other, True)


def test_a_repetition_that_is_wanted_waits_for_nobody(store, monkeypatch):
    monkeypatch.setattr(Listener, "find", pytest.fail)
    own, again = MlflowStore(), Toy()
    with driver(own).process("again", {"stage": "toy"}) as parent:
        left(parent.experiment_id, at(0))
        driver(own).run_cell(again, Config(str(store)), parent=parent)
    assert again.computed == [1, 2, 3, 4, 5, 6]


def test_who_waits_for_another_machine_can_be_stopped(store, monkeypatch):
    monkeypatch.setattr("healing.stages.driver.OTHERS_SECONDS", 0.05)
    own, stop = MlflowStore(), Stop()
    threading.Timer(0.5, stop.set).start()
    d = driver(own, stop=stop)
    with pytest.raises(Stopped), d.process("late", {"stage": "t"}) as parent:  # noqa: PT012
        left(parent.experiment_id, at(0))
        d.run_cell(Toy(), Config(str(store)), parent=parent, reuse=True)


def test_a_state_is_taken_of_a_run_that_was_left_alone(store, experiment):
    other, clock = left(experiment, at(0)), iter([0.0, *range(29, 1000, 29)])
    theirs = StoredSnapshots(FileSnapshots([]), experiment)
    theirs.save(store / "one/run", Kept("f6", {"w": torch.ones(2)}, [], other, 4))
    theirs.close(60.0)
    listener = Listener(lambda: float(next(clock)))
    ours = StoredSnapshots(FileSnapshots([]), experiment, pytest.fail, listener.is_under_way)
    loaded = [ours.load(store / "two/run", "f6") for _ in range(7)]
    assert loaded == [None] * 7
    found = ours.load(store / "two/run", "f6")
    assert found is not None
    assert (found.run_id, found.step, status(other)) == (other, 4, "RUNNING")
