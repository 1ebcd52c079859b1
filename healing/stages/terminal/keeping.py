"""When the state of a cell is kept."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from healing.progress import Safe
from healing.tracking.snapshots import Due, Kept, Snapshots


class Keeper:
    """Keeps the states of one cell: at its safe points, and between two of them where the state is
    made of finished parts.

    Args:
        snapshots: Where.
        folder: Of the run.
        about: The cell and its run, without a state.
        due: How often.
        say: Told of a state that could not be kept: a disk without room ends nothing here.
        timed: Entered while a state is written.
    """

    def __init__(
        self,
        snapshots: Snapshots | None,
        folder: pathlib.Path,
        about: Kept,
        due: Due,
        say: Callable[[str], None],
        timed: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> None:
        self._snapshots, self.folder, self._about = snapshots, folder, about
        self._due, self._say, self._timed = due, say, timed
        self._point: Safe | None = None
        self._records: list[Any] = []
        self._saved = 0

    def reached(self, point: Safe, records: Sequence[Any]) -> None:
        """The cell is at a safe point.

        Args:
            point: One without a state leaves the parts that were finished before to go on from.
            records: Measured so far.
        """
        if point.has_state:
            self._point, self._records, self._saved = point, list(records), 0
        elif self.is_amid_a_step:
            self._point = None
        if self._due(point.done):
            self.save()

    def between(self, *, leaving: bool) -> None:
        """The cell is amid a phase: parts may have been finished since the last safe point.

        Args:
            leaving: Whether it goes no further.
        """
        if not self.is_amid_a_step and (leaving or self._due.by_time()):
            self.save()

    @property
    def is_amid_a_step(self) -> bool:
        """Whether what was done last is lost if the cell is left now."""
        return self._snapshots is not None and self._point is not None and self._point.parts is None

    def save(self) -> None:
        """Keep the state of the last safe point, if anything was finished since it was kept."""
        point = self._point
        if self._snapshots is None or point is None:
            return
        parts = 1 if point.parts is None else point.parts()
        if parts == self._saved:
            return  # nothing was finished since
        self._saved = parts
        plain = [replace(record, write=None) for record in self._records]
        try:
            with self._timed():  # ranks gather the state first, which takes a large model a while
                kept = replace(self._about, state=point.state(), records=plain, step=point.done)
                self._snapshots.save(self.folder, kept)
        except OSError as error:
            where = f"at step {point.done}" if point.done else "of the preparation"
            self._say(f"warning: the state {where} was not kept: {error}")
