"""What a summary says of a treatment against a damage control (HAEP, noise), in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from healing.config.arm_tags import arm_label, arm_short, arms_of
from healing.registry import DAMAGE_CONTROL, TREATMENT
from healing.reporting.phrases import interval_text
from healing.statistics.paired_tests import EndpointComparison
from healing.statistics.summary import Summary
from healing.statistics.survival import LogRankTest
from healing.statistics.treatment_against_control import Contrast, Pair

SHORT = {"rank_recovery_pct": "rank", "loss_recovery_pct": "loss"}
EQUAL = {
    "norm": "equal weight change",
    "loss": "equal loss (damage-matched)",
    "rank": "equal effective rank (damage-matched)",
    "rank+loss": "equal effective rank and loss (damage-matched)",
    "scale": "a fixed scale (not matched)",
}
STATEMENTS = {
    "superior": "{0} damage recovers more than {1} damage (superior)",
    "inferior": "{0} damage recovers less than {1} damage (inferior)",
    "equivalent": "Both recover alike within 10 points (equivalent)",
    "inconclusive": "The data do not decide (inconclusive)",
}


def _pairs(summary: Summary) -> list[Pair]:
    compared = [found.pair for found in summary.contrasts.values()]
    return compared + [gap.pair for gap in summary.gaps.values()]


def pair_title(summary: Summary) -> str:
    """Heading over all contrasts: ``HAEP against Gaussian noise`` where it is one pair of arms."""
    titles = {f"{p.treatment.label} against {p.control.label}" for p in _pairs(summary)}
    return titles.pop() if len(titles) == 1 else "Treatments against damage controls"


def pair_names(summary: Summary) -> tuple[str, str]:
    """Names of treatment and control for texts about all contrasts: ``HAEP``, ``noise``."""
    names = {(p.treatment.label, p.short) for p in _pairs(summary)}
    if not names:
        treatment, control = arms_of(TREATMENT)[0], arms_of(DAMAGE_CONTROL)[0]
        names = {(arm_label(treatment), arm_short(control, arm_label(control)))}
    return names.pop() if len(names) == 1 else ("treatment", "control")


def _difference(endpoint: EndpointComparison) -> str:
    interval = endpoint.superiority.interval
    text = f"{SHORT[endpoint.endpoint]} recovery {interval_text(interval)}"
    if math.isnan(interval.point):
        return text
    undefined = f", {endpoint.n_undefined} undefined" if endpoint.n_undefined else ""
    return f"{text} points ({interval.n} pairs{undefined})"


def comparison_sentence(found: Contrast) -> str:
    """Recovery after the last step, in one line."""
    comparison, pair = found.comparison, found.pair
    said = STATEMENTS[comparison.statement].format(pair.treatment.label, pair.short)
    kind = EQUAL.get(pair.control.noise_match, "unknown match")
    return (
        f"{pair.model}: {pair.treatment.label} minus {pair.control.label} of {kind}, paired by "
        f"seed: {'; '.join(map(_difference, comparison.endpoints))}. {said}."
    )


def p_text(p: float) -> str:
    """``p = 0.10``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _half_recovery_test(endpoint: str, test: LogRankTest, pair: Pair) -> str:
    counts = f"{test.n[0]} and {test.n[1]} checkpoints"
    if math.isnan(test.p_value):
        return f"{SHORT[endpoint]} undefined ({counts} with a time)"
    sooner = f"{pair.treatment.label if test.statistic > 0.0 else pair.short} sooner"
    kind = "exact" if test.method == "exact permutation" else "asymptotic"
    return (
        f"{SHORT[endpoint]} z = {test.statistic:.2f}, {kind} {p_text(test.p_value)} ({sooner}; "
        f"{counts}, {test.n_events[0]} and {test.n_events[1]} of them reached half)"
    )


def half_recovery_sentence(found: Contrast) -> str:
    """Log-rank tests of the half-recovery times, in one line."""
    pair = found.pair
    said = "; ".join(
        _half_recovery_test(endpoint, test, pair)
        for endpoint, test in found.half_recovery_test.items()
    )
    return (
        f"{pair.model}: time until half of the damage is repaired (half-recovery time), "
        f"{pair.treatment.label} against {pair.short}, log-rank test: {said}."
    )


def contrast_sentences(summary: Summary) -> list[str]:
    """Both sentences of every contrast."""
    return [
        sentence(found)
        for found in summary.contrasts.values()
        for sentence in (comparison_sentence, half_recovery_sentence)
    ]


def comparison_gaps(summary: Summary) -> list[str]:
    """Arms that were run and are not compared, and why, one line each."""
    return [
        f"{gap.pair.model}: {gap.pair.treatment.label} and {gap.pair.control.label} are not "
        f"compared: {gap.why}."
        for gap in summary.gaps.values()
    ]


def unfinished_sentences(summary: Summary) -> list[str]:
    """How many runs are not counted, and why; nothing where all are."""
    return [
        f"{n} {'run' if n == 1 else 'runs'} {one if n == 1 else more}."
        for n, one, more in _left_out(summary)
        if n
    ]


def _left_out(summary: Summary) -> Sequence[tuple[int, str, str]]:
    return (
        (len(summary.failed), "failed and is not included", "failed and are not included"),
        (
            len(summary.running),
            "has not ended (or was killed) and is not included",
            "have not ended (or were killed) and are not included",
        ),
        (
            len(summary.repeats),
            "repeats another with the same fingerprint and is not counted",
            "repeat others with the same fingerprint and are not counted",
        ),
    )
