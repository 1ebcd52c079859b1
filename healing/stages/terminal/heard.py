"""What one run hears of its phases."""

from __future__ import annotations

from healing.progress import Stop, Stopped
from healing.stages.terminal.console import Progress
from healing.stages.terminal.phase_times import Clock, PhaseTag, PhaseTimes

PREPARING = "preparing"
"""Phase of a run before its cell begins."""


class Heard:
    """What a cell says of its phases, shown, timed and kept as the run's tag; a stop takes effect
    where it speaks, until it has computed everything.
    """

    def __init__(self, shown: Progress, stop: Stop, clock: Clock) -> None:
        self.shown, self._stop, self.computed, self.step = shown, stop, False, 0
        self.times = PhaseTimes(PREPARING, clock)
        self.tag = PhaseTag(self.times)

    def __call__(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """A phase, or its next item."""
        if self._stop.is_set() and not self.computed:
            raise Stopped(self._stop.signum)
        self.times.enter(name)
        self.shown.phase(name, done, total, note)
