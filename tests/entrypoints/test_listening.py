"""How signals are heard: by processes that are inside one long call, write a state, or forked."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from entrypoints._signals import HEARD, listening
from healing.progress import Stop

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import hashlib, os, sys, time
sys.path.insert(0, {root!r})
from entrypoints._signals import listening
from healing.progress import Stop

def abandon(why):
    print("abandoned:", why, flush=True)

def one_long_call():
    # Minutes in C, without the interpreter's lock, which no signal interrupts.
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)

stop = Stop()
with listening(stop, abandon, grace={grace}):
    print("ready", flush=True)
    {body}
print("left", stop.signum, flush=True)
"""


def program(body: str, grace: float) -> subprocess.Popen[str]:
    body = "\n    ".join(body.splitlines())
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(root=str(ROOT), grace=grace, body=body)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.fixture
def ended(request):
    """A program that is ended with its test."""
    processes: list[subprocess.Popen[str]] = []

    def begin(body: str, grace: float) -> subprocess.Popen[str]:
        processes.append(program(body, grace))
        return processes[-1]

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_the_grace_runs_while_one_call_goes_on(ended, signum) -> None:
    process = ended("one_long_call()", 1.0)
    process.send_signal(signum)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 128 + signum, said
    assert f"abandoned: {signum.name}, no safe point in 1 s" in said


def test_a_second_signal_is_heard_at_once_inside_one_call(ended) -> None:
    process = ended("one_long_call()", 600.0)
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "\n"
    assert "SIGTERM: ending at the next safe point" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]  # the grace is ten minutes
    assert process.returncode == 130, said
    assert "abandoned: SIGINT, the second signal" in said


def test_a_state_that_is_being_written_is_waited_for(ended) -> None:
    process = ended(
        "with stop.saving():\n"
        "    stop.wait()\n"
        "    time.sleep(4.0)\n"  # four times the grace
        "print('written', flush=True)",
        1.0,
    )
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert said.count("the state is being written") == 1
    assert "written\nleft 15" in said
    assert "abandoned" not in said


def test_after_a_state_is_written_the_grace_counts_again(ended) -> None:
    process = ended(
        "with stop.saving():\n"
        "    stop.wait()\n"
        "    time.sleep(2.0)\n"
        "print('written', flush=True)\n"
        "one_long_call()",
        1.0,
    )
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert said.index("written\n") < said.index("abandoned: SIGTERM, no safe point")


def test_a_second_signal_ends_the_writing_of_a_state(ended) -> None:
    process = ended("with stop.saving():\n    one_long_call()", 0.5)
    process.send_signal(signal.SIGTERM)
    for line in process.stdout:
        if "the state is being written" in line:
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert "abandoned: SIGTERM, the second signal" in said


def test_a_signal_to_a_fork_is_not_the_parents(ended) -> None:
    """Ctrl-C goes to every process of a group: a loader's process must not count as a second."""
    process = ended(
        "child = os.fork()\n"
        "if child == 0:\n"
        "    time.sleep(3.0)\n"
        "    os._exit(0)\n"
        "print('forked', child, flush=True)\n"
        "os.waitpid(child, 0)\n"
        "time.sleep(1.0)",
        600.0,
    )
    child = int(process.stdout.readline().split()[1])
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 0, said
    assert "left 0" in said


def test_what_was_ignored_before_still_is() -> None:
    """``nohup`` has a program ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with listening(Stop(), lambda why: None):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_block_leaves_no_thread_and_no_handler() -> None:
    before = {s: signal.getsignal(s) for s in HEARD}
    for _ in range(3):
        with listening(Stop(), lambda why: None):
            assert any(t.name == "signals" for t in threading.enumerate())
    assert not any(t.name == "signals" for t in threading.enumerate())
    assert {s: signal.getsignal(s) for s in HEARD} == before
    assert signal.set_wakeup_fd(-1) == -1
