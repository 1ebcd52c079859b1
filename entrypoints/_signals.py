"""What a command does when it is told to stop: the scheduler's SIGTERM, a hang-up, Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from healing.progress import Stop

HEARD = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
)
"""SIGUSR1 is what SLURM can send some minutes before the end (``--signal=B:USR1@120``)."""
GRACE_SECONDS = 8.0
"""Until a step that does not end is left: with the last saved state, the run ended as KILLED."""
ABANDON_SECONDS = 1.5
"""For telling the store, when nothing is waited for any more."""


class Signals:
    """Asks for an end at the next safe point; a second signal, or a step that takes longer than
    :data:`GRACE_SECONDS`, ends the process at once.

    Args:
        stop: Set by the first signal.
        abandon: Ends the runs that are open, told why; must not take long.
        grace: Seconds until a step is left.
    """

    def __init__(
        self, stop: Stop, abandon: Callable[[str], None], grace: float = GRACE_SECONDS
    ) -> None:
        self.stop, self._abandon, self._grace = stop, abandon, grace
        self._ending = threading.Lock()

    def heard(self, signum: int, frame: FrameType | None = None) -> None:
        """The handler."""
        name = signal.Signals(signum).name
        if self.stop.is_set():
            self._end_now(signum, f"{name}, the second signal")
        self.stop.signum = signum
        self.stop.set()
        _say(
            f"{name}: ending at the next safe point, within {self._grace:.0f} seconds "
            "(once more: at once)"
        )
        timer = threading.Timer(
            self._grace, self._end_now, (signum, f"{name}, no safe point in {self._grace:.0f} s")
        )
        timer.daemon = True
        timer.start()

    def _end_now(self, signum: int, why: str) -> None:
        if not self._ending.acquire(blocking=False):
            return  # the timer's thread is at it
        _say(f"ending at once ({why}); what was saved before is kept")
        told = threading.Thread(target=self._abandon, args=(why,), daemon=True)
        told.start()
        told.join(ABANDON_SECONDS)
        os._exit(128 + signum)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that hung up
        sys.stderr.write(f"\n{text}\n")
        sys.stderr.flush()


@contextlib.contextmanager
def listening(stop: Stop, abandon: Callable[[str], None]) -> Iterator[None]:
    """Handle signals in the block; a signal that was ignored before (``nohup``) still is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    signals = Signals(stop, abandon)
    before = {s: signal.getsignal(s) for s in HEARD}
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, signals.heard)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
