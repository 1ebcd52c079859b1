"""Which process a run or a folder belongs to, and whether it is still there."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import filelock
import psutil

SAME_START = 1.0
"""Seconds within which two times of a process' start are the same."""
POLL_SECONDS = 1.0
"""Between two looks at a folder that another process has."""


@dataclass(frozen=True)
class Process:
    """A process on some machine.

    Attributes:
        host: Name of the machine.
        boot: When it was started, seconds since the epoch.
        space: Where its process numbers count (containers have their own).
        pid: Number of the process.
        started: When it was started, seconds since the epoch.
    """

    host: str
    boot: float
    space: str
    pid: int
    started: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def text(self) -> str:
        """For a tag; :meth:`read` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, text: str) -> Process | None:
        """``None`` where the text is no process."""
        try:
            found = json.loads(text)
            kinds = {name: type(getattr(this_process(), name)) for name in found}
            return cls(**{name: kinds[name](value) for name, value in found.items()})
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError, OverflowError):
            return None

    @property
    def is_gone(self) -> bool:
        """Whether it is sure to have ended: nothing is known of another machine's."""
        here = this_process()
        if self.host != here.host:
            return False
        if abs(self.boot - here.boot) > 60.0:  # clocks are set
            return True
        if self.space != here.space:
            return False
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) > SAME_START
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


@functools.cache
def _of(pid: int) -> Process:
    own = psutil.Process(pid)
    return Process(socket.gethostname(), psutil.boot_time(), _space(), pid, own.create_time())


def this_process() -> Process:
    """The one that asks."""
    return _of(os.getpid())


def owner_of(folder: pathlib.Path) -> Process | None:
    """Who has a run's folder, or had it last."""
    try:
        return Process.read(_owner_file(folder).read_text()[:10_000])
    except (OSError, UnicodeDecodeError):
        return None


def _owner_file(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent / f".{folder.name}.owner"


@contextlib.contextmanager
def only_owner(folder: pathlib.Path, waiting: Callable[[str], None]) -> Iterator[None]:
    """Have a run's folder alone for the block: other processes, and other threads, wait.

    The lock is the system's: it ends with the process that has it, however that ends.

    Args:
        folder: Need not be there; the lock lies beside it, since a run may empty it.
        waiting: Told about every second whom it is waited for; may raise.

    Raises:
        OSError: The lock cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder.parent / f".{folder.name}.lock", thread_local=False)
    while True:
        try:
            lock.acquire(timeout=0)
            break
        except filelock.Timeout:
            with contextlib.suppress(filelock.Timeout):
                owner = owner_of(folder)
                waiting(f"waiting for {owner or 'another run'}, which has this run's folder")
                lock.acquire(timeout=POLL_SECONDS)
                break
    try:
        _owner_file(folder).write_text(this_process().text())
        yield
    finally:
        _owner_file(folder).unlink(missing_ok=True)
        lock.release()
