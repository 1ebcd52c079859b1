"""States of runs under way, on disk: what a run that was cut goes on from.

A snapshot is written beside the run's folder, flushed to the disk, and renamed into place with the
digest of its bytes in its name, so that one that is there is whole; two are kept, and one that was
damaged since is passed over for the one before. Nothing in it can run code: it is read with
``weights_only``, and holds tensors, plain values and the classes that are named.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pathlib
import pickle
import re
import shutil
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol, cast

import torch
from torch.utils._pytree import tree_leaves

from healing.tracking.output_folder import with_room
from healing.tracking.run_files import is_plain, new_file, refuse_link

_READING = threading.Lock()
_UNREADABLE = (OSError, RuntimeError, pickle.UnpicklingError, ValueError, TypeError, AttributeError)
"""What torch's reader raises at a file that it did not write, or another version of this code."""
STATES_KEPT = 2
"""The newest, and the one before, should the newest be damaged."""


@dataclass(frozen=True)
class Kept:
    """What a snapshot holds of a cell that was left.

    Attributes:
        fingerprint: Of the cell.
        state: Of the safe point.
        records: Measured so far.
        run_id: Of the run that was left.
        step: Steps done.
    """

    fingerprint: str
    state: Any
    records: Sequence[Any] = field(default_factory=list)
    run_id: str = ""
    step: int = 0


class Snapshots(Protocol):
    """Where the states of cells are kept, so that they can go on."""

    def load(self, folder: pathlib.Path, fingerprint: str) -> Kept | None:
        """What was kept of this cell, if anything."""

    def save(self, folder: pathlib.Path, kept: Kept) -> None:
        """Keep it, and the one before.

        Raises:
            OSError: It cannot be written; what was kept before still is.
        """

    def drop(self, folder: pathlib.Path) -> None:
        """The cell is over."""


@dataclass(frozen=True)
class Saving:
    """How often a run's state is kept.

    Attributes:
        steps: Every so many steps; 0 = by time alone.
        minutes: After so many minutes; 0 = by steps alone.
    """

    steps: int = 0
    minutes: float = 0.0


class Due:
    """Says at each safe point whether the state is to be kept.

    Args:
        saving: How often.
        clock: Seconds.
    """

    def __init__(self, saving: Saving, clock: Callable[[], float] = time.monotonic) -> None:
        self._saving, self._clock, self._last = saving, clock, clock()

    def __call__(self, step: int) -> bool:
        """Asked once per safe point."""
        steps = self._saving.steps
        by_steps = steps > 0 and step % steps == 0
        if by_steps:
            self._last = self._clock()
        return by_steps or self.by_time()

    def by_time(self) -> bool:
        """Asked between safe points, where no step is done."""
        now, seconds = self._clock(), 60.0 * self._saving.minutes
        due = 0.0 < seconds <= now - self._last
        if due:
            self._last = now
        return due


def sync_folder(folder: pathlib.Path) -> None:
    """Make names in a folder last: a rename is on the disk only with its folder."""
    with contextlib.suppress(OSError):  # systems without it
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:32]


_STATE = re.compile(r"\d{9}-[0-9a-f]{32}\.pt", re.ASCII)


def _states(place: pathlib.Path) -> list[pathlib.Path]:
    """The files of states in their folder, the oldest first; nothing else that may be there."""
    if place.is_symlink() or not place.is_dir():
        return []
    return sorted(p for p in place.iterdir() if _STATE.fullmatch(p.name) and is_plain(p))


class FileSnapshots:
    """Snapshots as files beside the folders of their runs.

    Args:
        classes: Dataclasses that a state or record may hold.
    """

    def __init__(self, classes: Sequence[type]) -> None:
        self._classes = list(classes)

    @staticmethod
    def place(folder: pathlib.Path) -> pathlib.Path:
        """Folder of a run's snapshots: beside its own, which is uploaded whole."""
        return folder.parent / f".{folder.name}.state"

    def load(self, folder: pathlib.Path, fingerprint: str) -> Kept | None:
        """The newest that is whole and of this cell.

        Warns:
            UserWarning: One is damaged, and the one before is taken.
        """
        for path in reversed(_states(self.place(folder))):
            kept = self._read(path)
            if kept is None:
                warnings.warn(f"{path} is damaged and is not gone on from", stacklevel=2)
            elif kept.fingerprint == fingerprint:
                return kept
        return None

    def _read(self, path: pathlib.Path) -> Kept | None:
        """``None`` where its bytes are not those that were written."""
        try:
            if path.stem.rpartition("-")[2] != _digest(path):
                return None
            # The list is the process' own: blocks of two threads undo each other's.
            with _READING, torch.serialization.safe_globals([Kept, *self._classes]):
                found = torch.load(path, map_location="cpu", weights_only=True)
        except _UNREADABLE:
            return None
        return found if isinstance(found, Kept) else None

    def save(self, folder: pathlib.Path, kept: Kept) -> None:
        """Write it whole: file, disk, name, folder."""
        place = self.place(folder)
        partial = place / "partial"
        try:
            place.mkdir(parents=True, exist_ok=True)
            refuse_link(place)
            with new_file(partial) as stream:
                hashed = _Hashing(stream)
                torch.save(kept, cast("IO[bytes]", hashed))
                stream.flush()
                os.fsync(stream.fileno())
            partial.replace(place / f"{self._next(place):09d}-{hashed.digest()}.pt")
        except (OSError, RuntimeError) as error:  # the second is what torch makes of a full disk
            needed = sum(x.nbytes for x in tree_leaves(kept.state) if isinstance(x, torch.Tensor))
            reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
            raise OSError(f"{place}: {with_room(reason, place, needed)}") from error
        finally:
            if not place.is_symlink():
                partial.unlink(missing_ok=True)
        self._settled(place)

    def adopt(self, folder: pathlib.Path, path: pathlib.Path) -> None:
        """Move a state that was kept elsewhere here, as the newest. Those of this disk stay until
        newer ones take their places: it is read only when it is gone on from.

        Args:
            folder: Of the run.
            path: Named by :meth:`save`, on the same file system.
        """
        place = self.place(folder)
        place.mkdir(parents=True, exist_ok=True)
        refuse_link(place)
        path.replace(place / f"{self._next(place):09d}-{path.stem.rpartition('-')[2]}.pt")
        self._settled(place)

    @staticmethod
    def _settled(place: pathlib.Path) -> None:
        sync_folder(place)
        for old in _states(place)[:-STATES_KEPT]:
            old.unlink(missing_ok=True)

    @staticmethod
    def _next(place: pathlib.Path) -> int:
        """Number of a new state: of several at one step, the newest has the highest."""
        return 1 + max((int(path.stem.partition("-")[0]) for path in _states(place)), default=0)

    def drop(self, folder: pathlib.Path) -> None:
        """Remove all of them."""
        shutil.rmtree(self.place(folder), ignore_errors=True)


class _Hashing(io.RawIOBase):
    """A stream that hashes what is written through it, so that no byte is read again."""

    def __init__(self, stream: io.BufferedWriter) -> None:
        self._stream, self._hash = stream, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        return self._stream.write(data)

    def digest(self) -> str:
        """Of everything so far, as in a snapshot's name."""
        return self._hash.hexdigest()[:32]
