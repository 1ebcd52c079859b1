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

from healing.tracking.run_files import read_small, write_new

SAME_START = 1.0
"""Seconds within which two times of a process' start are the same, where a clock tells them."""
SAME_BOOT = 60.0
"""The same of a machine's start."""
POLL_SECONDS = 1.0
"""Between two looks at a folder that another process has."""


@dataclass(frozen=True)
class Process:
    """A process on some machine.

    Attributes:
        host: Name of the machine.
        boot: When it was started, seconds since the epoch by the clock of the moment.
        space: Where its process numbers count (containers have their own).
        pid: Number of the process.
        started: When it was started, seconds since the epoch by the clock of the moment.
        boot_id: The kernel's name for the time since the machine was started; empty where it has
            none, or of records that are older than this field.
        start_ticks: When the process was started, clock ticks since the machine was; 0 likewise.
    """

    host: str
    boot: float
    space: str
    pid: int
    started: float
    boot_id: str = ""
    start_ticks: int = 0

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
        return self._runs() is False

    @property
    def is_here(self) -> bool:
        """Whether it is sure to run on this machine."""
        return self._runs() is True

    def _runs(self) -> bool | None:
        """Whether it still runs; ``None`` where that cannot be told from here.

        Where the kernel counts ticks since its start, no clock is asked: one that is set moves all
        times of all processes.
        """
        here = this_process()
        if self.host != here.host:
            return None
        if self.boot_id and here.boot_id and self.boot_id != here.boot_id:
            return False
        if self.space != here.space:
            by_clock = not self.boot_id and abs(self.boot - here.boot) > SAME_BOOT
            return False if by_clock else None
        if self.pid <= 0:
            return None  # no process at all: a record that somebody made up
        try:
            if psutil.Process(self.pid).status() == psutil.STATUS_ZOMBIE:
                return False  # ended; nobody asked how
            found = _described(self.pid)
        except psutil.NoSuchProcess:
            return False
        except psutil.Error:
            return None
        if self.start_ticks and found.start_ticks:
            return self.start_ticks == found.start_ticks
        return abs(found.started - self.started) <= SAME_START


def _space() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _boot_id() -> str:
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _start_ticks(pid: int) -> int:
    """Field 22 of ``/proc/PID/stat`` (proc(5)); 0 where there is none."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[19])  # the name may hold anything
    except (OSError, ValueError, IndexError):
        return 0


def _described(pid: int) -> Process:
    """A process of this machine.

    Raises:
        psutil.Error: It is not there, or nothing may be known of it.
    """
    started, ticks = psutil.Process(pid).create_time(), _start_ticks(pid)
    host, boot = socket.gethostname(), psutil.boot_time()
    return Process(host, boot, _space(), pid, started, _boot_id(), ticks)


_of = functools.cache(_described)


def this_process() -> Process:
    """The one that asks."""
    return _of(os.getpid())


def owner_of(folder: pathlib.Path) -> Process | None:
    """Who has a run's folder, or had it last."""
    try:
        return Process.read(read_small(_owner_file(folder)))
    except (OSError, UnicodeDecodeError):
        return None


def _owner_file(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent / f".{folder.name}.owner"


def _lock(folder: pathlib.Path) -> filelock.BaseFileLock:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder.parent / f".{folder.name}.lock", thread_local=False)


@contextlib.contextmanager
def owned_if_free(folder: pathlib.Path) -> Iterator[bool]:
    """Have a run's folder alone for the block, if nobody has it: says so, and waits for nobody."""
    lock = _lock(folder)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


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
    lock = _lock(folder)
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
        write_new(_owner_file(folder), this_process().text())
        yield
    finally:
        _owner_file(folder).unlink(missing_ok=True)
        lock.release()
