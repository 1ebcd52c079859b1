"""Which process a run belongs to, and whether it is still there: against processes of its own."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import replace

import filelock
import mlflow
import psutil
import pytest
from mlflow.tracking import MlflowClient

from healing.tracking import open_runs
from healing.tracking.processes import Process, this_process
from healing.tracking.sending import left_running, requests
from tests.conftest import ROOT

ASKING = (
    "from healing.tracking.processes import this_process; print(this_process().text(), flush=True);"
    " input()"
)
linux = pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="no /proc")


@pytest.fixture
def other() -> Iterator[tuple[subprocess.Popen[str], Process]]:
    """A process that runs, and what it says of itself."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", ASKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    said = Process.read(process.stdout.readline())
    assert said is not None
    assert said.pid == process.pid
    yield process, said
    process.kill()
    process.wait()


def test_a_process_is_here_until_it_ends(other):
    process, said = other
    assert (said.is_here, said.is_gone) == (True, False)
    process.kill()
    while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
        pass
    assert (said.is_here, said.is_gone) == (False, True), "ended, nobody has asked how yet"
    process.wait()
    assert (said.is_here, said.is_gone) == (False, True)


@linux
@pytest.mark.parametrize("seconds", [-86_400.0, -30.0, 30.0, 3_600.0])
def test_a_clock_that_was_set_ends_no_process(other, seconds):
    """What the process wrote by the clock before it was set, both moments moved alike."""
    _process, said = other
    before = replace(said, boot=said.boot + seconds, started=said.started + seconds)
    assert (before.is_here, before.is_gone) == (True, False)


@linux
def test_ticks_and_boot_are_the_kernels(other):
    """By ``ps``, which counts the seconds that a process has been there, and the machine's age."""
    process, said = other
    age = subprocess.run(
        ["ps", "-o", "etimes=", "-p", str(process.pid)], capture_output=True, text=True, check=False
    )
    if age.returncode:
        pytest.skip("no ps")
    up = float(pathlib.Path("/proc/uptime").read_text().split()[0])
    by_ticks = up - said.start_ticks / os.sysconf("SC_CLK_TCK")
    assert abs(by_ticks - float(age.stdout)) < 3
    assert said.boot_id == this_process().boot_id == str(uuid.UUID(said.boot_id))


def test_another_process_of_the_same_number_is_not_it(other):
    _process, said = other
    assert replace(said, start_ticks=said.start_ticks - 1, started=said.started - 9).is_gone


@linux
def test_a_process_of_before_the_machine_was_started_anew_is_gone(other):
    _process, said = other
    assert replace(said, boot_id=str(uuid.uuid4())).is_gone


def test_of_other_machines_and_number_spaces_nothing_is_known(other):
    _process, said = other
    elsewhere = replace(said, host="another", pid=999_999_999)
    inside = replace(said, space="pid:[1]", pid=999_999_999)
    for unknown in (elsewhere, inside):
        assert (unknown.is_here, unknown.is_gone) == (False, False)


@pytest.mark.parametrize("pid", [-5, 0, -(2**70), 2**70, 2**31])
def test_a_number_that_no_process_has_is_nobodys_who_is_here(pid):
    owner = Process.read(replace(this_process(), pid=pid).text())
    assert owner is not None
    assert not owner.is_here


def test_records_without_boot_and_ticks_are_told_by_the_clock(other):
    """As versions before these fields wrote them."""
    _process, said = other
    found = json.loads(said.text())
    del found["boot_id"], found["start_ticks"]
    old = Process.read(json.dumps(found))
    assert old is not None
    assert old.is_here
    assert replace(old, started=old.started - 5).is_gone
    assert replace(old, space="pid:[1]", boot=old.boot - 600).is_gone
    assert not replace(old, space="pid:[1]").is_gone


@pytest.mark.parametrize(
    ("changes", "closed"),
    [({"host": "node7"}, True), ({"space": "pid:[1]"}, True), ({}, False)],
    ids=["another machine", "another container", "here and alive"],
)
def test_the_runs_of_who_left_a_state_are_closed_by_who_goes_on(store, other, changes, closed):
    client = MlflowClient()
    owner = replace(other[1], **changes).text()
    with open_runs.start("going on", {"stage": "t"}) as own:
        left, parent, unrelated = (
            client.create_run(own.experiment_id, tags={"process": text}).info.run_id
            for text in (owner, owner, replace(other[1], pid=1, host="node8").text())
        )
        lines = left_running.close_gone_on_with(left, own.run_id)
        status = {i: client.get_run(i).info.status for i in (left, parent, unrelated, own.run_id)}
        assert left_running.close_gone_on_with(left, own.run_id) == [], "nothing is left to do"
    ended = "KILLED" if closed else "RUNNING"
    assert list(status.values()) == [ended, ended, "RUNNING", "RUNNING"]
    assert len(lines) == (2 if closed else 0)
    if closed:
        why = client.get_run(left).data.tags["failure"]
        assert f"ended without ending it, run {own.run_id} goes on" in why
        assert changes.get("host", "") in why
    assert left_running.close_gone_on_with("0" * 32, "x") == []


def test_a_lock_of_another_user_holds_nobody_up(monkeypatch, tmp_path):
    """Who opened the same database before may be somebody else, with the lock's file of theirs."""
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: f"sqlite:///{tmp_path}/m.db")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with requests._one_at_a_time():
        (lock,) = tmp_path.iterdir()
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(lock, timeout=0).acquire()
    filelock.FileLock(lock, timeout=0).acquire().lock.release()

    def not_mine(*_, **__):
        raise PermissionError(13, "Permission denied", str(lock))

    monkeypatch.setattr(filelock.FileLock, "acquire", not_mine)
    with requests._one_at_a_time():
        pass
