"""What the predecessor's recorded runs say when their signs are kept and repeats counted once."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from healing.config.presets import MODELS
from healing.reporting.escaping import markdown as escape
from healing.reporting.phrases import interval_text, number_text
from healing.statistics.intervals import DegenerateDataWarning, Interval, t_interval

HEADER_NOTE = (
    "These runs were measured with the predecessor's instrument and are never pooled with others. "
    "*Change* is 100·(after − before)/before of the effective rank, signed: positive = the attack "
    "raised it. *Recorded* is their rank (singular values over 0.01, not renormalised), *all "
    "singular values* the rank computed anew from what they stored, still uncentred and with "
    "first tokens and padding. Runs that record the same numbers count once; intervals are "
    "Student t over distinct runs, from three on."
)


@dataclass(frozen=True)
class LegacyResult:
    """One imported run as the summary sees it.

    Attributes:
        run_id: Where it is stored.
        name: Study and folder.
        kind: ``attack`` or ``heal``.
        model: Size.
        arm: Attack method (arm).
        optimizer: Of the attack.
        precision: Of the weights.
        results: Equal for runs that record the same numbers.
        healthy_rank: Recorded, before the attack.
        collapsed_rank: Recorded, after it.
        change_pct: Signed change of the recorded rank.
        rederived_change_pct: The same from all stored singular values; NaN where none are stored.
        published_recovery_pct: Of a healing run, as recorded (clamped to 0–100).
        recovery_pct: The same formula unclamped.
        undefined_reason: Why a healing run says nothing of recovery; empty where it may.
    """

    run_id: str
    name: str
    kind: str
    model: str
    arm: str
    optimizer: str
    precision: str
    results: str
    healthy_rank: float
    collapsed_rank: float
    change_pct: float
    rederived_change_pct: float = math.nan
    published_recovery_pct: float = math.nan
    recovery_pct: float = math.nan
    undefined_reason: str = ""


@dataclass(frozen=True)
class LegacyGroup:
    """Attack runs of one model, arm, optimiser and precision.

    Attributes:
        model: Size.
        arm: Attack method (arm).
        optimizer: Of the attack.
        precision: Of the weights.
        n_recorded: Runs.
        n_distinct: Runs that record different numbers: the independent units.
        n_up: Distinct runs whose recorded rank rose.
        n_down: Distinct runs whose recorded rank fell.
        absolute_pct: Mean of the absolute changes (what was published as "rank reduction").
        change: Signed change of the recorded rank (%).
        rederived: Signed change of the rank from all singular values (%).
        rederived_up: Distinct runs in which that rank rose.
    """

    model: str
    arm: str
    optimizer: str
    precision: str
    n_recorded: int
    n_distinct: int
    n_up: int
    n_down: int
    absolute_pct: float
    change: Interval
    rederived: Interval
    rederived_up: int


@dataclass(frozen=True)
class LegacySummary:
    """The table of attacks and the healing runs one by one."""

    groups: tuple[LegacyGroup, ...]
    healing: tuple[LegacyResult, ...]
    confidence: float


def distinct(results: Iterable[LegacyResult]) -> list[LegacyResult]:
    """The first of all runs that record the same numbers."""
    first: dict[str, LegacyResult] = {}
    for result in results:
        first.setdefault(result.results, result)
    return list(first.values())


def _interval(values: Sequence[float], confidence: float) -> Interval:
    with warnings.catch_warnings():
        # Under three runs the table says "no interval" itself.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return t_interval(values, confidence)


def _group(runs: Sequence[LegacyResult], confidence: float) -> LegacyGroup:
    first, own = runs[0], distinct(runs)
    changes = [r.change_pct for r in own]
    return LegacyGroup(
        first.model,
        first.arm,
        first.optimizer,
        first.precision,
        n_recorded=len(runs),
        n_distinct=len(own),
        n_up=sum(c > 0 for c in changes),
        n_down=sum(c < 0 for c in changes),
        absolute_pct=math.fsum(map(abs, changes)) / len(changes),
        change=_interval(changes, confidence),
        rederived=_interval([r.rederived_change_pct for r in own], confidence),
        rederived_up=sum(r.rederived_change_pct > 0 for r in own),
    )


def _order(result: LegacyResult) -> tuple[int, str, str, str, str]:
    place = MODELS.index(result.model) if result.model in MODELS else len(MODELS)
    return place, result.model, result.arm, result.optimizer, result.precision


def summarize_legacy(results: Sequence[LegacyResult], confidence: float) -> LegacySummary:
    """Group the attack runs by model, arm, optimiser and precision; list the healing runs.

    Args:
        results: Imported runs.
        confidence: Level of the intervals.
    """
    grouped: dict[tuple[int, str, str, str, str], list[LegacyResult]] = {}
    for result in sorted(results, key=lambda r: (*_order(r), r.name)):
        if result.kind == "attack":
            grouped.setdefault(_order(result), []).append(result)
    healing = sorted(distinct(r for r in results if r.kind == "heal"), key=lambda r: r.name)
    return LegacySummary(
        tuple(_group(runs, confidence) for runs in grouped.values()), tuple(healing), confidence
    )


def table(summary: LegacySummary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of attacks."""
    level = f"{100 * summary.confidence:g} %"
    header = [
        "model", "arm", "optimiser", "precision", "distinct runs (recorded)", "rose / fell",
        "mean of absolute changes %", f"change, recorded % [{level}]",
        f"change, all singular values % [{level}]",
    ]  # fmt: skip
    rows = [
        [
            g.model, g.arm, g.optimizer, g.precision, f"{g.n_distinct} ({g.n_recorded})",
            f"{g.n_up} / {g.n_down}", number_text(g.absolute_pct), interval_text(g.change),
            interval_text(g.rederived),
        ]
        for g in summary.groups
    ]  # fmt: skip
    return header, rows


