"""What the tables say: recoveries of every checkpoint at every budget, and of groups of them.

Definitions are those of docs/method.md; intervals are the project's own
(:mod:`healing.statistics.intervals`). The unit is the checkpoint, which here is an attack's seed.
"""

from __future__ import annotations

import csv
import math
import pathlib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy import stats

from findings.runs import COLUMNS
from healing.config.arm_tags import SHAM_ARM
from healing.measurements.recovery import REVERSIBLE_ABOVE, recovery_pct
from healing.statistics.intervals import Interval, TooFewCheckpointsWarning, t_interval
from healing.statistics.verdicts import GroupVerdict, group_verdict, others_at_most

HEALTHY = -1
"""Step of the healthy state's row."""
ORDER = ("model", "arm", "seed", "healer", "step")
MEASURES = {
    "effective_rank": "effective rank, mean over blocks",
    "last_block_rank": "effective rank, last block",
    "min_block_rank": "effective rank, lowest block",
    "participation_ratio": "participation ratio",
    "loss": "loss",
}
"""Columns that a recovery is taken of; the first is the primary one, fixed in the protocol."""


@dataclass(frozen=True)
class Run:
    """One healing run.

    Attributes:
        model: As the table calls it.
        arm: Of the attack.
        seed: Of the attack.
        healer: Of the protocol.
        facts: What is said once a run.
        states: Step → measure → value; the healthy state is step −1.
    """

    model: str
    arm: str
    seed: int
    healer: str
    facts: Mapping[str, str]
    states: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def recovery(self, measure: str, step: int) -> float:
        """Percent of what the attack took from a measure that is back; NaN if it took nothing."""
        values = (self.states[at][measure] for at in (step, 0, HEALTHY))
        return recovery_pct(*values)

    @property
    def reduction(self) -> float:
        """Percent of the healthy rank that the attack took."""
        healthy, collapsed = (self.states[at]["effective_rank"] for at in (HEALTHY, 0))
        return 100.0 * (healthy - collapsed) / healthy

    @property
    def last(self) -> int:
        """Last measured step."""
        return max(self.states)


def read_rows(path: pathlib.Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """Rows of a table as they stand.

    Raises:
        ValueError: It has other columns.
    """
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != tuple(columns):
            raise ValueError(f"{path}: its columns are not {', '.join(columns)}")
        return list(rows)


def read(path: pathlib.Path) -> list[Run]:
    """Runs of a table, in its order.

    Raises:
        ValueError: It is no table of findings.
    """
    found: dict[tuple[str, str, int, str], tuple[dict[str, str], dict[int, dict]]] = {}
    for row in read_rows(path):
        key = (row["model"], row["arm"], int(row["seed"]), row["healer"])
        _, states = found.setdefault(key, (row, {}))
        names = (*MEASURES, "accuracy", "tokens")
        states[int(row["step"])] = {name: float(row[name]) for name in names}
    return [Run(*key, facts, states) for key, (facts, states) in found.items()]


def write(
    path: pathlib.Path,
    rows: Iterable[Mapping[str, object]],
    columns: Sequence[str] = COLUMNS,
    order: Sequence[str] = ORDER,
) -> None:
    """Rows as a table, sorted by some of its columns: the same rows give the same bytes."""
    listed = sorted(rows, key=lambda row: [_comparable(row[name]) for name in order])
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(listed)


def _comparable(value: object) -> tuple[int, object]:
    text = str(value)
    number = text.removeprefix("-").isdecimal()
    return (0, int(text)) if number else (1, text)


def bounds(interval: Interval, digits: int = 0) -> str:
    """``87 [83, 90]``; the mean alone where there are too few checkpoints."""
    text = f"{interval.point:.{digits}f}"
    if math.isnan(interval.low):
        return text
    return f"{text} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


@dataclass(frozen=True)
class Group:
    """The checkpoints of one model, arm and healer at one step."""

    runs: tuple[Run, ...]
    step: int

    @property
    def n(self) -> int:
        """Checkpoints."""
        return len(self.runs)

    def recoveries(self, measure: str = "effective_rank") -> list[float]:
        """Percent, by checkpoint."""
        return [run.recovery(measure, self.step) for run in self.runs]

    def interval(self, measure: str = "effective_rank") -> Interval:
        """Student t interval of the mean recovery, percent."""
        return t_interval(self.recoveries(measure))

    def verdict(self) -> GroupVerdict:
        """By the project's rule for groups (docs/method.md): stricter than the protocol's."""
        return group_verdict(self.recoveries())

    def above(self, limit: float = REVERSIBLE_ABOVE) -> int:
        """Checkpoints whose rank recovery lies above a limit."""
        return sum(value > limit for value in self.recoveries())

    def mean(self, measure: str, step: int | None = None) -> float:
        """Mean of a measure itself over checkpoints."""
        at = self.step if step is None else step
        return float(np.mean([run.states[at][measure] for run in self.runs]))


def share_bounds(count: int, n: int) -> tuple[float, float]:
    """Clopper–Pearson bounds of a share, percent; 95 % one-sided each way."""
    low = 1.0 - float(others_at_most(count, n))
    return 100.0 * low, 100.0 * float(others_at_most(n - count, n))


def group(runs: Sequence[Run], model: str, arm: str, healer: str, step: int) -> Group | None:
    """The checkpoints that were measured at a step; ``None`` where there are none."""
    own = [r for r in runs if (r.model, r.arm, r.healer) == (model, arm, healer)]
    own = [r for r in own if step in r.states]
    return Group(tuple(own), step) if own else None


def paired(one: Group, other: Group, measure: str = "effective_rank") -> list[float]:
    """Differences of recovery in points, of the seeds that both have."""
    others = {run.seed: run for run in other.runs}
    return [
        run.recovery(measure, one.step) - others[run.seed].recovery(measure, other.step)
        for run in one.runs
        if run.seed in others
    ]


def excess_loss(own: Group, sham: Group) -> Interval:
    """Loss above the sham's mean at the same step, nats per token: what is still not known."""
    reference = sham.mean("loss")
    with warnings.catch_warnings():
        # One run gives a point without bounds, and the page shows it as such.
        warnings.simplefilter("ignore", TooFewCheckpointsWarning)
        return t_interval([run.states[own.step]["loss"] - reference for run in own.runs])


def pairs_needed(differences: Sequence[float], margin: float = 10.0) -> int | None:
    """Pairs for a 95 % interval of ± ``margin`` points at this spread; ``None`` below two pairs."""
    if len(differences) < 2:
        return None
    spread = float(np.std(differences, ddof=1))
    for n in range(2, 10_000):
        if stats.t.ppf(0.975, n - 1) * spread / math.sqrt(n) <= margin:
            return n
    return None


def sham_of(runs: Sequence[Run], model: str, healer: str, step: int) -> Group | None:
    """The healthy model through the same healing."""
    return group(runs, model, SHAM_ARM, healer, step)
