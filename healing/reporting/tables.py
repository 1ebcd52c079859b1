"""The tables of a summary as rows of text, the same for Markdown, HTML and the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from healing.measurements.diagnosis import (
    DIVERGED,
    FORMAT_OVERFLOW,
    LOCKOUT,
    NONFINITE_STEPS,
    OPTIMISER_ARTIFACT,
)
from healing.measurements.recovery import (
    FURTHER_BELOW,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.registry import SHAM
from healing.reporting.escaping import one_line
from healing.reporting.phrases import (
    asymptote_texts,
    group_estimate,
    group_label,
    interval_text,
    laws_text,
    median_text,
    number_text,
    time_text,
)
from healing.statistics.checkpoint_estimates import HalfTimes
from healing.statistics.heal_runs import SHAM_ENDPOINTS
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS
from healing.statistics.summary import GroupSummary, Summary

T = TypeVar("T")

STATUS_LABELS = {
    LOCKOUT: "locked out",
    FORMAT_OVERFLOW: "overflowed the format",
    OPTIMISER_ARTIFACT: "optimiser artefact",
    DIVERGED: "diverged",
    NONFINITE_STEPS: "with non-finite steps",
}
"""What the tables say of runs that are not simply ``ok``."""
VERDICT_MEANING = (
    f"Verdict by rank recovery within this budget: *{Verdict.REVERSIBLE}* (it heals) over "
    f"{REVERSIBLE_ABOVE:g} %, *{Verdict.IRREVERSIBLE}* under {IRREVERSIBLE_BELOW:g} %, "
    f"*{Verdict.PARTIAL}* between, *{Verdict.FURTHER}* under {FURTHER_BELOW:g} %. It needs two "
    "things: the interval of the mean lies there, and the mean would still lie there if as many "
    "checkpoints as the count leaves open (one-sided Clopper–Pearson bound) healed fully, or not "
    f"at all. *{Verdict.TOO_FEW}*: they agree, but too few to carry it; *{Verdict.INCONCLUSIVE}*: "
    f"they do not; *{Verdict.UNDEFINED}*: the attack did not change the rank measurably."
)


@dataclass(frozen=True)
class Table:
    """One table: heading, header, rows, and what a reader must know; empty without rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


def endpoint_name(endpoint: str) -> str:
    """``rank_recovery_pct`` → ``rank``, ``ppl_improvement_pct`` → ``ppl improvement``."""
    return endpoint.removesuffix("_pct").replace("_recovery", "").replace("_", " ")


def _row(group: GroupSummary, summary: Summary, *cells: str) -> tuple[str, ...]:
    return (group.model, group_label(group, summary.groups), *cells)


def _endpoint_rows(
    summary: Summary,
    found: Callable[[GroupSummary], Mapping[str, T]],
    cells: Callable[[GroupSummary, str, T], tuple[str, ...]],
) -> tuple[tuple[str, ...], ...]:
    """A row for every group and endpoint that has a result: model, arm, endpoint, then the cells.

    Args:
        summary: Its groups.
        found: Endpoint → result of a group.
        cells: Of a group, an endpoint and its result.
    """
    return tuple(
        _row(g, summary, endpoint_name(endpoint), *cells(g, endpoint, result))
        for g in summary.groups
        for endpoint, result in found(g).items()
    )


def _level(summary: Summary) -> str:
    return f"[{100 * summary.confidence:g} %]"


def _main_row(group: GroupSummary, summary: Summary) -> tuple[str, ...]:
    states = ", ".join(f"{count} {state}" for state, count in group.spectral_states.items())
    unwell = [f"{group.statuses[s]} {t}" for s, t in STATUS_LABELS.items() if s in group.statuses]
    if unwell:
        states += f" ({', '.join(unwell)})"
    return _row(
        group,
        summary,
        f"{group.n_checkpoints} ({group.n_runs})",
        states,
        *(group_estimate(group, endpoint) for endpoint in PRIMARY_ENDPOINTS),
        group.verdict.shown,
    )


def main_table(summary: Summary) -> Table:
    """Every group with its recoveries and verdict."""
    level = _level(summary)
    header = (
        "model", "arm", "checkpoints (runs)", "after the attack", f"rank recovery % {level}",
        f"loss recovery % {level}", "verdict",
    )  # fmt: skip
    rows = tuple(_main_row(g, summary) for g in summary.groups)
    return Table("Recovery of every group", header, rows, VERDICT_MEANING)


