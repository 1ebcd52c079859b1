"""Requests to a store, on disk before they are sent: what an outage or a hard kill leaves there is
sent later, from this machine or another.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import filelock
import psutil

from healing.tracking.processes import this_process
from healing.tracking.run_files import is_plain, refuse_link

PLACE = ".outbox"
"""Folder below an output folder that holds one folder per process with something to send."""
_REQUESTS, _SENT, _LOCK, _ABOUT = "requests.jsonl", "sent", "lock", "about.json"
REFUSED = "refused.jsonl"
"""File of an outbox: which of its requests a store will not take, and why."""
_PARTIAL = f"{REFUSED}.partial"
_ALL = "all"
"""Content of the file of what was sent: nothing is left to be done but what was refused."""
_FILES, PICTURES = _FOLDERS = ("files", "pictures")
_ENTRIES = (_REQUESTS, _SENT, _LOCK, _ABOUT, REFUSED, _PARTIAL, *_FOLDERS)
"""All that an outbox may hold: a folder with anything else is somebody's, and is left alone."""

MAKING_SECONDS = 60.0
"""After which a folder without a word is one that was left."""
_NEVER_CHANGED = (".pt", ".safetensors")
"""Ends of the names of files that are written under another name first, or in a new folder."""


@dataclass(frozen=True)
class Request:
    """One thing that a store is told of a run.

    Attributes:
        run: The run's id, as the process that speaks of it calls it.
        kind: One of those that :mod:`healing.tracking.sending.requests` carries out.
        content: Of JSON's types.
    """

    run: str
    kind: str
    content: Mapping[str, Any] = field(default_factory=dict)


