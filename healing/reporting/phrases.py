"""What a summary says, in sentences: one wording for Markdown, HTML and LaTeX."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from healing.registry import TREATMENT
from healing.statistics.fits.asymptotes import NOT_DETERMINED, Asymptotes
from healing.statistics.group import GroupSummary
from healing.statistics.intervals import Interval
from healing.statistics.summary import Summary

RANK, LOSS = "rank_recovery_pct", "loss_recovery_pct"


def number_text(value: float, digits: int = 1) -> str:
    """A number for people; NaN is an en dash."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


def percent_text(value: float) -> str:
    """``12.3 %``, or ``undefined``."""
    return "undefined" if math.isnan(value) else f"{value:.1f} %"


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def quantity_text(value: float) -> str:
    """A measured number as people write it: ``42.89``, ``3.3×10⁹``, ``undefined``."""
    if math.isnan(value):
        return "undefined"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0.0 or 1e-3 <= abs(float(f"{value:.4g}")) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}×10{str(int(exponent)).translate(_RAISED)}"


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


def listed(parts: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def budget(group: GroupSummary) -> int | None:
    """Last healing step that all runs of a group measured; ``None`` without one."""
    steps = [band.steps[-1] for band in group.bands.values() if band.steps]
    return max(steps, default=None)


def estimate_text(interval: Interval, undefined: int = 0, of: str = "") -> str:
    """A recovery with its interval, in words: ``18.5 % (95 % interval 1.3 to 35.8 %, n = 3)``.

    Args:
        interval: In per cent.
        undefined: Checkpoints that n does not count, because their recovery is undefined.
        of: What n counts; empty = checkpoints, without saying so.
    """
    if math.isnan(interval.point):
        return "undefined"
    n = f"n\u00a0=\u00a0{interval.n}" + (f" {of}" if of else "")  # not parted at a line's end
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
    """Limit and half-life, or ``not determined by this budget`` with what was missing."""
    if found.n_checkpoints == 0:
        return "undefined", "undefined"
    if not found.converged:
        return f"{NOT_DETERMINED} ({'; '.join(found.reasons)})", NOT_DETERMINED
    return f"{interval_text(found.asymptote)} %", steps_text(found.half_life)


def laws_text(found: Asymptotes) -> str:
    """How often AICc chose which law: ``exponential 2, power law 1``."""
    counts = {law: found.laws.count(law) for law in dict.fromkeys(found.laws)}
    return ", ".join(f"{law} {n}" for law, n in counts.items()) or "–"


def group_name(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """``nano, HAEP``."""
    return f"{group.model}, {shown_label(group, groups)}"


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