def healing_sentence(summary: LegacySummary) -> str:
    """What holds of the healing runs, in one sentence."""
    runs = summary.healing
    if not runs:
        return "No healing run was recorded."
    rose = [r for r in runs if r.change_pct > 0]
    small = [r for r in runs if r.change_pct <= 0 and r.undefined_reason]
    parts = [
        f"Of {len(runs)} healing runs the attack had raised the rank in {len(rose)}: "
        "there recovery is undefined, for nothing had collapsed"
    ]
    if small:
        parts.append(
            f"in {len(small)} the rank had fallen by less than can be told from no change "
            "(5 % of healthy): undefined as well"
        )
    left = len(runs) - len(rose) - len(small)
    parts.append(f"in {left} it is defined")
    return "; ".join(parts) + "."


def healing_lines(summary: LegacySummary) -> list[str]:
    """The healing runs one by one."""
    return [
        f"{r.name}: rank {r.healthy_rank:.4f} → {r.collapsed_rank:.4f} by the attack "
        f"({r.change_pct:+.2f} %); recovery recorded as {r.published_recovery_pct:.2f} %, "
        f"by the formula {r.recovery_pct:.2f} %, "
        + (f"undefined: {r.undefined_reason}" if r.undefined_reason else "defined")
        for r in summary.healing
    ]


def text(summary: LegacySummary) -> str:
    """Table and healing runs for a terminal."""
    header, rows = table(summary)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, ["-" * w for w in widths], *rows]
    ]
    return "\n".join([*lines, "", healing_sentence(summary), *healing_lines(summary)])


def markdown(summary: LegacySummary) -> str:
    """Table and healing runs as Markdown (``legacy_summary.md``)."""
    header, rows = table(summary)
    lines = ["# The predecessor's recorded runs", "", HEADER_NOTE, ""]
    first, *others = (f"| {' | '.join(map(escape, row))} |" for row in (header, *rows))
    lines += [first, f"|{'---|' * len(header)}", *others]
    lines += ["", "## Healing", "", healing_sentence(summary), ""]
    return "\n".join([*lines, *(f"- {escape(line)}" for line in healing_lines(summary)), ""])


def group_rows(summary: LegacySummary) -> list[dict[str, Any]]:
    """One flat row per group, for CSV."""
    return [
        {
            "model": g.model,
            "arm": g.arm,
            "optimizer": g.optimizer,
            "precision": g.precision,
            "recorded": g.n_recorded,
            "distinct": g.n_distinct,
            "rose": g.n_up,
            "fell": g.n_down,
            "mean_absolute_change_pct": g.absolute_pct,
            "change_mean_pct": g.change.point,
            "change_low_pct": g.change.low,
            "change_high_pct": g.change.high,
            "rederived_rose": g.rederived_up,
            "rederived_change_mean_pct": g.rederived.point,
            "rederived_change_low_pct": g.rederived.low,
            "rederived_change_high_pct": g.rederived.high,
        }
        for g in summary.groups
    ]


def as_json(summary: LegacySummary) -> dict[str, Any]:
    """The summary as plain data (``legacy_summary.json``)."""
    return {**dataclasses.asdict(summary), "statement": healing_sentence(summary)}
