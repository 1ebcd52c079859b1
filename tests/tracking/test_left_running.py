"""Runs of other machines: which are under way, and which were left. What another machine's process
does to the store is done here by MLflow's own client.
"""

from __future__ import annotations

import datetime
import threading
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
from mlflow.tracking import MlflowClient

from healing.errors import OutageError
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


def test_a_run_that_began_while_the_store_was_away_has_a_heartbeat_once_it_is_there(experiment):
    """Under the store's id of it, which it gets later."""
    known: dict[str, str] = {}
    sender = SimpleNamespace(is_away=False, run_id=lambda own: known.get(own, own))
    run = SimpleNamespace(run_id="own", is_local=True, sender=sender)
    stored, end = left(experiment, "none yet"), time.monotonic() + 30
    with Heart(0.02).beats_for(run):
        time.sleep(0.2)
        known["own"] = stored
        while MlflowClient().get_run(stored).data.tags[HEARTBEAT] == "none yet":
            assert time.monotonic() < end
            time.sleep(0.02)


def test_no_failure_ends_the_heartbeats(experiment, monkeypatch):
    """Without them every run of the process would be taken for left."""
    failures = iter([ValueError("a defect"), RuntimeError("another")])
    run = SimpleNamespace(run_id=left(experiment, "none yet"), is_local=False)
    run.sender = SimpleNamespace(is_away=False, run_id=lambda own: own)
    set_tag = MlflowClient.set_tag

    def failing(self, *args):
        if failure := next(failures, None):
            raise failure
        set_tag(self, *args)

    monkeypatch.setattr(MlflowClient, "set_tag", failing)
    end = time.monotonic() + 30
    with Heart(0.02).beats_for(run):
        while MlflowClient().get_run(run.run_id).data.tags[HEARTBEAT] == "none yet":
            assert time.monotonic() < end
            time.sleep(0.02)


def test_a_run_that_came_to_its_own_end_meanwhile_stays_as_it_is(experiment, monkeypatch):
    """It was found RUNNING, finished, and then its process was gone."""
    gone = replace(this_process(), start_ticks=1).text()
    runs = [left(experiment, at(0), process=gone) for _ in range(2)]
    found = left_running.search

    def searched(*args):
        views = found(*args)
        MlflowClient().set_terminated(runs[1], "FINISHED")
        return views

    monkeypatch.setattr(left_running, "search", searched)
    (line,) = LeftRunning(experiment, Listener(), pytest.fail).close()
    assert runs[0] in line
    assert [status(run_id) for run_id in runs] == ["KILLED", "FINISHED"]
    assert "failure" not in MlflowClient().get_run(runs[1]).data.tags


def test_no_answer_is_no_word_of_a_run_that_was_under_way(store, monkeypatch):
    now, own, answers = [0.0], MlflowStore(), [True]
    own.listener = Listener(lambda: now[0])
    found = left_running.search

    def searched(*args):
        if not answers[0]:
            raise OutageError("away")
        return found(*args)

    monkeypatch.setattr(left_running, "search", searched)
    with own.start("sweep", {"stage": "main"}) as run:
        other = left(run.experiment_id, at(0))

        def seen(fingerprint: str = "f6") -> str:
            view = own.under_way(run.experiment_id, fingerprint)
            return view.run_id if view else ""

        answers[0] = False
        assert seen() == "", "nobody was there before"
        answers[0] = True
        assert seen() == other
        answers[0], now[0] = False, 590.0
        assert (seen(), seen("another")) == (other, "")
        now[0] = 610.0
        assert seen() == "", "ten minutes without an answer"
        answers[0] = True
        MlflowClient().set_terminated(other, "FINISHED")
        assert seen() == ""
        answers[0] = False
        assert seen() == "", "what is over is forgotten"


class Looking(FileSnapshots):
    """What others see while a state is fetched."""

    seen: list[str]

    def load(self, folder, fingerprint):
        client = MlflowClient()
        experiments = [e.experiment_id for e in client.search_experiments()]
        same = f"attributes.status = 'RUNNING' and tags.fingerprint = '{fingerprint}'"
        self.seen += [run.info.run_name for run in client.search_runs(experiments, same)]
        return super().load(folder, fingerprint)


def test_a_run_is_seen_while_its_state_is_fetched(store):
    states = Looking(())
    states.seen = []
    d = Driver(Console("quiet"), MlflowStore(), snapshots=states)
    with d.process("parent", {"stage": "main"}, str(store)) as parent:
        d.run_cell(Toy(), Config(str(store)), parent=parent, reuse=True)
    assert states.seen == ["toy 6"]


def test_a_state_that_cannot_be_removed_stays_named_and_is_told(store, experiment, monkeypatch):
    """As long as there is a file somebody can find it."""
    run_id = str(MlflowClient().create_run(experiment).info.run_id)
    said: list[str] = []
    states = StoredSnapshots(FileSnapshots([]), experiment, said.append)
    states.save(store / "one", Kept("f6", {"w": torch.ones(2)}, [], run_id, 4))
    while "kept_state" not in (tags := MlflowClient().get_run(run_id).data.tags):
        time.sleep(0.05)
    remove = LocalArtifactRepository.delete_artifacts

    def failing(self, path=None):
        raise MlflowException("no right to delete")

    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", failing)
    states.drop(store / "one")
    (line,) = said
    assert line.startswith("warning: a state that is not needed any more stays in the store: the ")
    assert MlflowClient().get_run(run_id).data.tags["kept_state"] == tags["kept_state"]
    monkeypatch.setattr(LocalArtifactRepository, "delete_artifacts", remove)
    states.save(store / "one", Kept("f6", {"w": torch.ones(2)}, [], run_id, 5))
    states.close(60.0)
    states.drop(store / "one")
    assert MlflowClient().get_run(run_id).data.tags["kept_state"] == ""
    assert MlflowClient().list_artifacts(run_id, "state") == []
    assert said == [line]


def test_a_state_goes_to_the_stores_run_of_one_that_began_while_it_was_away(store, experiment):
    run_id = str(MlflowClient().create_run(experiment).info.run_id)
    known: dict[str, str] = {}
    said: list[str] = []
    states = StoredSnapshots(
        FileSnapshots([]), experiment, said.append, id_of=lambda own: known.get(own, own)
    )
    states.save(store / "one", Kept("f6", {"w": torch.ones(2)}, [], "own", 4))
    while not said:
        time.sleep(0.05)
    assert said[0].startswith("warning: a state is kept on this machine alone: ")
    known["own"] = run_id
    states.save(store / "one", Kept("f6", {"w": torch.ones(2)}, [], "own", 5))
    states.close(60.0)
    assert MlflowClient().get_run(run_id).data.tags["kept_state_step"] == "5"
    assert len(said) == 1


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
