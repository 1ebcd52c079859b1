"""What a command and its workers on other machines share through the store."""

from __future__ import annotations

import pathlib

import pytest
import torch
from mlflow.tracking import MlflowClient

from healing.errors import TrackingError
from healing.tracking.open_runs import Above
from healing.tracking.output_folder import downloads_in
from healing.tracking.queries import PARENT, download
from healing.tracking.sending import kept_states
from healing.tracking.sending.kept_states import STATE, STEP, StoredSnapshots
from healing.tracking.sending.workers import (
    CHAIN,
    TASK,
    close_orphans,
    close_runs_below,
    close_runs_of_chain,
    finished_views,
    settings_of_store,
)
from healing.tracking.snapshots import FileSnapshots, Kept
from healing.tracking.store import MlflowStore


def say(text: str) -> None:
    """Nobody listens."""


def test_a_worker_makes_children_of_a_run_that_another_process_has(store):
    own = MlflowStore()
    with own.start("sweep", {"stage": "main"}, store / "output") as run:
        above = Above.of(run)
        assert above is not None
        worker = MlflowStore(tags={TASK: "t1"})
        with worker.below(above, store / "worker", say) as parent:
            worker.tags["try"] = "2"
            with worker.child(parent, "heal", {"stage": "heal", "fingerprint": "f1"}) as child:
                child.metrics({"loss": 2.0}, 3)
        client = MlflowClient()
        assert client.get_run(run.run_id).info.status == "RUNNING"
        found = client.get_run(child.run_id)
        assert found.info.status == "FINISHED"
        assert found.data.tags["mlflow.parentRunId"] == run.run_id
        assert (found.data.tags[TASK], found.data.tags["try"]) == ("t1", "2")
        assert found.data.metrics == {"loss": 2.0}
        assert not (store / "worker/.outbox").exists()
        views = finished_views(above.experiment_id)
        assert {name: view.run_id for name, view in views.items()} == {"f1": child.run_id}
    assert client.get_run(run.run_id).info.status == "FINISHED"


def test_finished_runs_that_were_handed_over_are_not_looked_for(store, monkeypatch):
    own = MlflowStore()
    with own.start("sweep", {"stage": "main"}) as run:
        with own.child(run, "heal", {"stage": "heal", "fingerprint": "f1"}) as child:
            pass
        worker = MlflowStore(finished=finished_views(run.experiment_id))
        asked: list[str] = []
        monkeypatch.setattr(
            "healing.tracking.queries.find_finished", lambda _, name, *__: asked.append(name)
        )
        monkeypatch.setattr("healing.tracking.queries.get_run", pytest.fail)
        found = worker.find_finished(run.experiment_id, "f1")
        assert found is not None
        assert found.run_id == child.run_id
        assert asked == []
        assert worker.find_finished(run.experiment_id, "f2") is None
        assert worker.find_finished(run.experiment_id, "f1", below=["another"]) is None
        assert asked == ["f2", "f1"]


def left_running(parent: str, task: str) -> str:
    client = MlflowClient()
    experiment = client.get_run(parent).info.experiment_id
    tags = {PARENT: parent, TASK: task, CHAIN: task[1:]} if task else {PARENT: parent}
    return str(client.create_run(experiment, tags=tags).info.run_id)


def test_runs_of_dead_workers_are_ended(store):
    own, client = MlflowStore(), MlflowClient()
    with own.start("before", {"stage": "main"}) as before:
        pass
    with own.start("sweep", {"stage": "main"}) as run:
        first, second = (left_running(run.run_id, task) for task in ("t1", "t2"))
        orphan, threads = left_running(before.run_id, "t3"), left_running(before.run_id, "")

        def running() -> set[str]:
            every = (first, second, orphan, threads)
            return {r for r in every if client.get_run(r).info.status == "RUNNING"}

        assert close_runs_of_chain(run.experiment_id, run.run_id, 1, "its worker died") == 1
        assert running() == {second, orphan, threads}
        ended = client.get_run(first)
        assert (ended.info.status, ended.data.tags["failure"]) == ("KILLED", "its worker died")
        assert close_orphans(run.experiment_id) == 1
        assert running() == {second, threads}
        assert close_runs_below(run.experiment_id, run.run_id, "over") == 1
        assert running() == {threads}


