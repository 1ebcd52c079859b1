"""How many checkpoints does it take to reach a verdict, or pairs to say how two arms differ: power
of the t interval, exactly, and how many the count takes.

Checkpoint means are taken as normal with a mean and standard deviation guessed beforehand, for
example from a pilot run; the verdict is the one of ``healing.statistics.verdicts.group_verdict``.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import integrate, special, stats

from healing.measurements.recovery import (
    DECIDED,
    FURTHER_BELOW,
    HEALED,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.statistics.contrasts.mean_bounds import LARGEST, p_mean_below
from healing.statistics.intervals import (
    MIN_CHECKPOINTS,
    require_open_unit,
    require_ordered_thresholds,
)
from healing.statistics.verdicts import MIN_VERDICT_CHECKPOINTS, ZONES, others_at_most

MAX_CHECKPOINTS = 100_000
"""A verdict that needs more is out of reach."""
MAX_PAIRS = 10_000
"""Beyond this many pairs none are planned."""
NEGLIGIBLE_TAIL = 1e-12
"""Probability left out at either end of the integral over the standard deviation."""
QUANTILES = 2001
"""Points of a normal distribution at which recoveries are clipped and averaged."""


def verdict_power(
    n: int,
    mean: float,
    sd: float,
    verdict: Verdict,
    *,
    confidence: float = 0.95,
    reversible_above: float = REVERSIBLE_ABOVE,
    irreversible_below: float = IRREVERSIBLE_BELOW,
) -> float:
    """Probability that n checkpoints give this verdict.

    With δ = (mean − threshold)√n/sd and T noncentral t on n − 1 degrees of freedom:
    P(T(δ) > t) for ``REVERSIBLE``, P(T(δ) < −t) for ``IRREVERSIBLE``; for ``PARTIAL`` both bounds
    must hold, which is Owen's Q (Owen 1965; Phillips 1990), integrated here over the distribution
    of the standard deviation.

    Args:
        n: checkpoints, at least 3.
        mean: true mean recovery, per cent.
        sd: true standard deviation between checkpoint means, points.
        verdict: the verdict hoped for.
        confidence: of the interval the verdict is read from.
        reversible_above: upper threshold, per cent.
        irreversible_below: lower threshold, per cent.

    Raises:
        ValueError: n under 3, sd not positive, mean not finite, an undecided verdict, confidence
            outside (0, 1), thresholds in the wrong order.
    """
    _require_plan(mean, sd, verdict, confidence)
    require_ordered_thresholds(irreversible_below, reversible_above)
    if n < MIN_CHECKPOINTS:
        raise ValueError(f"n is {n}; an interval needs at least {MIN_CHECKPOINTS} checkpoints")
    standard_error, df = sd / math.sqrt(n), n - 1
    t = float(special.stdtrit(df, (1.0 + confidence) / 2.0))
    above_lower = (mean - irreversible_below) / standard_error
    above_upper = (mean - reversible_above) / standard_error
    if verdict == Verdict.REVERSIBLE:
        return float(stats.nct.sf(t, df, above_upper))
    if verdict == Verdict.IRREVERSIBLE:
        return float(stats.nct.sf(t, df, -above_lower))
    if verdict == Verdict.FURTHER:
        return float(stats.nct.sf(t, df, (FURTHER_BELOW - mean) / standard_error))
    return _probability_inside(t, df, above_lower, -above_upper)


def _probability_inside(t: float, df: int, above_lower: float, below_upper: float) -> float:
    """P(above_lower + Z > tU and below_upper − Z > tU), Z normal, df·U² chi-square on df."""

    def given_spread(u: float) -> float:
        chance = special.ndtr(below_upper - t * u) - special.ndtr(t * u - above_lower)
        density = 2.0 * df * u * stats.chi2.pdf(df * u * u, df)
        return float(chance * density)

    largest = (above_lower + below_upper) / (2.0 * t)  # beyond it the interval is too long to fit
    tails = stats.chi2.ppf([NEGLIGIBLE_TAIL, 1.0 - NEGLIGIBLE_TAIL], df)
    low, high = (float(u) for u in np.sqrt(tails / df))
    if largest <= low:
        return 0.0
    probability, _ = integrate.quad(given_spread, low, min(high, largest), epsabs=1e-10)
    return min(1.0, float(probability))  # quadrature error can exceed 1 in the last digits


def required_checkpoints(
    mean: float,
    sd: float,
    verdict: Verdict,
    power: float = 0.8,
    *,
    confidence: float = 0.95,
    reversible_above: float = REVERSIBLE_ABOVE,
    irreversible_below: float = IRREVERSIBLE_BELOW,
) -> int:
    """Fewest checkpoints (at least 3) that give this verdict with this probability.

    Args:
        mean: true mean recovery, per cent.
        sd: true standard deviation between checkpoint means, points.
        verdict: the verdict hoped for.
        power: probability wanted.
        confidence: of the interval the verdict is read from.
        reversible_above: upper threshold, per cent.
        irreversible_below: lower threshold, per cent.

    Raises:
        ValueError: power outside (0, 1), a mean on the wrong side of the verdict's threshold,
            over 100,000 checkpoints needed, and as ``verdict_power``.
    """
    require_open_unit("power", power)
    _require_plan(mean, sd, verdict, confidence)
    require_ordered_thresholds(irreversible_below, reversible_above)
    reachable = {
        Verdict.REVERSIBLE: mean > reversible_above,
        Verdict.IRREVERSIBLE: mean < irreversible_below,
        Verdict.FURTHER: mean < FURTHER_BELOW,
        Verdict.PARTIAL: irreversible_below < mean < reversible_above,
    }
    if not reachable[verdict]:
        raise ValueError(f"mean {mean} never gives '{verdict}'; pass a mean beyond its threshold")

    def enough(n: int) -> bool:
        return power <= verdict_power(
            n,
            mean,
            sd,
            verdict,
            confidence=confidence,
            reversible_above=reversible_above,
            irreversible_below=irreversible_below,
        )

    too_few, n = MIN_CHECKPOINTS - 1, MIN_CHECKPOINTS
    while not enough(n):
        if n == MAX_CHECKPOINTS:
            advice = "pass a mean further from the threshold or a lower power"
            raise ValueError(f"over {MAX_CHECKPOINTS} checkpoints needed; {advice}")
        too_few, n = n, min(2 * n, MAX_CHECKPOINTS)
    while n - too_few > 1:
        middle = (too_few + n) // 2
        too_few, n = (too_few, middle) if enough(middle) else (middle, n)
    return n


def counted_checkpoints(
    mean: float, sd: float, verdict: Verdict, power: float = 0.8, *, confidence: float = 0.95
) -> int | None:
    """Fewest checkpoints whose count carries this verdict with about this probability.

    Two things of n normal checkpoints must be good enough for the worst-case mean of ``verdicts``:
    how many lie in the verdict's zone (binomial) and the mean of these (normal). Each is taken at
    the value that it reaches with probability 1 − (1 − power)/2, so that both are reached with
    ``power`` at least.

    Args:
        mean: true mean recovery, per cent.
        sd: true standard deviation between checkpoint means, points.
        verdict: the verdict hoped for.
        power: probability wanted.
        confidence: of the bound on the share of others.

    Returns:
        ``None`` where no number would do: too many checkpoints lie outside the zone.

    Raises:
        ValueError: as ``required_checkpoints``, but for the side of the mean.
    """
    require_open_unit("power", power)
    _require_plan(mean, sd, verdict, confidence)
    zone = ZONES[verdict]
    below, above = special.ndtr([(zone.low - mean) / sd, (zone.high - mean) / sd])
    inside = float(above - below)
    if inside <= NEGLIGIBLE_TAIL:
        return None
    quantiles = below + inside * (np.arange(QUANTILES) + 0.5) / QUANTILES
    agreeing = np.clip(mean + sd * special.ndtri(quantiles), zone.floor, HEALED)
    center, spread = float(agreeing.mean()), float(agreeing.std())
    tail = (1.0 - power) / 2.0

    def enough(n: int) -> bool:
        k = max(1.0, float(stats.binom.ppf(tail, n, inside)))
        others = float(others_at_most(k, n, confidence))
        unlucky = -float(special.ndtri(tail)) * spread / math.sqrt(k)
        worst = []
        for opposite in zone.opposite:
            own = center + math.copysign(unlucky, opposite - center)
            worst.append((1.0 - others) * own + others * opposite)
        return bool(zone.holds(np.array(worst)).all())

    if not enough(MAX_CHECKPOINTS):
        return None
    too_few, n = MIN_VERDICT_CHECKPOINTS - 1, MIN_VERDICT_CHECKPOINTS
    while not enough(n):
        too_few, n = n, min(2 * n, MAX_CHECKPOINTS)
    while n - too_few > 1:
        middle = (too_few + n) // 2
        too_few, n = (too_few, middle) if enough(middle) else (middle, n)
    return n


def pairs_for_margin(
    sd: float, margin: float = 10.0, power: float = 0.8, *, alpha: float = 0.05
) -> int | None:
    """Fewest pairs that show two arms to be alike within ± margin, if they do not differ at all.

    Both parts of the claim (``contrasts/family.py``) must hold: TOST with ``power`` (exactly, Owen
    1965), and the count for normal differences whose mean lies where it lies with ``power``.

    Args:
        sd: standard deviation of the paired differences, points.
        margin: of equivalence, points.
        power: probability wanted.
        alpha: one-sided level of the claim, after any adjustment.

    Returns:
        ``None`` where sd is not positive and finite, or over 10,000 pairs would be needed.
    """
    if not 0.0 < sd < math.inf:
        return None
    by_spread = pairs_by_spread(sd, margin, power, alpha=alpha)
    unlucky = float(special.ndtri((1.0 + power) / 2.0))

    def counted(n: int) -> bool:
        quantiles = special.ndtri((np.arange(n) + 0.5) / n)
        sample = sd * (quantiles + unlucky / math.sqrt(n))
        return float(p_mean_below(sample, margin)) <= alpha

    too_few, n = by_spread - 1, by_spread
    while not counted(n):
        if n > MAX_PAIRS:
            return None
        too_few, n = n, 2 * n
    while n - too_few > 1:
        middle = (too_few + n) // 2
        too_few, n = (too_few, middle) if counted(middle) else (middle, n)
    return n


def pairs_by_spread(
    sd: float, margin: float = 10.0, power: float = 0.8, *, alpha: float = 0.05
) -> int:
    """As :func:`pairs_for_margin`, by TOST alone: what the spread of normal differences takes."""
    return required_checkpoints(
        0.0,
        sd,
        Verdict.PARTIAL,
        power,
        confidence=1.0 - 2.0 * alpha,
        reversible_above=margin,
        irreversible_below=-margin,
    )


def pairs_that_agree(difference: float, *, alpha: float) -> int | None:
    """Fewest pairs whose count can carry "more" or "less", if all of them differ by this much.

    From (100/(100 + |difference|))^n <= alpha.

    Args:
        difference: points; at most 100 of them count.
        alpha: one-sided level of the claim, after any adjustment.

    Returns:
        ``None`` where they do not differ.
    """
    size = min(abs(difference), LARGEST)
    if not size > 0.0:
        return None
    return math.ceil(math.log(1.0 / alpha) / math.log1p(size / LARGEST))


def _require_plan(mean: float, sd: float, verdict: str, confidence: float) -> None:
    require_open_unit("confidence", confidence)
    if not math.isfinite(mean):
        raise ValueError(f"mean is {mean}; pass an expected recovery in per cent")
    if not 0.0 < sd < math.inf:
        raise ValueError(f"sd is {sd}; pass a positive number of points")
    if verdict not in DECIDED:
        raise ValueError(f"verdict is '{verdict}'; pass one of {', '.join(DECIDED)}")
