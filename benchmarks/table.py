"""What all benchmarks share: rounds side by side, medians with their range, one table."""

from __future__ import annotations

import dataclasses
import gc
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        what: What was measured.
        values: One number per round.
        unit: Of the values.
        target: What was aimed at, as text; empty = nothing.
        met: Whether the median meets it; ``None`` without a target.
    """

    what: str
    values: tuple[float, ...]
    unit: str
    target: str = ""
    met: bool | None = None

    @property
    def median(self) -> float:
        """Of the rounds."""
        return statistics.median(self.values)

    def cells(self) -> list[str]:
        """Text of the columns."""
        spread = f"{_text(min(self.values))}–{_text(max(self.values))}"
        if len(self.values) == 1:
            spread = ""
        verdict = {True: "met", False: "MISSED", None: ""}[self.met]
        count = str(len(self.values))
        return [self.what, _text(self.median), spread, count, self.unit, self.target, verdict]


HEADER = ["measured", "median", "range", "n", "unit", "target", "result"]


def at_least(what: str, values: Sequence[float], unit: str, target: float) -> Row:
    """A row whose median should reach the target."""
    met = statistics.median(values) >= target
    return Row(what, tuple(values), unit, f">= {target:g}", met)


def at_most(what: str, values: Sequence[float], unit: str, target: float) -> Row:
    """A row whose median should not exceed the target."""
    met = statistics.median(values) <= target
    return Row(what, tuple(values), unit, f"<= {target:g}", met)


def _text(value: float) -> str:
    # From 999.5 on three digits would be written 1e+03.
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:,.0f}"


def show(title: str, rows: Sequence[Row]) -> None:
    """Print a table and flush."""
    cells = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(HEADER))]
    print(f"\n{title}")
    for line in cells:
        print("  " + "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip())
    sys.stdout.flush()


def markdown(rows: Sequence[Row]) -> str:
    """The table as GitHub writes tables; numbers to the right."""
    cells = [HEADER, ["---", "---:", "---:", "---:", "---", "---", "---"]]
    cells += [[c.replace("|", "\\|") for c in row.cells()] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def save(path: str, rows: Sequence[Row]) -> None:
    """Write the rows as JSON where a path is given."""
    if path:
        text = json.dumps([dataclasses.asdict(row) for row in rows], indent=1)
        pathlib.Path(path).write_text(text + "\n")


def load(path: pathlib.Path) -> list[Row]:
    """Rows that :func:`save` wrote."""
    return [Row(**{**row, "values": tuple(row["values"])}) for row in json.loads(path.read_text())]


def rounds(
    ways: Mapping[str, Callable[[], object]],
    count: int,
    *,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Time every way once per round, in an order rotated from round to round, so that a machine
    that slows down does so for all.

    Args:
        ways: Name → what to run; where it returns a float, those are its seconds, else the call is
            timed.
        count: Rounds that count.
        warm_up: Rounds before them.
        clock: Of the calls.

    Returns:
        Name → seconds per round.
    """
    names, seconds = list(ways), {name: [] for name in ways}
    for turn in range(-warm_up, count):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            begin = clock()
            own = ways[name]()
            took = own if isinstance(own, float) else clock() - begin
            if turn >= 0:
                seconds[name].append(took)
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Round by round."""
    return [a / b for a, b in zip(above, below, strict=True)]
