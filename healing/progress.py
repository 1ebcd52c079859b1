"""How far a computation is: phases of long loops and safe points, told to whoever listens.

The numerics name what they do in one word and know nothing of bars, signals or snapshots. Where
nobody listens (a test, a notebook's own loop) a phase is a plain loop.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

T = TypeVar("T")


class Listener(Protocol):
    """Told before each item of a phase; it may end the computation by raising."""

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """``done`` of ``total`` items (``None`` = unknown) of the phase ``name`` are over."""


# One per thread of a sweep: threads do not inherit the value.
_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar(
    "listener", default=None
)


@contextlib.contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener of every phase in the block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def phase(name: str, items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """The items of a long loop, with word to the listener before each.

    Args:
        name: What is done, as a person reads it: ``"singular bases"``.
        items: What is looped over.
        total: Their number, where it is known.
    """
    listener = _listener.get()
    for done, item in enumerate(items):
        if listener is not None:
            listener(name, done, total)
        yield item


def enter(name: str) -> None:
    """Say that a phase begins which has no loop: loading, one measurement."""
    listener = _listener.get()
    if listener is not None:
        listener(name, 0, None)


class Stopped(KeyboardInterrupt):
    """The computation was asked to end, and ended at a safe point or between two items of a phase.

    Attributes:
        signum: Signal that asked for it; 0 = none did.
    """

    def __init__(self, signum: int = 0) -> None:
        super().__init__(f"stopped by signal {signum}" if signum else "stopped")
        self.signum = signum


def _no_state() -> None:
    """Nothing to save."""


@dataclass(frozen=True)
class Safe:
    """A point at which a computation may be left and gone on with later.

    Attributes:
        done: Steps done.
        note: What was done last, for a progress bar; empty = as before.
        state: What is needed to go on from here; called only where it is to be saved.
    """

    done: int
    note: str = ""
    state: Callable[[], Any] = _no_state


def without_safe_points(events: Iterable[T | Safe]) -> Iterator[T]:
    """What a loop yields beside its safe points, for those who neither save nor stop it."""
    for event in events:
        if not isinstance(event, Safe):
            yield event