def text_table(summary: Summary) -> str:
    """The main table for a terminal."""
    table = main_table(summary)
    lines = [[one_line(cell) for cell in row] for row in (table.header, *table.rows)]
    widths = [max(len(row[i]) for row in lines) for i in range(len(table.header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in lines
    )


def sham_table(summary: Summary) -> Table:
    """Recoveries referred to the sham."""
    header = ("model", "arm", *(f"{_against_sham(e)} (%)" for e in SHAM_ENDPOINTS))
    rows = tuple(
        _row(g, summary, *(group_estimate(g, e) for e in SHAM_ENDPOINTS))
        for g in summary.groups
        if set(SHAM_ENDPOINTS) <= g.intervals.keys()
    )
    note = (
        "100·(now − collapsed)/(sham − collapsed), the sham being the healthy model after the same "
        "fine-tuning steps on the same batches."
    )
    return Table("Recovery against the sham", header, rows, note)


def _against_sham(endpoint: str) -> str:
    return f"{endpoint_name(endpoint).removesuffix(' sham')} recovery against the sham"


def bootstrap_table(summary: Summary) -> Table:
    """BCa intervals beside the t intervals, where there are enough checkpoints."""
    level = _level(summary)
    header = ("model", "arm", "endpoint", "n", f"Student t {level}", f"BCa bootstrap {level}")
    rows = _endpoint_rows(
        summary,
        lambda g: {e: bca for e, bca in g.bootstrap.items() if bca.defined},
        lambda g, e, bca: (str(bca.n), interval_text(g.intervals[e]), interval_text(bca)),
    )
    note = (
        "Per cent. BCa (Efron 1987; 9,999 resamples of checkpoint means) assumes no normal "
        "distribution, but is too narrow for few checkpoints (for ten normal ones a 95 % interval "
        "holds the true mean in about 90 % of cases); verdicts are read from the t interval."
    )
    return Table("Bootstrap beside the t interval", header, rows, note)


def _half_cells(group: GroupSummary, endpoint: str, half: HalfTimes) -> tuple[str, ...]:
    tokens = group.half_recovery_tokens.get(endpoint)
    mean = half.geometric_mean
    reached = f"{half.curve.n - half.curve.n_censored} of {half.curve.n}"
    return (
        reached if half.curve.n else "undefined",
        median_text(half.curve.median),
        median_text(tokens) if tokens else "unknown",
        "–" if math.isnan(mean.point) else time_text(mean),
    )


def half_table(summary: Summary) -> Table:
    """Half-recovery times in steps and tokens; the sham has none by design."""
    level = _level(summary)
    header = (
        "model", "arm", "endpoint", "checkpoints half repaired", f"median steps {level}",
        f"median tokens {level}", f"geometric mean steps {level}",
    )  # fmt: skip
    rows = _endpoint_rows(summary, lambda g: g.half_times if g.role != SHAM else {}, _half_cells)
    note = (
        "First step at which a checkpoint's mean trajectory reaches 50 %; checkpoints that do not "
        "are right-censored at their last step. Median: Kaplan–Meier, its upper bound is ∞ for six "
        "checkpoints or fewer. Geometric mean: Student t on the log scale, only where no "
        "checkpoint is censored. Tokens are steps times batch size times sequence length."
    )
    return Table("Time to half recovery", header, rows, note)


def variance_table(summary: Summary) -> Table:
    """How the variance of final recovery splits, where replicates determine it."""
    header = (
        "model", "arm", "endpoint", "checkpoints (runs)", "variance between checkpoints",
        "variance within", "ICC",
    )  # fmt: skip
    rows = _endpoint_rows(
        summary,
        lambda g: {e: found for e, found in g.variance.items() if not math.isnan(found.icc)},
        lambda _group, _endpoint, found: (
            f"{found.n_checkpoints} ({found.n_replicates})",
            number_text(found.between),
            number_text(found.within),
            number_text(found.icc, 2),
        ),
    )
    note = (
        "Squared points, by analysis of variance of replicates nested in checkpoints; ICC = "
        "between/(between + within). The estimates are unbiased and can therefore be negative: "
        "read a negative one as zero. An ICC near 1 says that more healing runs of the same "
        "checkpoints add little: only more checkpoints narrow the interval. From few checkpoints "
        "all three are rough."
    )
    return Table("Where the variance comes from", header, rows, note)


def asymptote_table(summary: Summary) -> Table:
    """Fitted asymptotes and half-lives."""
    header = ("model", "arm", "endpoint", "asymptote", "half-life", "law (checkpoints)")
    rows = _endpoint_rows(
        summary,
        lambda g: g.asymptotes,
        lambda _group, _endpoint, found: (*asymptote_texts(found), laws_text(found)),
    )
    note = (
        "Each checkpoint's mean trajectory (over its replicates with a defined recovery) is fitted "
        "with an exponential and a power-law approach; AICc chooses. Asymptote and half-life are "
        "Student t intervals over checkpoints, given only where every checkpoint's fit converged. "
        "Both extrapolate beyond the measured steps: where noise hides a slow tail, the asymptote "
        "is too low."
    )
    return Table("Fitted asymptotes and half-lives", header, rows, note)


def plan_table(summary: Summary) -> Table:
    """Checkpoints that inconclusive verdicts need."""
    header = ("model", "arm", "endpoint", "checkpoints now", "needed in all", "for the verdict")
    rows = _endpoint_rows(
        summary,
        lambda g: g.plans,
        lambda g, endpoint, plan: (
            str(g.intervals[endpoint].n),
            "out of reach" if plan.n_checkpoints is None else str(plan.n_checkpoints),
            plan.verdict.shown,
        ),
    )
    note = (
        "Checkpoints in all that would give the verdict on whose side the mean lies with 80 % "
        "probability, if the observed mean and spread were the true ones. From three checkpoints "
        "these are orders of magnitude."
    )
    return Table("Checkpoints needed for a verdict", header, rows, note)


def secondary_tables(summary: Summary) -> Sequence[Table]:
    """All tables after the main one that have rows, in the order of the report."""
    made = (
        sham_table, half_table, bootstrap_table, variance_table, asymptote_table, plan_table,
    )  # fmt: skip
    return [table for table in (make(summary) for make in made) if table.rows]
