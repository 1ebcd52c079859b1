"""What a summary says, in sentences: one wording for Markdown, HTML and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from healing.measurements.recovery import (
    DECIDED,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.registry import TREATMENT
from healing.statistics.checkpoint_estimates import Asymptotes, VerdictPlan
from healing.statistics.heal_runs import UNIGRAM
from healing.statistics.intervals import MIN_CHECKPOINTS, Interval
from healing.statistics.summary import GroupSummary, Summary

RANK, LOSS = "rank_recovery_pct", "loss_recovery_pct"
VERDICT_NAMES = {
    Verdict.IRREVERSIBLE: "Irreversible Pathology",
    Verdict.REVERSIBLE: "Acute Structural Failure",
    Verdict.PARTIAL: "Partial Recovery",
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


def _inconclusive_because(interval: Interval) -> str:
    if not interval.defined:
        if interval.n < MIN_CHECKPOINTS:
            return f"an interval takes at least {MIN_CHECKPOINTS} checkpoints"
        return "the checkpoints do not differ, so that their spread gives no interval"
    crossed = [
        f"{t:g} %"
        for t in (IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE)
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
    interval, steps = group.intervals[RANK], budget(group)
    within = "" if steps is None else f" after {count_text(steps, 'healing step')}"
    estimate = estimate_text(interval, group.undefined_checkpoints(RANK))
    mean = f"mean rank recovery{within} is {estimate}"
    if group.verdict == Verdict.IRREVERSIBLE:
        return f"{mean}; its upper bound lies under {IRREVERSIBLE_BELOW:g} %"
    if group.verdict == Verdict.REVERSIBLE:
        return f"{mean}; its lower bound lies over {REVERSIBLE_ABOVE:g} %: the damage heals"
    if group.verdict == Verdict.PARTIAL:
        zone = f"{IRREVERSIBLE_BELOW:g} and {REVERSIBLE_ABOVE:g} %"
        return f"{mean}; the whole interval lies between {zone}"
    if group.verdict == Verdict.UNDEFINED:
        return (
            f"{group.n_undefined} of {count_text(group.n_runs, 'run')} {_has(group.n_undefined)} "
            "no defined rank recovery"
        )
    return f"{mean}; {_inconclusive_because(interval)}"


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


def minimum_text(state: str, numbers: Mapping[str, float], answer: str) -> str:
    """A state's answer to "is it a minimum?", with what can be gained from there, in nats.

    Args:
        state: Its name.
        numbers: ``least_gain``, ``most_gain``, ``best_probe_loss_drop`` and its ``_error``, of
            :meth:`healing.stages.cells.basin_outcome.StateReport.metrics`.
        answer: The statement's.
    """
    low, high, drop, error = (
        numbers.get(name, math.nan)
        for name in (
            "least_gain",
            "most_gain",
            "best_probe_loss_drop",
            "best_probe_loss_drop_error",
        )
    )
    gain = "undefined" if math.isnan(low) else f"{low:.2g} to {high:.2g} nats"
    fall = "not tried" if math.isnan(drop) else f"{drop:.2g} ± {error:.1g} nats"
    return f"{state} {answer} (a step along the gradient gains {gain}; descent, held-out: {fall})"


def headline_groups(summary: Summary) -> list[GroupSummary]:
    """The groups that the question is about: the treatment's, or all where there is none."""
    return [g for g in summary.groups if g.role == TREATMENT] or list(summary.groups)
