"""How far a computation is: phases of long loops and safe points, told to whoever listens.

The numerics name what they do in one word and know nothing of bars, signals or snapshots. Where
nobody listens (a test, a notebook's own loop) a phase is a plain loop.
"""

from __future__ import annotations

import contextlib
import contextvars
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """Told of every phase and before each item of one; it may end the computation by raising."""

    def __call__(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """``done`` of ``total`` items (``None`` = unknown) of the phase ``name`` are over; a note
        says what came out so far.
        """


@dataclass(frozen=True)
class _Where:
    """A phase, and how far it is."""

    name: str
    done: int = 0
    total: int | None = None
    note: str = ""


class _Telling:
    """A listener, and the phase that a computation is in."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.now: _Where | None = None

    def tell(self, where: _Where | None) -> None:
        """Go on to another phase, or to the next item of one."""
        self.now = where
        if where is not None:
            self.listener(where.name, where.done, where.total, where.note)


# One per thread of a sweep: threads do not inherit the value.
_telling: contextvars.ContextVar[_Telling | None] = contextvars.ContextVar("telling", default=None)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of every phase in the block."""
    token = _telling.set(_Telling(listener))
    try:
        yield
    finally:
        _telling.reset(token)


def _no_note() -> str:
    return ""


def phase(
    name: str,
    items: Iterable[T],
    total: int | None = None,
    note: Callable[[], str] = _no_note,
    *,
    begin: int = 0,
) -> Iterator[T]:
    """The items of a long loop, with word to the listener before each. Afterwards the phase that
    it is a part of goes on.

    Args:
        name: What is done, as a person reads it: ``"singular bases"``.
        items: What is looped over.
        total: Their number, where it is known.
        note: What came out so far, asked before each item.
        begin: Items that were done before, in an earlier process.
    """
    telling = _telling.get()
    outer = telling.now if telling else None
    for done, item in enumerate(items, begin):
        if telling is not None:
            telling.tell(_Where(name, done, total, note()))
        yield item
    if telling is not None:
        telling.tell(outer)


def counted(items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items of a loop that has no name of its own: their number is shown beside the phase that
    it is a part of, whatever that is (a measurement is one of many states), unless that has a
    number itself.
    """
    telling = _telling.get()
    outer = telling.now if telling else None
    if outer is None:
        yield from items
    elif outer.total is None:
        yield from phase(outer.name, items, total, lambda: outer.note)
    else:
        for item in items:
            tick()
            yield item


@contextlib.contextmanager
def during(name: str) -> Iterator[None]:
    """A part of a phase that is named and has no loop: one measurement. Afterwards the phase that
    it is a part of goes on.
    """
    telling = _telling.get()
    if telling is None:
        yield
        return
    outer = telling.now
    telling.tell(_Where(name))
    yield
    telling.tell(outer)  # not after a failure: what failed stays named


def tick() -> None:
    """The phase goes on, and nobody knows how far it is: before a step that takes long."""
    telling = _telling.get()
    if telling is not None:
        telling.tell(telling.now)


def enter(name: str) -> None:
    """Say that a phase begins which is part of no other and has no loop: loading."""
    telling = _telling.get()
    if telling is not None:
        telling.tell(_Where(name))


class Stopped(KeyboardInterrupt):
    """The computation was asked to end, and ended at a safe point or between two items of a phase.

    Attributes:
        signum: Signal that asked for it; 0 = none did.
    """

    def __init__(self, signum: int = 0) -> None:
        self.signum = signum
        super().__init__(f"stopped by {self.name}" if signum else "stopped")

    @property
    def name(self) -> str:
        """``SIGTERM``; ``request`` where no signal asked."""
        try:
            return signal.Signals(self.signum).name
        except ValueError:
            return f"signal {self.signum}" if self.signum else "request"


class Stop(threading.Event):
    """Asks every cell of a process to end at its next safe point.

    Attributes:
        signum: Of the signal that asked; 0 = none did.
        since: When it was first set, seconds of :func:`time.monotonic`; ``None`` = it is not.
    """

    signum = 0

    def __init__(self) -> None:
        super().__init__()
        self.since: float | None = None
        self._saving, self._counting = 0, threading.Lock()

    def set(self) -> None:
        """Ask for the end."""
        self.since = time.monotonic() if self.since is None else self.since
        super().set()

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """A state is written in the block: whoever waits for an end should not lose it."""
        with self._counting:
            self._saving += 1
        try:
            yield
        finally:
            with self._counting:
                self._saving -= 1

    @property
    def is_saving(self) -> bool:
        """Whether any cell's state is being written."""
        return self._saving > 0


def _no_state() -> None:
    """Nothing to save."""


@dataclass(frozen=True)
class Safe:
    """A point at which a computation may be left and gone on with later.

    Attributes:
        done: Steps done.
        note: What was done last, for a progress bar; empty = as before.
        state: What is needed to go on from here; called only where it is to be saved.
        parts: Of a state that stays true until the next point, since it is made of the results of
            finished parts alone: how many there are by now. ``None`` = the state changes with the
            next step, and is true here alone.
    """

    done: int
    note: str = ""
    state: Callable[[], Any] = _no_state
    parts: Callable[[], int] | None = None

    @property
    def has_state(self) -> bool:
        """Whether there is anything to go on from."""
        return self.state is not _no_state


def without_safe_points(events: Iterable[T | Safe]) -> Iterator[T]:
    """What a loop yields beside its safe points, for those who neither save nor stop it."""
    for event in events:
        if not isinstance(event, Safe):
            yield event
