"""What a person sees in the terminal while a stage runs.

On a terminal a bar per run and under it the phase it is in; both are redrawn every second, so that
what takes long is seen to go on. In a pipe or a log file a line per phase, and one every half
minute of a long one. ``quiet`` shows nothing but errors.
"""

from __future__ import annotations

import contextlib
import pathlib
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Protocol, Self

from tqdm import tqdm

from healing.stages.terminal import bars
from healing.stages.terminal.bars import Bar, phase_text
from healing.stages.terminal.lines import is_terminal, visible, write_line

LINE_SECONDS = 30.0


class Progress(Protocol):
    """Shows how far one run is."""

    def rename(self, title: str) -> None:
        """More is known of what runs."""

    def begin(self, total: int, unit: str) -> None:
        """The number of steps is known."""

    def step(self, done: int, note: str = "") -> None:
        """So many steps are done; a note says what came out."""

    def phase(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """A phase goes on to its next item."""

    def part(self, share: float, text: str) -> None:
        """Of the steps under way so much is done (1 = one step), and this is being done."""

    def close(self) -> None:
        """The run is over."""


class Silence:
    """Shows nothing."""

    def rename(self, title: str) -> None:
        """Nothing."""

    def begin(self, total: int, unit: str) -> None:
        """Nothing."""

    def step(self, done: int, note: str = "") -> None:
        """Nothing."""

    def phase(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """Nothing."""

    def part(self, share: float, text: str) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Lines:
    """For a pipe or a log file: whole lines, few of them."""

    def __init__(self, title: str) -> None:
        self._title, self._said = title, 0.0
        self._names: set[str] = set()
        self._total, self._unit = 0, "step"

    def rename(self, title: str) -> None:
        """Another title."""
        self._title = title

    def begin(self, total: int, unit: str) -> None:
        """The number of steps is known."""
        self._total, self._unit = total, unit

    def step(self, done: int, note: str = "") -> None:
        """A line at the last step, and now and then before."""
        if done == self._total or self._is_time():
            self._say(f"{self._unit} {done}/{self._total} {note}".rstrip())

    def phase(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """A line where a phase begins for the first time, and every half minute."""
        if name not in self._names or self._is_time():
            self._names.add(name)
            self._say(phase_text(name, done, total, note))

    def part(self, share: float, text: str) -> None:
        """A line every half minute."""
        if self._is_time():
            self._say(text)

    def close(self) -> None:
        """Nothing is left to say."""

    def _is_time(self) -> bool:
        return time.monotonic() - self._said >= LINE_SECONDS

    def _say(self, text: str) -> None:
        self._said = time.monotonic()
        write_line(f"{self._title}: {text}", error=True)


class Cells:
    """Progress of many cells at once: those that are over, how many run, wait and failed, how far
    those under way are, and what the one that spoke last is doing.
    """

    def __init__(self, shown: Progress, total: int, unit: str) -> None:
        self._shown, self._total, self._done, self._failed = shown, total, 0, 0
        self._under_way: dict[CellProgress, float] = {}
        self._lock = threading.Lock()
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

    def cell(self, runs: int) -> CellProgress:
        """Progress of a cell of so many runs."""
        return CellProgress(self, runs)

    def over(self, cell: CellProgress, title: str, *, failed: bool = False) -> None:
        """One more is done, well or not."""
        with self._lock:
            self._under_way.pop(cell, None)
            self._done += 1
            self._failed += failed
            text = self._counted(f"last: {title}")
            self._shown.step(self._done, text)
            self._shown.part(sum(self._under_way.values()), text)

    def tell(self, cell: CellProgress, share: float, text: str) -> None:
        """A cell that is under way speaks."""
        with self._lock:
            self._under_way[cell] = share
            self._shown.part(sum(self._under_way.values()), self._counted(text))

    def left(self, cell: CellProgress) -> None:
        """It is not under way any more, and not over either."""
        with self._lock:
            self._under_way.pop(cell, None)

    def waiting(self, text: str) -> None:
        """Nothing is under way, for this reason."""
        with self._lock:
            self._shown.part(sum(self._under_way.values()), self._counted(text))

    def _counted(self, text: str) -> str:
        running = len(self._under_way)
        queued = max(0, self._total - self._done - running)
        counts = f"{running} running, {queued} queued"
        failed = f", {self._failed} failed" if self._failed else ""
        return f"{counts}{failed}; {text}"


class Hears(Protocol):
    """Is told how far a cell is."""

    def tell(self, cell: CellProgress, share: float, text: str) -> None:
        """So much of it is done (1 = all), and this is being done."""


class CellProgress:
    """One of several cells: its runs, one after the other, speak through the bar of all.

    Args:
        cells: All of them, or whoever hears it for them.
        runs: Of this cell, as far as is known before.
    """

    def __init__(self, cells: Hears, runs: int) -> None:
        self._cells, self._runs, self._over = cells, runs, 0
        self._share = 0.0

    @property
    def over(self) -> int:
        """Runs of it that are over."""
        return self._over

    def run(self, title: str) -> Progress:
        """Progress of one of its runs."""
        return _CellRun(self, title)

    def tell(self, share: float, text: str, *, over: bool = False) -> None:
        """So much of the run under way is done; the bar never goes back."""
        self._over += over
        done = (self._over + share) / self._runs
        self._share = max(self._share, min(done, 1.0))
        self._cells.tell(self, self._share, text)


class _CellRun(Silence):
    """One run of a cell."""

    def __init__(self, cell: CellProgress, title: str) -> None:
        self._cell, self._title = cell, title
        self._total, self._done, self._closed = 0, 0, False

    def rename(self, title: str) -> None:
        """Another title."""
        self._title = title

    def begin(self, total: int, unit: str) -> None:
        """The number of steps is known."""
        self._total = total

    def step(self, done: int, note: str = "") -> None:
        """Steps of this run."""
        self._done = done
        self._cell.tell(self._share, f"{self._title} {done}/{self._total}")

    def phase(self, name: str, done: int, total: int | None, note: str = "") -> None:
        """A phase of this run."""
        self._cell.tell(self._share, f"{self._title}, {phase_text(name, done, total, note)}")

    def close(self) -> None:
        """The cell goes on to its next run."""
        if not self._closed:
            self._closed = True
            self._cell.tell(0.0, self._title, over=True)

    @property
    def _share(self) -> float:
        return min(self._done / self._total, 1.0) if self._total else 0.0


class Console:
    """Progress and lines at the verbosity asked for.

    Args:
        verbosity: ``quiet`` (errors only), ``normal`` (bars and results) or ``verbose``.
        cell: Whose runs are shown here; ``None`` = each has a bar of its own.
    """

    def __init__(self, verbosity: str, cell: CellProgress | None = None) -> None:
        self.verbosity, self._cell = verbosity, cell

    def say(self, text: str) -> None:
        """A line of result."""
        if self.verbosity != "quiet":
            write_line(text)

    def detail(self, text: str) -> None:
        """A line for those who asked for more."""
        if self.verbosity == "verbose":
            write_line(text)

    def over(self, line: str, folder: pathlib.Path, *, detail: bool, alone: bool) -> None:
        """What came of a run, and where its files are.

        Args:
            line: What came of it.
            folder: Of its files.
            detail: Whether that is only for those who asked for more, beside other runs.
            alone: Whether it is all that the command does: then the files get a line of their own.
        """
        say = self.detail if detail and not alone else self.say
        say(f"{line}\nfiles: {folder}" if alone else f"{line} → {folder}")

    def link(self, address: str) -> None:
        """The command's last line: where to see it; empty = nowhere."""
        if address:
            self.say(f"MLflow: {address}")

    def told(self, text: str) -> None:
        """What a cell does that has no run yet."""
        if self._cell is not None:
            self._cell.tell(0.0, text)

    def progress(self, title: str) -> Progress:
        """Progress of one run."""
        if self._cell is not None:
            return self._cell.run(title)
        if self.verbosity == "quiet":
            return Silence()
        return Bar(visible(title)) if is_terminal() else Lines(title)

    @contextlib.contextmanager
    def waiting(self, text: str) -> Iterator[None]:
        """On a terminal a line with a clock, which is gone afterwards: what is no run."""
        if self._cell is not None or self.verbosity == "quiet" or not is_terminal():
            yield
            return
        with bars.waiting(text):
            yield

    @contextlib.contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """The same, and in a pipe a line: part of a command that is silent for longer."""
        if self._cell is None and self.verbosity != "quiet" and not is_terminal():
            write_line(text, error=True)
        with self.waiting(text):
            yield

    def cells(self, total: int, title: str, unit: str) -> Cells:
        """Progress of many cells, which :meth:`within` consoles speak through."""
        return Cells(self.progress(title), total, unit)

    def within(self, cell: CellProgress) -> Console:
        """A console for the runs of one cell: results are told by whoever runs them all."""
        return Console("quiet", cell)

    def bar(self, total: int, title: str, unit: str = "step", **options: Any) -> tqdm[Any]:
        """A plain bar, for loops that are no runs."""
        return tqdm(
            total=total,
            desc=title,
            unit=unit,
            disable=self.verbosity == "quiet" or sys.stderr is None,
            dynamic_ncols=True,
            mininterval=0.5 if is_terminal() else 15.0,
            **options,
        )
