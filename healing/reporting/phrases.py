"""What a summary says, in sentences: one wording for Markdown, HTML and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Sequence

from healing.measurements.recovery import (
    DECIDED,
    FURTHER_BELOW,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.registry import TREATMENT
from healing.statistics.checkpoint_estimates import Asymptotes, VerdictPlan
from healing.statistics.heal_runs import UNIGRAM
from healing.statistics.intervals import Interval
from healing.statistics.summary import GroupSummary, Summary
from healing.statistics.verdicts import MIN_VERDICT_CHECKPOINTS, GroupVerdict, Open

RANK, LOSS = "rank_recovery_pct", "loss_recovery_pct"
VERDICT_NAMES = {
    Verdict.IRREVERSIBLE: "Irreversible Pathology",
    Verdict.REVERSIBLE: "Acute Structural Failure",
    Verdict.PARTIAL: "Partial Recovery",
    Verdict.FURTHER: "Further Collapse",
    Verdict.TOO_FEW: "Too Few Checkpoints",
    Verdict.INCONCLUSIVE: "Inconclusive",
    Verdict.UNDEFINED: "Undefined",
}
"""Verdicts as headlines and papers name them."""


def number_text(value: float, digits: int = 1) -> str:
    """A number for people; NaN is an en dash."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def percent_text(value: float) -> str:
    """``12.3 %``, or ``undefined``."""
    return "undefined" if math.isnan(value) else f"{value:.1f} %"


def interval_text(interval: Interval) -> str:
    """Point and bounds: ``12.3 [8.1, 16.5]``; without bounds the point and ``[no interval]``."""
    if math.isnan(interval.point):
        return "undefined"
    if not interval.defined:
        return f"{interval.point:.1f} [no interval]"
    return f"{interval.point:.1f} [{interval.low:.1f}, {interval.high:.1f}]"