class Outbox:
    """The requests of one process, in one folder.

    Args:
        folder: Its own; made with the first request.
        store: Address that the requests are meant for.

    Attributes:
        refused: Number of a request that the store will not take → why.
        is_over: Whether all was sent or refused, and its runs were ended.
    """

    def __init__(self, folder: pathlib.Path, store: str = "") -> None:
        self.folder, self.store = folder, store
        self._lock = filelock.FileLock(folder / _LOCK, thread_local=False)
        self._written = self._sent = 0
        self._size: int | None = None
        self.refused: dict[int, str] = {}
        self.is_over = False

    @property
    def root(self) -> pathlib.Path:
        """The output folder that it belongs to."""
        return self.folder.parent.parent.resolve()

    @classmethod
    def of_this_process(cls, place: pathlib.Path, store: str) -> Outbox:
        """A new one below the folder of all outboxes; the names sort by time."""
        name = f"{time.time_ns():020d}-{_here()}-{os.getpid()}-{secrets.token_hex(3)}"
        return cls(place / name, store)

    def append(self, request: Request) -> int:
        """Write a request; returns its number, from 0.

        Raises:
            OSError: It cannot be written.
        """
        if self._size is None:
            self._make()
        line = json.dumps([request.run, request.kind, request.content])
        with (self.folder / _REQUESTS).open("ab") as stream:
            stream.truncate(self._size)  # without a line that was cut when the disk was full
            stream.write(line.encode() + b"\n")
            stream.flush()
            self._size = stream.tell()
        self._written += 1
        return self._written - 1

    def _make(self) -> None:
        """The folder, with its owner, who has the lock before the folder counts as an outbox. Who
        sent the last of the others may remove the folder of them all meanwhile.
        """
        refuse_link(self.folder.parent)
        for last in (False, False, True):
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self._lock.is_locked:
                    self._lock.acquire(timeout=0)
                self._about(this_process().text(), self.store)
                self._size = 0
                return
            except FileNotFoundError:
                self._lock.release()
                if last:
                    raise

    def _about(self, process: str, store: str) -> None:
        about = {"process": process, "store": store}
        (self.folder / _ABOUT).write_text(json.dumps(about))

    def keep(self, number: int, path: pathlib.Path) -> None:
        """Keep a file that a request sends as it is now, whatever becomes of it where it lies."""
        kept = self._kept(number, path)
        kept.parent.mkdir(parents=True, exist_ok=True)
        if kept.exists():
            return
        # A link to a file that is written in place would change with it.
        if path.suffix in _NEVER_CHANGED:
            with contextlib.suppress(OSError):  # another file system, or one without links
                os.link(path, kept)
                return
        partial = kept.with_name(f"{kept.name[:200]}.partial")
        try:
            shutil.copy2(path, partial)
            partial.replace(kept)
        finally:
            partial.unlink(missing_ok=True)

    def _kept(self, number: int, path: pathlib.Path) -> pathlib.Path:
        return self.folder / _FILES / f"{number:09d}" / path.name

    def kept_file(self, number: int, path: pathlib.Path) -> pathlib.Path:
        """Where a request's file is: the kept one, or where it was written."""
        kept = self._kept(number, path)
        return kept if kept.is_file() else path

    def sent(self, number: int) -> None:
        """A request arrived, and so did all before it."""
        self._sent = number + 1
        with contextlib.suppress(OSError):  # it would be sent again, which changes nothing
            (self.folder / _SENT).write_text(str(self._sent))
            if number not in self.refused:
                shutil.rmtree(self.folder / _FILES / f"{number:09d}", ignore_errors=True)

    def refuse(self, number: int, request: Request, reason: str) -> None:
        """A store will not take a request: it stays here with its file, and with the reason.

        Raises:
            OSError: That cannot be written; the request is here all the same.
        """
        self.refused[number] = reason
        said = {"number": number, "run": request.run, "kind": request.kind, "reason": reason}
        with (self.folder / REFUSED).open("a") as stream:
            stream.write("\n" + json.dumps(said))  # a line that was cut ends here

    def taken(self, number: int) -> None:
        """A store took what it had refused.

        Raises:
            OSError: That cannot be written; the store would be asked again.
        """
        del self.refused[number]
        path = self.folder / REFUSED
        lines = [line for line in path.read_text().split("\n") if _number_in(line) != number]
        partial = self.folder / _PARTIAL
        partial.write_text("\n".join(lines))
        partial.replace(path)
        shutil.rmtree(self.folder / _FILES / f"{number:09d}", ignore_errors=True)

    def meant_for(self, store: str) -> None:
        """From now on it is for another store, which was told nothing and refused nothing.

        Raises:
            OSError: That cannot be written.
        """
        (self.folder / _SENT).unlink(missing_ok=True)
        (self.folder / REFUSED).unlink(missing_ok=True)
        self._about(self.about("process"), store)
        self._sent, self.refused, self.is_over = 0, {}, False

    def close(self, *, drop: bool) -> None:
        """End. A folder in which everything was sent is dropped; what a store refused stays.

        Args:
            drop: Whether there is nothing left to send.
        """
        if drop and self.refused:
            drop = False
            with contextlib.suppress(OSError):  # what was sent is sent again
                (self.folder / _SENT).write_text(_ALL)
        if drop:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock.release()
        if drop:
            shutil.rmtree(self.folder, ignore_errors=True)  # with the lock
            with contextlib.suppress(OSError):
                self.folder.parent.rmdir()  # where it was the last

    @contextlib.contextmanager
    def opened(self) -> Iterator[bool]:
        """Have what an ended process left; whether its process is really gone."""
        try:
            self._lock.acquire(timeout=0)
        except (filelock.Timeout, OSError):
            yield False
            return
        try:
            yield True
        finally:
            self._lock.release()

    def left(self) -> tuple[list[Request], int]:
        """All requests, and how many of them were sent; a last line that was cut is left out.

        Raises:
            ValueError: A file is none of this program's.
        """
        requests: list[Request] = []
        written = self.folder / _REQUESTS
        lines = written.read_text().split("\n") if written.exists() else []
        for place, line in enumerate(lines):
            try:
                run, kind, content = json.loads(line)
                if [type(run), type(kind), type(content)] != [str, str, dict]:
                    raise TypeError("other types")
                requests.append(Request(run, kind, content))
            except (ValueError, TypeError, RecursionError) as error:
                if line and place < len(lines) - 1:
                    raise ValueError(f"{_REQUESTS}, line {place + 1} is no request") from error
        self._written = len(requests)
        try:
            sent = (self.folder / _SENT).read_text()
            self.is_over = sent == _ALL
            done = len(requests) if self.is_over else int(sent)
            self._sent = min(max(done, 0), len(requests))
        except (OSError, ValueError):
            self._sent = 0
        self.refused = self._refused_before()
        return requests, self._sent

    def _refused_before(self) -> dict[int, str]:
        path = self.folder / REFUSED
        lines = path.read_text().split("\n") if path.exists() else []
        found: dict[int, str] = {}
        for line in lines:
            number = _number_in(line)
            if 0 <= number < self._written:
                found[number] = str(json.loads(line).get("reason", ""))[:2000]
        return found

    def says(self, text: str) -> bool:
        """Whether a request has a text in it.

        Raises:
            OSError: That cannot be read.
        """
        with (self.folder / _REQUESTS).open(encoding="utf-8", errors="replace") as lines:
            return any(text in line for line in lines)

    def about(self, name: str) -> str:
        """What its process said of itself: ``process`` or ``store``; empty where unknown."""
        try:
            return str(json.loads((self.folder / _ABOUT).read_text()[:10_000])[name])
        except (OSError, ValueError, TypeError, KeyError):
            return ""

    def file_of(self, number: int, place: str) -> pathlib.Path:
        """The file that a request of an ended process sends.

        Raises:
            ValueError: It lies outside of the output folder: what a file says is not trusted.
        """
        path = (self.root / place).resolve()
        kept = self._kept(number, path)
        if kept.is_file() and kept.resolve().is_relative_to(self.folder.resolve() / _FILES):
            return kept
        if not path.is_relative_to(self.root):
            raise ValueError(f"the file {place[:200]!r} is not in {self.root}")
        return path


