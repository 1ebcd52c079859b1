"""What a person sees in the terminal while a stage runs.

On a terminal a bar per run, with the phase it is in; in a pipe or a log file a line per phase, and
one every half minute of a long one. ``quiet`` shows nothing but errors.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

REDRAW_SECONDS = 0.2
LINE_SECONDS = 30.0


def phase_text(name: str, done: int, total: int | None) -> str:
    """``singular bases 12/210``; before the first item and without a number the name alone."""
    return f"{name} {done + 1}/{total}" if total else name


class Progress(Protocol):
    """Shows how far one run is."""

    def begin(self, total: int, unit: str) -> None:
        """The number of steps is known."""

    def step(self, done: int, note: str = "") -> None:
        """So many steps are done; a note says what came out."""

    def phase(self, name: str, done: int, total: int | None) -> None:
        """A phase goes on to its next item."""

    def close(self) -> None:
        """The run is over."""


class Silence:
    """Shows nothing."""

    def begin(self, total: int, unit: str) -> None:
        """Nothing."""

    def step(self, done: int, note: str = "") -> None:
        """Nothing."""

    def phase(self, name: str, done: int, total: int | None) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Bar:
    """A bar with the time left, and the phase beside it."""

    def __init__(self, title: str) -> None:
        # No rate and no time left before the number of steps is known.
        self._bar = tqdm(desc=title, bar_format="{desc}: {postfix} [{elapsed}]", dynamic_ncols=True)
        self._note, self._drawn = "", 0.0

    def begin(self, total: int, unit: str) -> None:
        """From here on a bar."""
        self._bar.bar_format, self._bar.unit = None, unit
        self._bar.reset(total)

    def step(self, done: int, note: str = "") -> None:
        """Move the bar."""
        self._note = note or self._note
        self._bar.set_postfix_str(self._note, refresh=False)
        self._bar.update(done - self._bar.n)

    def phase(self, name: str, done: int, total: int | None) -> None:
        """Say the phase beside the last note, a few times a second at most."""
        words = [phase_text(name, done, total), self._note]
        self._bar.set_postfix_str(", ".join(filter(None, words)), refresh=False)
        if time.monotonic() - self._drawn > REDRAW_SECONDS:
            self._drawn = time.monotonic()
            self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Lines:
    """For a pipe or a log file: whole lines, few of them."""

    def __init__(self, title: str) -> None:
        self._title, self._name, self._said = title, "", 0.0
        self._total, self._unit = 0, "step"

    def begin(self, total: int, unit: str) -> None:
        """The number of steps is known."""
        self._total, self._unit = total, unit

    def step(self, done: int, note: str = "") -> None:
        """A line at the last step, and now and then before."""
        if done == self._total or time.monotonic() - self._said >= LINE_SECONDS:
            self._say(f"{self._unit} {done}/{self._total} {note}".rstrip())

    def phase(self, name: str, done: int, total: int | None) -> None:
        """A line where a phase begins, and every half minute of it."""
        if name != self._name or time.monotonic() - self._said >= LINE_SECONDS:
            self._name = name
            self._say(phase_text(name, done, total))

    def close(self) -> None:
        """Nothing is left to say."""

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        print(f"{self._title}: {text}", file=sys.stderr, flush=True)


class Cells:
    """Progress of many runs at once: cells done, and what the one that spoke last is doing."""

    def __init__(self, shown: Progress, total: int, unit: str) -> None:
        self._shown, self._done = shown, 0
        shown.begin(total, unit)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._shown.close()

    def over(self, title: str) -> None:
        """One more is done."""
        self._done += 1
        self._shown.step(self._done, f"last: {title}")

    def cell(self, title: str) -> Progress:
        """Progress of one of them."""
        return _Cell(self._shown, title)


class _Cell(Silence):
    """One of several runs: speaks through the bar of all."""

    def __init__(self, shown: Progress, title: str) -> None:
        self._shown, self._title, self._total = shown, title, 0

    def begin(self, total: int, unit: str) -> None:
        """The number of steps is known."""
        self._total = total

    def step(self, done: int, note: str = "") -> None:
        """Steps of this run."""
        self._shown.phase(self._title, done - 1, self._total)

    def phase(self, name: str, done: int, total: int | None) -> None:
        """A phase of this run."""
        self._shown.phase(f"{self._title}, {name}", done, total)


class Console:
    """Progress and lines at the verbosity asked for.

    Args:
        verbosity: ``quiet`` (errors only), ``normal`` (bars and results) or ``verbose``.
        cells: Of which the runs shown here are some; ``None`` = each has a bar of its own.
    """

    def __init__(self, verbosity: str, cells: Cells | None = None) -> None:
        self.verbosity, self._cells = verbosity, cells

    def say(self, text: str) -> None:
        """A line of result."""
        if self.verbosity != "quiet":
            tqdm.write(text, file=sys.stdout)

    def detail(self, text: str) -> None:
        """A line for those who asked for more."""
        if self.verbosity == "verbose":
            tqdm.write(text, file=sys.stdout)

    def progress(self, title: str) -> Progress:
        """Progress of one run."""
        if self._cells is not None:
            return self._cells.cell(title)
        if self.verbosity == "quiet":
            return Silence()
        return Bar(title) if sys.stderr.isatty() else Lines(title)

    def cells(self, total: int, title: str, unit: str) -> Cells:
        """Progress of many runs, which :meth:`within` consoles speak through."""
        return Cells(self.progress(title), total, unit)

    def within(self, cells: Cells) -> Console:
        """A console for the runs among many: results are told by whoever runs them all."""
        return Console("quiet", cells)

    def bar(self, total: int, title: str, unit: str = "step", **options: Any) -> tqdm[Any]:
        """A plain bar, for loops that are no runs."""
        return tqdm(
            total=total,
            desc=title,
            unit=unit,
            disable=self.verbosity == "quiet",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            **options,
        )