def group_label(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """Arm, with the settings' hash where the model has several settings of the arm."""
    twins = [g for g in groups if (g.model, g.arm) == (group.model, group.arm)]
    return group.arm if len(twins) == 1 else f"{group.arm} #{group.settings[:6]}"


def shown_label(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """As :func:`group_label`, with the arm's name instead of its identifier."""
    return group.label + group_label(group, groups).removeprefix(group.arm)


def count_text(n: int, noun: str) -> str:
    """``1 run``, ``3 runs``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def budget(group: GroupSummary) -> int | None:
    """Last healing step that all runs of a group measured; ``None`` without one."""
    steps = [band.steps[-1] for band in group.bands.values() if band.steps]
    return max(steps, default=None)


def estimate_text(interval: Interval, undefined: int = 0) -> str:
    """A recovery with its interval, in words: ``18.5 % (95 % interval 1.3 to 35.8 %, n = 3)``.

    Args:
        interval: In per cent.
        undefined: Checkpoints that n does not count, because their recovery is undefined.
    """
    if math.isnan(interval.point):
        return "undefined"
    n = f"n\u00a0=\u00a0{interval.n}"  # not parted at a line's end
    if undefined:
        n += f", {count_text(undefined, 'checkpoint')} undefined"
    if not interval.defined:
        return f"{interval.point:.1f} % (no interval, {n})"
    level = f"{100 * interval.confidence:g} % interval"
    bounds = f"{level} {interval.low:.1f} to {interval.high:.1f} %"
    return f"{interval.point:.1f} % ({bounds}, {n})"


def group_estimate(group: GroupSummary, endpoint: str) -> str:
    """As :func:`interval_text`; where checkpoints are undefined, with the n that is left."""
    interval, undefined = group.intervals[endpoint], group.undefined_checkpoints(endpoint)
    text = interval_text(interval)
    if undefined and not math.isnan(interval.point):
        text += f" (n = {interval.n}, {undefined} undefined)"
    return text


ZONE_NAMES = {
    Verdict.FURTHER: f"under {FURTHER_BELOW:g} %",
    Verdict.IRREVERSIBLE: f"under {IRREVERSIBLE_BELOW:g} %",
    Verdict.PARTIAL: f"between {IRREVERSIBLE_BELOW:g} and {REVERSIBLE_ABOVE:g} %",
    Verdict.REVERSIBLE: f"over {REVERSIBLE_ABOVE:g} %",
}
"""Where a checkpoint's recovery lies."""


def percent(share: float) -> str:
    """A share as ``63 %``; not rounded to nothing or everything."""
    value = 100.0 * share
    return f"{value:.0f} %" if 1.0 <= value <= 99.0 else f"{value:.2g} %"


def count_sentence(found: GroupVerdict) -> str:
    """What the count of checkpoints carries: ``3 of 3 checkpoints under (threshold): up to 63 % of
    others may do otherwise (one-sided 95 %, Clopper–Pearson)``.
    """
    if found.side is None:
        return ""
    noun = "checkpoint" if found.n == 1 else "checkpoints"
    others = (
        f"up to {percent(found.others_at_most)} of others may do otherwise (one-sided "
        f"{100 * found.interval.confidence:g} %, Clopper–Pearson)"
    )
    if found.n_on_side == found.n:
        return f"{found.n} of {found.n} {noun} {ZONE_NAMES[found.side]}: {others}"
    split = ", ".join(f"{n} {ZONE_NAMES[v]}" for v, n in found.counts.items())
    return f"of {found.n} {noun} {split}"


def _open_because(found: GroupVerdict) -> str:
    """Why a group has no verdict, without a full stop."""
    if found.why_open == Open.TOO_FEW:
        return f"a verdict takes at least {MIN_VERDICT_CHECKPOINTS} checkpoints"
    assert found.side is not None, "a group without a defined recovery is undefined"
    if found.why_open == Open.COUNT:
        needed = "" if found.n_needed is None else f"; {found.n_needed} that agree would decide"
        return (
            f"were these to do the opposite, the mean would be {found.worst_mean:.1f} %, no longer "
            f"{ZONE_NAMES[found.side]}{needed}"
        )
    if found.why_open == Open.SPLIT:
        return (
            f"the checkpoints split: {found.n_on_side} of {found.n} are "
            f"{ZONE_NAMES[found.side]}, and with as many others as that allows the mean would be "
            f"{found.worst_mean:.1f} %"
        )
    if found.why_open == Open.MISSING:
        what = count_text(found.n_missing, "checkpoint")
        return (
            f"{what} that {'was' if found.n_missing == 1 else 'were'} damaged and "
            f"{_has(found.n_missing)} no recovery would overturn “{ZONE_NAMES[found.side]}” in the "
            "worst case"
        )
    interval = found.interval
    crossed = [
        f"{t:g} %"
        for t in (FURTHER_BELOW, IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE)
        if interval.low <= t <= interval.high
    ]
    return f"the interval holds the threshold{'s' * (len(crossed) > 1)} {' and '.join(crossed)}"


HEALER_NOTE = (
    "A verdict holds for the healer and the budget that were used, and the default of 60 steps for "
    "the embedded models is neither the longest nor the strongest: with 480 steps at a learning "
    "rate of 3e-3 the HAEP states of seed 0 recovered 87.7 % of their rank on nano and 65.7 % on "
    "micro, whatever verdict 60 steps at 1e-3 give."
)
"""Measured with ``heal``; README."""


def healer_note(summary: Summary) -> str:
    """What belongs beside verdicts on the embedded models; empty where there are none."""
    embedded = {g.model for g in headline_groups(summary)} & {"nano", "micro"}
    return HEALER_NOTE if embedded else ""


def verdict_reason(group: GroupSummary) -> str:
    """Why the verdict on rank recovery is what it is: one sentence without its full stop."""
    found, steps = group.verdicts[RANK], budget(group)
    if found.verdict == Verdict.UNDEFINED:
        return (
            f"{group.n_undefined} of {count_text(group.n_runs, 'run')} {_has(group.n_undefined)} "
            "no defined rank recovery"
        )
    within = "" if steps is None else f" after {count_text(steps, 'healing step')}"
    estimate = estimate_text(group.intervals[RANK], group.undefined_checkpoints(RANK))
    reason = f"mean rank recovery{within} is {estimate}; {count_sentence(found)}"
    if found.verdict in DECIDED:
        return (
            f"{reason}; were these to do the opposite, the mean would still be "
            f"{found.worst_mean:.1f} %"
        )
    return f"{reason}; {_open_because(found)}"


def _has(n: int) -> str:
    return "has" if n == 1 else "have"


def loss_sentence(group: GroupSummary) -> str:
    """What recovery of the loss says, and whether it agrees with the rank."""
    interval = group.intervals[LOSS]
    if math.isnan(interval.point):
        return "Loss recovery is undefined."
    verdict = VERDICT_NAMES[group.verdict_loss].lower()
    estimate = estimate_text(interval, group.undefined_checkpoints(LOSS))
    text = f"The loss recovers by {estimate}, which on its own would be “{verdict}”"
    unigram = group.intervals.get(UNIGRAM)
    if unigram is not None and not math.isnan(unigram.point):
        text += (
            f" (for comparison: a model that knows only token frequencies scores "
            f"{unigram.point:.1f} %)"
        )
    both = {group.verdict, group.verdict_loss}
    if both <= set(DECIDED) and len(both) == 2:
        return f"{text}: rank and loss disagree, and the verdict is about the rank."
    return f"{text}."


def half_sentence(group: GroupSummary) -> str:
    """When half of the rank's damage was repaired; empty where no time is defined."""
    half = group.half_times.get(RANK)
    if half is None or half.curve.n == 0:
        return ""
    reached = half.curve.n - half.curve.n_censored
    counted = count_text(half.curve.n, "checkpoint")
    text = f"Half of the damage to the rank was repaired in {reached} of {counted}"
    median = half.curve.median
    if math.isnan(median.point):
        return f"{text}, so that the median time is not reached."
    tokens = group.half_recovery_tokens.get(RANK)
    seen = f" ({time_text(tokens, 'tokens')})" if tokens else ""
    return f"{text}; the median time is {steps_text(median)}{seen}."


def steps_text(interval: Interval) -> str:
    """A number of steps with bounds, ``12 [8, 30] steps``; an infinite bound is ``∞``."""
    return time_text(interval, "steps")


def time_text(interval: Interval, unit: str = "") -> str:
    """A time with its bounds and unit, ``12,800 [8,192, ∞] tokens``."""
    if math.isnan(interval.point):
        return "undefined"
    parts = [duration(interval.point), unit, "[no interval]"]
    if interval.defined:
        bounds = f"[{duration(interval.low)}, {duration(interval.high)}]"
        parts = [duration(interval.point), bounds, unit]
    return " ".join(filter(None, parts))


def duration(value: float) -> str:
    """A number of steps or tokens: three digits at least, thousands parted, ∞."""
    if math.isinf(value):
        return "∞"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def median_text(interval: Interval, unit: str = "") -> str:
    """A median time, or what is known of one that was not reached."""
    if interval.n == 0:
        return "undefined"
    if math.isnan(interval.point):
        beyond = math.isfinite(interval.low)
        return f"not reached [{duration(interval.low)}, ∞]" if beyond else "not reached"
    return time_text(interval, unit)


def asymptote_texts(found: Asymptotes) -> tuple[str, str]:
    """Fitted asymptote and half-life, or ``not converged`` with the number of fits that did."""
    if found.n_checkpoints == 0:
        return "undefined", "undefined"
    if not found.converged:
        reasons = "; ".join(found.reasons)
        lost = found.n_checkpoints - len(found.laws)
        return f"not converged in {lost} of {found.n_checkpoints} ({reasons})", "not converged"
    return f"{interval_text(found.asymptote)} %", steps_text(found.half_life)


def laws_text(found: Asymptotes) -> str:
    """How often AICc chose which law: ``exponential 2, power law 1``."""
    counts = {law: found.laws.count(law) for law in dict.fromkeys(found.laws)}
    return ", ".join(f"{law} {n}" for law, n in counts.items()) or "–"


def plan_sentence(plan: VerdictPlan) -> str:
    """How many checkpoints would decide an inconclusive verdict."""
    guess = (
        f"If the observed mean ({plan.mean:.1f} %) and spread (SD {plan.sd:.1f}) were the true "
        "ones,"
    )
    if plan.n_checkpoints is None:
        return f"{guess} no attainable number of checkpoints would give “{plan.verdict}”."
    return (
        f"{guess} {plan.n_checkpoints} checkpoints in all would give “{plan.verdict}” with "
        f"{100 * plan.power:g} % probability."
    )


def verdict_heading(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """``nano, HAEP: Irreversible Pathology within this budget``."""
    limit = " within this budget" if group.verdict == Verdict.IRREVERSIBLE else ""
    if group.verdict == Verdict.REVERSIBLE:
        limit = f" ({group.verdict.meaning})"
    return f"{group_name(group, groups)}: {VERDICT_NAMES[group.verdict]}{limit}"


def group_name(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """``nano, HAEP``."""
    return f"{group.model}, {shown_label(group, groups)}"


def context_sentences(group: GroupSummary) -> list[str]:
    """What belongs to a verdict: half-recovery, loss, and what would decide it."""
    plan = group.plans.get(RANK)
    sentences = [half_sentence(group), loss_sentence(group), plan_sentence(plan) if plan else ""]
    return [s for s in sentences if s]


def verdict_text(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """Verdict with its reason and what belongs to it; plain text."""
    first = f"{verdict_heading(group, groups)}: {verdict_reason(group)}."
    return " ".join([first, *context_sentences(group)])


def headline_groups(summary: Summary) -> list[GroupSummary]:
    """The groups that the question is about: the treatment's, or all where there is none."""
    return [g for g in summary.groups if g.role == TREATMENT] or list(summary.groups)
