"""Bars of a terminal that go on moving: a thread redraws them every second, however long one step
takes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tqdm import tqdm
from tqdm.utils import ObjectWrapper

from healing.stages.terminal.lines import visible

REDRAW_SECONDS = 0.2
TICK_SECONDS = 1.0
UNKNOWN_SIZE = (80, 24)
"""Columns and rows of a terminal that does not know its own (``script``, a serial line, a
pseudo-terminal that nobody gave a size): tqdm would draw nothing on it."""
BESIDE_TITLE = 44
"""Columns that a bar leaves for what is beside its title."""


def phase_text(name: str, done: int, total: int | None, note: str = "") -> str:
    """``catalyst search 3/12, ρ 0.047``; of one alone, and of the first of an unknown number, the
    name.
    """
    number = f" {done + 1}/{total}" if total else f" {done + 1}"
    number = number if done or (total or 1) > 1 else ""
    return f"{name}{number}, {note}" if note else name + number


def shortened(title: str, columns: int) -> str:
    """A title in at most so many columns: what is too long loses its middle."""
    if len(title) <= columns:
        return title
    kept = max(columns - 1, 2)
    return f"{title[: kept - kept // 2]}…{title[len(title) - kept // 2 :]}"


def cut(text: str, columns: int) -> str:
    """As much of a text as fits."""
    return text if len(text) <= columns else f"{text[: columns - 1]}…"


def size(terminal: Any) -> tuple[int, int]:
    """Columns and rows that may be drawn on: one less than there are."""
    columns = rows = 0
    with contextlib.suppress(OSError, ValueError, AttributeError):
        columns, rows = os.get_terminal_size(terminal.fileno())
    return (columns or UNKNOWN_SIZE[0]) - 1, (rows or UNKNOWN_SIZE[1]) - 1


class _Line(tqdm):  # type: ignore[type-arg]
    """A line of a terminal: its text gives way to what is beside it.

    Attributes:
        beside: Columns of that.
        fitted: Makes a text fit.
        whole: Steps that are over; tqdm's own ``n`` also holds parts of one.
        paced_from: When the first step was counted, and at which number: what came before tells
            nothing about the time left.
    """

    beside = 0
    fitted: Callable[[str, int], str] = staticmethod(shortened)
    whole = 0
    paced_from: tuple[float, float] | None = None

    def __init__(self, file: Any, **settings: Any) -> None:
        columns, rows = size(file)
        super().__init__(file=file, ncols=columns, nrows=rows, **settings)

    @property
    def format_dict(self) -> dict[str, Any]:
        """As tqdm's, with what the formats below name."""
        self.ncols, self.nrows = size(self.fp)  # it may have changed
        known = super().format_dict
        room = known["ncols"] - 1 - self.beside
        rate = None
        if self.paced_from is not None:
            begun, first = self.paced_from
            rate = (self.n - first) / max(time.monotonic() - begun, 1e-9) or None
        text = self.fitted(known["prefix"], max(room, 16))
        return {**known, "prefix": text, "whole": self.whole, "rate": rate}


class _Phase(_Line):
    beside = 2
    fitted = staticmethod(cut)


class _Ticker:
    """Calls a function every second from a thread of its own, until it is stopped."""

    def __init__(self, redraw: Callable[[], object]) -> None:
        self._redraw, self._ended = redraw, threading.Event()
        self._thread = threading.Thread(target=self._run, name="redraws the bar", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(TICK_SECONDS):
            self._redraw()

    def stop(self) -> None:
        """Not again."""
        self._ended.set()
        self._thread.join()


class _Above(ObjectWrapper):  # type: ignore[misc]
    """Standard error while bars are drawn: whole lines that others write (warnings, logs of
    libraries) go above the bars.
    """

    def __init__(self, wrapped: Any) -> None:
        super().__init__(wrapped)
        self.wrapper_setattr("_begun", "")

    def write(self, text: str) -> int:
        """Keep what is no whole line yet."""
        lines, end, rest = (self._begun + text).rpartition("\n")
        self.wrapper_setattr("_begun", rest)
        if end:
            with tqdm.external_write_mode(file=self._wrapped):
                self._wrapped.write(lines + end)
        return len(text)

    def finish(self) -> None:
        """Write what is left."""
        self._wrapped.write(self._begun)
        self.wrapper_setattr("_begun", "")


@contextlib.contextmanager
def _terminal() -> Iterator[Any]:
    """The terminal to draw on; what others write to it meanwhile stands above the bars."""
    before = sys.stderr
    if isinstance(before, _Above):  # of a bar that is open already
        yield before._wrapped
        return
    above = _Above(before)
    sys.stderr = above
    try:
        yield before
    finally:
        if sys.stderr is above:
            sys.stderr = before
        above.finish()


class Bar:
    """A bar with the time left, and under it the phase; redrawn every second."""

    def __init__(self, title: str) -> None:
        self._note, self._drawn, self._open = "", 0.0, True
        self._ending = contextlib.ExitStack()
        place = self._ending.enter_context(_terminal())
        # No bar and no time left before the number of steps is known.
        self._bar = _Line(desc=title, bar_format="{desc} [{elapsed}]", file=place)
        self._bar.beside = BESIDE_TITLE
        self._line = _Phase(bar_format="  {desc}", leave=False, file=place)
        self._ticker = _Ticker(self._redraw)

    def _redraw(self) -> None:
        self._drawn = time.monotonic()
        self._bar.refresh()
        self._line.refresh()

    def rename(self, title: str) -> None:
        """Another title."""
        self._bar.set_description_str(visible(title), refresh=False)

    def begin(self, total: int, unit: str) -> None:
        """From here on a bar; its clock goes on, since what came before belongs to the run."""
        self._bar.total = total
        self._bar.bar_format = (
            "{desc}: {percentage:3.0f}%|{bar}| {whole}/{total_fmt} [{elapsed}<{remaining}]"
        )

    def step(self, done: int, note: str = "") -> None:
        """Move the bar."""
        self._note = note or self._note
        self._move(done, 0.0)

    def part(self, share: float, text: str) -> None:
        """Move the bar by less than a step, and say what is being done."""
        self._line.set_description_str(visible(text), refresh=False)
        self._move(self._bar.whole, share)

    def _move(self, whole: int, share: float) -> None:
        self._bar.whole, self._bar.n = whole, whole + share
        if self._bar.paced_from is None:
            self._bar.paced_from = (time.monotonic(), self._bar.n)
        self._redraw_sometimes()

    def phase(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """Say the phase beside the last note."""
        own = total is None or total != self._bar.total  # the steps' number is in the bar
        text = phase_text(name, done, total, note) if own else phase_text(name, 0, None, note)
        words = [text, self._note]
        self._line.set_description_str(visible(", ".join(filter(None, words))), refresh=False)
        self._redraw_sometimes()

    def _redraw_sometimes(self) -> None:
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._redraw()

    def close(self) -> None:
        """Leave the bar as it stands."""
        if not self._open:
            return
        self._open = False
        self._ticker.stop()
        self._line.close()
        self._bar.close()
        self._ending.close()


@contextlib.contextmanager
def waiting(text: str) -> Iterator[None]:
    """A line with a clock, which is gone afterwards."""
    with _terminal() as terminal:
        line = _Line(desc=text, bar_format="{desc} [{elapsed}]", leave=False, file=terminal)
        ticker = _Ticker(line.refresh)
        try:
            yield
        finally:
            ticker.stop()
            line.close()