def refused_text(folder: pathlib.Path, why: str) -> str:
    """Of what a store will not take: where it is, what to do, and the reason for the first."""
    output = folder.parent.parent
    return (
        f"will not be taken by the store, and stay in {folder}, with each one's reason in "
        f"{REFUSED}: once the reason is gone, `python -m entrypoints.sync --refused {output}` "
        f"sends them; without need of them, remove that folder. The first: {why}"
    )


def _number_in(line: str) -> int:
    """Which request a line of :data:`REFUSED` is about; -1 = none, as of one that was cut."""
    try:
        number = json.loads(line)["number"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return -1
    return number if type(number) is int else -1


def outboxes(place: pathlib.Path) -> list[Outbox]:
    """What earlier processes left below a folder of outboxes, the oldest first. What is a link, or
    holds anything else, is none: an outbox that was sent is removed.
    """
    if place.is_symlink() or not place.is_dir():
        return []
    return [Outbox(path) for path in sorted(place.iterdir()) if _is_outbox(path)]


def _is_outbox(path: pathlib.Path) -> bool:
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        entries = list(path.iterdir())
    except FileNotFoundError:  # another process sent it meanwhile
        return False
    known = all(entry.name in _ENTRIES and not entry.is_symlink() for entry in entries)
    kinds = all(e.is_dir() if e.name in _FOLDERS else is_plain(e) for e in entries)
    begun = {entry.name for entry in entries} & {_ABOUT, _REQUESTS}
    return known and kinds and (bool(begun) or not _is_being_made(path))


def _is_being_made(path: pathlib.Path) -> bool:
    """Whether a process may be about to lock a folder that says nothing yet."""
    _, *maker = path.name.split("-")
    if len(maker) == 3 and maker[0] == _here() and maker[1].isdigit():
        try:
            if not psutil.pid_exists(int(maker[1])):
                return False
        except (OverflowError, ValueError):
            return False
    try:
        return time.time() - path.stat().st_mtime < MAKING_SECONDS
    except OSError:
        return True


def _here() -> str:
    """Where this process' number counts, in eight characters."""
    process = this_process()
    return hashlib.sha256(f"{process.host}\n{process.space}".encode()).hexdigest()[:8]