def test_a_worker_reaches_the_store_from_another_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_RUN_ID", "own")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr("mlflow.get_tracking_uri", lambda: "sqlite:///runs.db")
    found = settings_of_store()
    assert found["MLFLOW_TRACKING_URI"] == f"sqlite:///{tmp_path}/runs.db"
    assert found["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "5"
    assert "MLFLOW_RUN_ID" not in found


def kept(run_id: str, step: int) -> Kept:
    return Kept("f1", {"weights": torch.full((4,), float(step))}, [], run_id, step)


@pytest.fixture
def cut(store: pathlib.Path) -> str:
    """A run that is under way on some machine."""
    with MlflowStore().start("heal", {"stage": "heal", "fingerprint": "f1"}) as run:
        pass
    MlflowClient().update_run(run.run_id, status="RUNNING")
    return run.run_id


def snapshots(run_id: str) -> StoredSnapshots:
    return StoredSnapshots(FileSnapshots([]), MlflowClient().get_run(run_id).info.experiment_id)


def names(run_id: str) -> list[str]:
    return [file.path for file in MlflowClient().list_artifacts(run_id, "state")]


def test_a_state_is_gone_on_from_on_another_machine(store, cut):
    here, there = store / "one/raw/run", store / "two/raw/run"
    states = snapshots(cut)
    for step in (2, 4):
        states.save(here, kept(cut, step))
    states.close(60.0)
    assert len(names(cut)) == 1, "of each run the newest alone"
    assert MlflowClient().get_run(cut).data.tags[STEP] == "4"
    other = snapshots(cut)
    found = other.load(there, "f1")
    assert found is not None
    assert (found.step, found.run_id, found.state["weights"].tolist()) == (4, cut, [4.0] * 4)
    assert other.load(store / "three/run", "f2") is None
    other.save(there, kept(cut, 6))
    assert other.load(there, "f1").step == 6, "one that is further is not replaced"
    other.drop(there)
    assert names(cut) == []
    assert MlflowClient().get_run(cut).data.tags[STATE] == ""
    assert snapshots(cut).load(store / "four/run", "f1") is None
    assert not FileSnapshots.place(there).exists()


def test_states_of_the_run_that_was_cut_go_when_the_next_is_over(store, cut):
    """It went on from this machine's disk; the store had the same state."""
    folder = store / "one/raw/run"
    states = snapshots(cut)
    states.save(folder, kept(cut, 2))
    states.close(60.0)
    again = snapshots(cut)
    assert again.load(folder, "f1").step == 2
    again.drop(folder)
    assert names(cut) == []


def test_the_states_of_every_run_that_was_cut_go_when_the_cell_is_over(store, cut):
    """A is killed, B goes on from it and is killed, C finishes. Another machine's, that is under
    way, keeps its own.
    """
    with MlflowStore().start("heal", {"stage": "heal", "fingerprint": "f1"}) as second:
        pass
    with MlflowStore().start("heal", {"stage": "heal", "fingerprint": "f1"}) as running:
        pass
    client = MlflowClient()
    for run_id, step in ((cut, 2), (running.run_id, 3), (second.run_id, 4)):
        states = snapshots(cut)
        states.save(store / run_id / "run", kept(run_id, step))
        states.close(60.0)
        client.update_run(run_id, status="RUNNING" if step == 3 else "KILLED")
    third = snapshots(cut)
    assert third.load(store / "three/run", "f1").step == 4
    third.drop(store / "three/run")
    assert names(cut) == names(second.run_id) == []
    assert len(names(running.run_id)) == 1


def test_what_a_worker_fetches_is_gone_with_its_chain_and_with_the_next_of_one_that_was_killed(
    store, cut
):
    folder, state = store / "worker/.downloads", store / "file"
    state.write_text("weights")
    MlflowClient().log_artifact(cut, str(state))
    (folder / "of a worker that was killed").mkdir(parents=True)
    copied = []
    with downloads_in(folder):
        assert list(folder.iterdir()) == []
        root = pathlib.Path(download(f"runs:/{cut}/file"))
        assert root.read_text() == "weights"
        copied = list(folder.iterdir())
    assert len(copied) == 1
    assert not folder.exists()


def test_a_stored_state_that_was_changed_is_not_gone_on_from(store, cut):
    states = snapshots(cut)
    states.save(store / "one/run", kept(cut, 2))
    states.close(60.0)
    (stored,) = pathlib.Path(store / "mlruns").rglob("state/*.pt")
    content = bytearray(stored.read_bytes())
    content[len(content) // 2] ^= 1
    stored.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged and is not gone on from"):
        assert snapshots(cut).load(store / "two/run", "f1") is None
    MlflowClient().set_tag(cut, STATE, "../../secret.pt")
    assert snapshots(cut).load(store / "three/run", "f1") is None


def test_a_state_of_this_disk_stays_until_the_stored_one_is_known_to_be_whole(store, cut):
    """It has fewer steps, though more states were written here before it."""
    here, own = store / "one/run", FileSnapshots([])
    for step in (1, 2, 3):
        own.save(here, kept(cut, step))
    there = snapshots(cut)
    there.save(store / "two/run", kept(cut, 4))
    there.close(60.0)
    assert snapshots(cut).load(here, "f1").step == 4
    (stored,) = pathlib.Path(store / "mlruns").rglob("state/*.pt")
    stored.write_bytes(stored.read_bytes()[:-1])
    for step in (2, 3):
        own.save(store / "three/run", kept(cut, step))
    with pytest.warns(UserWarning, match="is damaged and is not gone on from"):
        assert snapshots(cut).load(store / "three/run", "f1").step == 3


def test_what_is_no_folder_of_states_is_no_place_for_a_stored_one(store, cut):
    states = snapshots(cut)
    states.save(store / "one/run", kept(cut, 2))
    states.close(60.0)
    elsewhere = store / "elsewhere"
    elsewhere.mkdir()
    place = FileSnapshots.place(store / "two/run")
    place.parent.mkdir()
    place.symlink_to(elsewhere)
    said: list[str] = []
    experiment = MlflowClient().get_run(cut).info.experiment_id
    assert StoredSnapshots(FileSnapshots([]), experiment, said.append).load(
        store / "two/run", "f1"
    ) is None  # fmt: skip
    assert [text.partition(":")[0] for text in said] == ["warning"]
    assert list(elsewhere.iterdir()) == []


def test_a_store_that_takes_no_state_costs_no_run(store, cut, monkeypatch):
    def refused(*arguments: object) -> None:
        raise TrackingError("no room")

    said: list[str] = []
    monkeypatch.setattr(kept_states, "_store", refused)
    states = StoredSnapshots(FileSnapshots([]), "0", said.append)
    for step in (2, 4):
        states.save(store / "one/run", kept(cut, step))
    states.close(60.0)
    assert said == ["warning: a state is kept on this machine alone: no room"]
    assert states.load(store / "one/run", "f1").step == 4
