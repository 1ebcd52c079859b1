"""What a summary says of HAEP against noise, in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from healing.config.shared import CONTROL
from healing.reporting.phrases import interval_text
from healing.statistics.paired_tests import EndpointComparison
from healing.statistics.summary import Summary
from healing.statistics.survival import LogRankTest

SHORT = {"rank_recovery_pct": "rank", "loss_recovery_pct": "loss"}
EQUAL = {
    "norm": "equal weight change",
    "loss": "equal loss (damage-matched)",
    "rank": "equal effective rank (damage-matched)",
    "scale": "a fixed scale (not matched)",
}
STATEMENTS = {
    "superior": "HAEP damage recovers more than noise damage (superior)",
    "inferior": "HAEP damage recovers less than noise damage (inferior)",
    "equivalent": "Both recover alike within 10 points (equivalent)",
    "inconclusive": "The data do not decide (inconclusive)",
}


def noise_kind(model: str, summary: Summary) -> str:
    """What the noise of a model's comparison shares with its attacks."""
    kinds = {g.noise_match for g in summary.groups if (g.model, g.arm) == (model, CONTROL)}
    return ", ".join(EQUAL.get(kind, "unknown match") for kind in sorted(kinds))


def _difference(endpoint: EndpointComparison) -> str:
    interval = endpoint.superiority.interval
    text = f"{SHORT[endpoint.endpoint]} recovery {interval_text(interval)}"
    if math.isnan(interval.point):
        return text
    undefined = f", {endpoint.n_undefined} undefined" if endpoint.n_undefined else ""
    return f"{text} points ({interval.n} pairs{undefined})"


def comparison_sentence(model: str, summary: Summary) -> str:
    """HAEP against noise for one model after the last step, in one line."""
    comparison = summary.comparisons[model]
    return (
        f"{model}: HAEP minus Gaussian noise of {noise_kind(model, summary)}, paired by seed: "
        f"{'; '.join(map(_difference, comparison.endpoints))}. {STATEMENTS[comparison.statement]}."
    )


def p_text(p: float) -> str:
    """``p = 0.10``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _half_recovery_test(endpoint: str, test: LogRankTest) -> str:
    counts = f"{test.n[0]} and {test.n[1]} checkpoints"
    if math.isnan(test.p_value):
        return f"{SHORT[endpoint]} undefined ({counts} with a time)"
    sooner = "HAEP sooner" if test.statistic > 0.0 else "noise sooner"
    kind = "exact" if test.method == "exact permutation" else "asymptotic"
    return (
        f"{SHORT[endpoint]} z = {test.statistic:.2f}, {kind} {p_text(test.p_value)} ({sooner}; "
        f"{counts}, {test.n_events[0]} and {test.n_events[1]} of them reached half)"
    )


def half_recovery_sentence(model: str, summary: Summary) -> str:
    """Log-rank tests of the half-recovery times of one model, in one line."""
    tests = summary.contrasts[model].half_recovery_test
    said = "; ".join(_half_recovery_test(endpoint, test) for endpoint, test in tests.items())
    return (
        f"{model}: time until half of the damage is repaired (half-recovery time), HAEP against "
        f"noise, log-rank test: {said}."
    )


def contrast_sentences(summary: Summary) -> list[str]:
    """Both sentences of every model that has them."""
    return [
        sentence(model, summary)
        for model in summary.contrasts
        for sentence in (comparison_sentence, half_recovery_sentence)
    ]


def comparison_gaps(summary: Summary) -> list[str]:
    """Models with HAEP and noise that are not compared, and why, one line each."""
    return [
        f"{model}: HAEP and Gaussian noise are not compared: {why}."
        for model, why in summary.gaps.items()
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
