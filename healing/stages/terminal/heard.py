"""What one run hears of its phases."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from healing.progress import Stop, Stopped
from healing.stages.terminal.console import Progress
from healing.stages.terminal.keeping import Keeper
from healing.stages.terminal.phase_times import Clock, PhaseTag, PhaseTimes

PREPARING = "preparing"
"""Phase of a run before its cell begins."""
FINISHING_SECONDS = 4.0
"""That a step which is to be kept may go on for, once a stop was heard of in it."""


class Heard:
    """What a cell says of its phases, shown, timed and kept as the run's tag; a stop takes effect
    where it speaks, until it has computed everything.

    Attributes:
        keeper: Keeps what the cell finished; ``None`` before the cell begins.
        step: The last safe point.
    """

    def __init__(self, shown: Progress, stop: Stop, clock: Clock) -> None:
        self.shown, self._stop, self.computed, self.step = shown, stop, False, 0
        self.times = PhaseTimes(PREPARING, clock)
        self.tag = PhaseTag(self.times)
        self.keeper: Keeper | None = None
        self._clock = clock
        self._stop_heard: float | None = None

    def __call__(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """A phase, or its next item."""
        leaving = self._stop.is_set() and not self.computed and not self._finishes_its_step()
        if self.keeper is not None:
            self.keeper.between(leaving=leaving)
        if leaving:
            raise Stopped(self._stop.signum)
        self.times.enter(name)
        self.shown.phase(name, done, total, note)

    def where(self) -> str:
        """What is done now, for a failure's message."""
        return f"{self.times.now}, step {self.step}" if self.step else self.times.now

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """The state is written in the block: timed, and waited for where an end was asked for."""
        with self._stop.saving(), self.times.within("saving the state"):
            yield

    def _finishes_its_step(self) -> bool:
        """Whether the step under way, and with it those that were not kept yet, would be lost for
        want of a moment.
        """
        if self.keeper is None or not self.keeper.is_amid_a_step:
            return False
        now = self._clock()
        self._stop_heard = now if self._stop_heard is None else self._stop_heard
        return now - self._stop_heard < FINISHING_SECONDS
