"""What a command does when it is told to stop: the scheduler's SIGTERM, a hang-up, Ctrl-C.

Python's own handlers run between two steps of the interpreter, so not while the main thread is
inside one long call (a large matrix product, a file that is written). What is heard here is heard
by a thread instead, which the operating system's handler wakes at once (``signal.set_wakeup_fd``).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
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
"""Until a step that does not end is left: with the last saved state, the run ended as KILLED.
The time in which a state is being written does not count: to leave then would lose that state.
"""
ABANDON_SECONDS = 1.5
"""For telling the store, when nothing is waited for any more."""
_LOOK_SECONDS = 0.1


class Signals:
    """Asks for an end at the next safe point; a second signal, or a step that takes longer than
    the grace, ends the process at once.

    Args:
        stop: Set by the first signal.
        abandon: Ends the runs that are open, told why; must not take long.
        grace: Seconds until a step is left.
    """

    def __init__(
        self, stop: Stop, abandon: Callable[[str], None], grace: float = GRACE_SECONDS
    ) -> None:
        self.stop, self._abandon, self._grace = stop, abandon, grace

    def watch(self, woken: socket.socket) -> None:
        """Wait for signals, until the other end is closed; for a thread of its own.

        Args:
            woken: Gives the number of each signal that arrived as one byte.
        """
        first = self._next(woken)
        if not first:
            return
        name = signal.Signals(first).name
        self.stop.signum = first
        self.stop.set()
        _say(
            f"{name}: ending at the next safe point, within {self._grace:.0f} seconds "
            "(once more: at once)"
        )
        left, said = self._grace, False
        woken.settimeout(_LOOK_SECONDS)
        while left > 0.0:
            since = time.monotonic()
            with contextlib.suppress(TimeoutError):
                second = self._next(woken)
                if not second:
                    return
                self._end_now(second, f"{signal.Signals(second).name}, the second signal")
            if not self.stop.is_saving:
                left -= time.monotonic() - since
            elif not said:
                said = True
                _say("the state is being written, and is waited for (once more: at once)")
        self._end_now(first, f"{name}, no safe point in {self._grace:.0f} s")

    @staticmethod
    def _next(woken: socket.socket) -> int:
        """Number of the next signal that ends a command; 0 = there will be none.

        Raises:
            TimeoutError: None came in the socket's time.
        """
        while heard := woken.recv(1):
            if heard[0] in HEARD:
                return heard[0]
        return 0

    def _end_now(self, signum: int, why: str) -> None:
        _say(f"ending at once ({why}); what was saved before is kept")
        told = threading.Thread(target=self._abandon, args=(why,), daemon=True)
        told.start()
        told.join(ABANDON_SECONDS)
        os._exit(128 + signum)


def _say(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):  # a terminal that hung up
        sys.stderr.write(f"\n{text}\n")
        sys.stderr.flush()


def _heard(signum: int, frame: FrameType | None) -> None:
    """A signal with a handler wakes the thread; there is nothing left to do for the handler."""


@contextlib.contextmanager
def listening(
    stop: Stop, abandon: Callable[[str], None], grace: float = GRACE_SECONDS
) -> Iterator[None]:
    """Handle signals in the block; a signal that was ignored before (``nohup``) still is."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    waking, woken = socket.socketpair()
    waking.setblocking(False)
    watch = Signals(stop, abandon, grace).watch
    watcher = threading.Thread(target=watch, args=(woken,), name="signals", daemon=True)
    watcher.start()
    before = {s: signal.getsignal(s) for s in HEARD}
    fd_before = signal.set_wakeup_fd(waking.fileno(), warn_on_full_buffer=False)
    _LISTENING.append(True)
    for signum, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(signum, _heard)
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _LISTENING.pop()
        signal.set_wakeup_fd(fd_before)
        waking.close()
        watcher.join(1.0)
        woken.close()


_LISTENING: list[bool] = []
"""One entry per block under way: a process that is forked in one must not wake its parent."""


def _in_a_fork() -> None:
    """Ctrl-C reaches a whole group of processes: a fork's copy would be the parent's second."""
    if _LISTENING:
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_a_fork)
