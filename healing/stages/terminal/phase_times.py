"""Where the time of a run goes: seconds by phase, and the phase as a tag of the run under way."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

from healing.errors import TrackingError
from healing.tracking.run import Run

TAG = "phase"
"""Tag of a run: the phase that it is in, or in which it ended; ``done`` where it ended well."""

TAG_SECONDS = 5.0
"""Between two looks at the phase, of which each sends one request at most."""

LASTING_SECONDS = 2.0
"""What a phase has to last to be sent."""

AWAY_SECONDS = 60.0
"""Until a store that took no tag is asked again."""

Clock = Callable[[], float]
"""Seconds since some moment."""


def metric_name(phase: str) -> str:
    """``healthy measurement`` as a metric: ``seconds/healthy_measurement``."""
    return f"seconds/{phase.replace(' ', '_')}"


class PhaseTimes:
    """Wall seconds by phase: every moment from the beginning on belongs to exactly one.

    Args:
        first: The phase that it begins with.
        clock: Tells the time.
    """

    def __init__(self, first: str, clock: Clock = time.monotonic) -> None:
        self._clock, self._seconds = clock, dict[str, float]()
        self.now = first
        self._counted = self._entered = clock()

    def enter(self, name: str) -> None:
        """Another phase goes on from here."""
        if name != self.now:
            self._count()
            self.now, self._entered = name, self._counted

    @contextlib.contextmanager
    def within(self, name: str) -> Iterator[None]:
        """A phase for the block; then the one before goes on."""
        before = self.now
        self.enter(name)
        yield
        self.enter(before)

    @property
    def lasted(self) -> float:
        """Seconds that the phase has gone on without another in between."""
        return self._clock() - self._entered

    def _count(self) -> None:
        moment = self._clock()
        self._seconds[self.now] = self._seconds.get(self.now, 0.0) + moment - self._counted
        self._counted = moment

    def seconds(self) -> dict[str, float]:
        """Phase → seconds so far, in the order in which the phases came first."""
        self._count()
        return dict(self._seconds)


class PhaseTag:
    """Keeps the tag of a run that is under way: looks at the phase every few seconds, from a thread
    of its own, so that a store that is slow or away holds no computation up.

    Args:
        times: Know the phase.
        every: Seconds between two looks.
        lasting: Seconds that a phase has to last to be sent.
        away: Seconds until a store that took nothing is asked again.
    """

    def __init__(
        self,
        times: PhaseTimes,
        *,
        every: float = TAG_SECONDS,
        lasting: float = LASTING_SECONDS,
        away: float = AWAY_SECONDS,
    ) -> None:
        self._times, self._every, self._lasting, self._away = times, every, lasting, away
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, run: Run) -> None:
        """The run is open."""
        self._thread = threading.Thread(
            target=self._follow, args=(run,), name="tags the phase", daemon=True
        )
        self._thread.start()

    def _follow(self, run: Run) -> None:
        sent, pause = "", self._every
        while not self._ended.wait(pause):
            name, pause = self._times.now, self._every
            if name == sent or self._times.lasted < self._lasting:
                continue
            try:
                run.tags({TAG: name})
                sent = name
            except TrackingError:  # a tag of progress is worth no failure
                pause = self._away

    def stop(self) -> None:
        """Nothing is sent from here on, but for a request that is on its way."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join(self._every)
