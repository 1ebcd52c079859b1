"""The tables of a summary as rows of text, the same for Markdown, HTML and the terminal."""

from __future__ import annotations

import dataclasses
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
    Verdict,
)
from healing.registry import SHAM
from healing.reporting.escaping import one_line
from healing.reporting.phrases import (
    asymptote_texts,
    duration,
    group_estimate,
    interval_text,
    laws_text,
    median_text,
    number_text,
    shown_label,
    time_text,
)
from healing.reporting.verdict_context import (
    MEASURES,
    PRIMARY_MEASURE,
)
from healing.reporting.verdict_sentences import (
    OUTCOMES,
    ZONE_NAMES,
    verdict_cell,
)
from healing.statistics.checkpoint_estimates import HalfTimes
from healing.statistics.fits.asymptotes import FLAT_GAIN, MIN_MEASUREMENTS
from healing.statistics.group import GroupSummary
from healing.statistics.heal_runs import SHAM_ENDPOINTS, UNIGRAM
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS
from healing.statistics.summary import Summary
from healing.statistics.verdicts import GroupVerdict

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
    f"Verdict on the rank within this budget and by this healer: *{OUTCOMES[Verdict.REVERSIBLE]}* "
    f"(*healed* only where the loss is too), *{OUTCOMES[Verdict.IRREVERSIBLE]}* under "
    f"{IRREVERSIBLE_BELOW:g} %, *{OUTCOMES[Verdict.PARTIAL]}* between, "
    f"*{OUTCOMES[Verdict.FURTHER]}* under {FURTHER_BELOW:g} %. It needs two things: the interval "
    "of the mean lies there, and the mean would still lie there if as many checkpoints as the "
    "count leaves open (one-sided Clopper–Pearson bound) healed fully, or not at all. *Too few*: "
    "the checkpoints are counted and decide nothing about others; *undecided*: interval or count "
    "allow more than one verdict; *undefined*: the attack did not change the rank measurably."
)


@dataclass(frozen=True)
class Table:
    """One table: heading, header, rows, and what a reader must know; empty without rows."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str


_SHAM_NAMES = {e: f"{e.partition('_')[0]} against the sham" for e in SHAM_ENDPOINTS}
_NAMES = {
    **_SHAM_NAMES,
    UNIGRAM: "loss of the unigram model",
    "ppl_improvement_pct": "perplexity",
}


def endpoint_name(endpoint: str) -> str:
    """What a column calls an endpoint: ``rank_recovery_pct`` → ``rank``."""
    plain = endpoint.removesuffix("_pct").replace("_recovery", "").replace("_", " ")
    return _NAMES.get(endpoint, plain)


def _row(group: GroupSummary, summary: Summary, *cells: str) -> tuple[str, ...]:
    return (group.model, shown_label(group, summary.groups), *cells)


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
        verdict_cell(group),
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
    return endpoint_name(endpoint).replace(" against", " recovery against")


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
        "with an exponential and a power-law approach; AICc chooses. A limit is given only where "
        f"every checkpoint has {MIN_MEASUREMENTS} measurements and a fit that converged, and where "
        "the last quarter of the steps is flat: the 90 % interval of what it gains lies within "
        f"±{FLAT_GAIN:g} points. Its interval, over checkpoints, reaches from what is there to "
        "what a tail of t^−½ would still bring; a slower one would bring more. A learning rate "
        "that decays levels everything off: the limit is that of the schedule."
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
            OUTCOMES[plan.verdict],
        ),
    )
    note = (
        "Checkpoints in all that would give the verdict on whose side the mean lies with 80 % "
        "probability, if the observed mean and spread were the true ones. From three checkpoints "
        "these are orders of magnitude."
    )
    return Table("Checkpoints needed for a verdict", header, rows, note)


def _count_cell(found: GroupVerdict) -> str:
    """Checkpoints by zone: ``3 under …, 1 between …``."""
    return ", ".join(f"{n} {ZONE_NAMES[v]}" for v, n in found.counts.items()) or "–"


def _zone_cell(found: GroupVerdict) -> str:
    if found.verdict in OUTCOMES:
        return OUTCOMES[found.verdict]
    return "too few" if found.verdict == Verdict.TOO_FEW else "undecided"


def budget_table(summary: Summary) -> Table:
    """The verdict as a function of the budget."""
    header = (
        "model", "arm", "endpoint", "steps", "tokens", f"recovery % {_level(summary)}",
        "checkpoints", "verdict",
    )  # fmt: skip
    rows = tuple(
        _row(
            g,
            summary,
            endpoint_name(endpoint),
            str(point.step),
            duration(point.tokens) if point.tokens else "unknown",
            interval_text(point.verdict.interval),
            _count_cell(point.verdict),
            _zone_cell(point.verdict),
        )
        for g in summary.groups
        for endpoint, points in g.by_budget.items()
        for point in points
        if point.verdict.n and g.role != SHAM
    )
    note = (
        "By the same rule at the measured steps nearest to an eighth, a quarter and half of the "
        "window and at its end. A verdict is the budget's and the healer's before it is the "
        "model's."
    )
    return Table("Verdict by budget", header, rows, note)


def panel_table(summary: Summary) -> Table:
    """Recovery by every measure beside the primary one."""
    header = (
        "model", "arm", "measure", f"recovery % {_level(summary)}", "checkpoints", "verdict",
    )  # fmt: skip
    rows = []
    for g in summary.groups:
        primary = g.verdicts["rank_recovery_pct"]
        if primary.side is None or not g.panel:
            continue
        named = {PRIMARY_MEASURE.removeprefix("the "): primary}
        named |= {MEASURES[m]: found for m, found in g.panel.items()}
        for name, found in named.items():
            apart = " (differs)" if found.side not in (None, primary.side) else ""
            cells = interval_text(found.interval), _count_cell(found), _zone_cell(found) + apart
            rows.append(_row(g, summary, name, *cells))
    note = (
        f"The first is the primary one, fixed in advance: {PRIMARY_MEASURE}. The others are of the "
        "same states and the same probe. *Differs*: interval, or most checkpoints, on another side "
        "of a threshold. Not among them, since it is not stored: other probes, other lengths of "
        "windows, and spectra with outlying tokens left in."
    )
    return Table("By other measures", header, tuple(rows), note)


def damage_table(summary: Summary) -> Table:
    """What every attack did, and how far it went."""
    header = (
        "model", "arm", "rank taken (%)", "loss at the start of healing (nats)",
        "loss at its end (nats)", "weight distance",
    )  # fmt: skip
    rows = tuple(
        _row(
            g,
            summary,
            number_text(g.damage.rank_reduction_pct),
            number_text(g.damage.start_loss, 2),
            number_text(g.damage.final_loss, 2),
            number_text(g.damage.weight_change, 2),
        )
        for g in summary.groups
        if any(map(math.isfinite, dataclasses.astuple(g.damage)))
    )
    note = (
        "Means over checkpoints. Rank taken: share of the healthy effective rank that the attack "
        "took. Weight distance: ‖W−W₀‖/‖W₀‖ of the collapsed weights. Arms that differ in these "
        "differ in more than their idea."
    )
    return Table("What the attacks did", header, rows, note)


def secondary_tables(summary: Summary) -> Sequence[Table]:
    """All tables after the main one that have rows, in the order of the report."""
    made = (
        damage_table, budget_table, panel_table, sham_table, half_table, bootstrap_table,
        variance_table, asymptote_table, plan_table,
    )  # fmt: skip
    return [table for table in (make(summary) for make in made) if table.rows]
