"""Verdict of a group of checkpoints: what the interval of their mean and their count both carry.

The interval alone is wrong far more often than it says where recoveries pile up at a floor or split
in two: of groups in which four of five checkpoints stay and one heals, three checkpoints are all
of the first kind in half of the cases, and their interval is short. So a verdict needs both:

- the Student t interval of the mean (with the error of measurement) lies on the verdict's side;
- the *worst-case mean* does too. With k of n checkpoints on the verdict's side, at most a share q
  of all checkpoints lies elsewhere (one-sided Clopper-Pearson bound, exact); if all of these did
  the opposite, healed fully or not at all, the mean would be (1 - q)·m + q·opposite, m being the
  mean of the k.

Where all n agree, q = 1 - 0.05^(1/n): 63 % for three checkpoints, 19 % for fourteen. No rule can do
better: it would have to tell these groups from ones with as many others that happened not to be
drawn. Error rates by simulation: docs/method.md, ``tests/statistics/test_verdicts.py``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

from healing.measurements.recovery import (
    FURTHER_BELOW,
    HEALED,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    UNHEALED,
    Verdict,
    verdict_of,
)
from healing.statistics.intervals import (
    MAX_UNDEFINED_FRACTION,
    MIN_CHECKPOINTS,
    DegenerateDataWarning,
    FloatArray,
    Interval,
    as_vector,
    drop_undefined,
    recovery_bounds,
    recovery_interval,
    require_open_unit,
    require_same_length,
)

BoolArray = NDArray[np.bool_]

MIN_VERDICT_CHECKPOINTS = 5
"""Fewer are counted and get no verdict, whatever they show: under five, not even most of the others
can be said to do the same (one-sided 95 %)."""


class Open(StrEnum):
    """Why a group has no verdict."""

    NO = ""
    MOST_UNDEFINED = "most undefined"
    TOO_FEW = "too few for any verdict"
    COUNT = "too few for this verdict"
    SPLIT = "the checkpoints split"
    INTERVAL = "the interval holds a threshold"
    MISSING = "runs without a recovery would overturn it"


@dataclass(frozen=True)
class Zone:
    """Where recoveries give a verdict, and what the others are counted as in the worst case.

    Attributes:
        low: Lower threshold, per cent.
        high: Upper threshold.
        closed: Whether values on the thresholds belong to it.
        opposite: Recoveries of the worst cases, per cent.
        floor: Recoveries below this are counted as this: one far outlier must not carry others.
    """

    low: float
    high: float
    closed: bool
    opposite: tuple[float, ...]
    floor: float = UNHEALED

    def holds(self, values: FloatArray) -> BoolArray:
        """Which recoveries lie in it."""
        if self.closed:
            inside: BoolArray = (values >= self.low) & (values <= self.high)
        else:
            inside = (values > self.low) & (values < self.high)
        return inside


ZONES = {
    # In this order: what collapses further is also not recovered.
    Verdict.FURTHER: Zone(-math.inf, FURTHER_BELOW, False, (HEALED,), floor=-HEALED),
    Verdict.IRREVERSIBLE: Zone(-math.inf, IRREVERSIBLE_BELOW, False, (HEALED,)),
    Verdict.PARTIAL: Zone(IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, True, (UNHEALED, HEALED)),
    Verdict.REVERSIBLE: Zone(REVERSIBLE_ABOVE, math.inf, False, (UNHEALED,)),
}
"""Verdicts that say something, and where they hold."""


@dataclass(frozen=True)
class GroupVerdict:
    """A verdict and what it rests on.

    Attributes:
        verdict: Of the group.
        why_open: Why it decides nothing; ``Open.NO`` where it does.
        interval: Of the mean recovery over checkpoints.
        counts: Verdict of one checkpoint → checkpoints; those with a defined recovery.
        side: The verdict that the interval gives, else the one of most checkpoints.
        n_on_side: Checkpoints that agree with ``side``.
        others_at_most: Share of all such checkpoints that may do otherwise (one-sided
            Clopper-Pearson bound).
        worst_mean: Mean recovery in per cent if that share did the opposite.
        n_missing: Checkpoints that were damaged and have no recovery, or replicates without one.
        n_needed: Checkpoints that would carry ``side`` if all of them were like those on it;
            ``None`` where no number would.
    """

    verdict: Verdict
    why_open: Open
    interval: Interval
    counts: Mapping[Verdict, int]
    side: Verdict | None = None
    n_on_side: int = 0
    others_at_most: float = math.nan
    worst_mean: float = math.nan
    n_missing: int = 0
    n_needed: int | None = None

    @property
    def n(self) -> int:
        """Checkpoints with a defined recovery."""
        return self.interval.n


def others_at_most(k: ArrayLike, n: int, confidence: float = 0.95) -> FloatArray:
    """Largest share of others that k agreeing of n leave open: one-sided Clopper-Pearson bound.

    The upper bound of a binomial share with n − k successes of n (Clopper & Pearson 1934).

    Args:
        k: agreeing checkpoints, integers in [0, n].
        n: checkpoints.
        confidence: of the bound.
    """
    agreeing = np.asarray(k, dtype=np.float64)
    bound = special.betaincinv(n - agreeing + 1.0, np.maximum(agreeing, 1.0), confidence)
    shares: FloatArray = np.where(agreeing > 0.0, bound, 1.0)
    return shares


def worst_means(
    values: FloatArray, zone: Zone, confidence: float = 0.95
) -> tuple[FloatArray, FloatArray]:
    """Mean recovery if as many checkpoints as the count allows did the opposite.

    Args:
        values: per cent, shape ``(..., n)``, all defined.
        zone: Of the verdict.
        confidence: Of the bound on the share of others.

    Returns:
        One row per opposite, shape ``(opposites, ...)``, and the share of others, ``(...)``.
    """
    inside = zone.holds(values)
    k = inside.sum(axis=-1)
    clipped = np.clip(values, zone.floor, HEALED)
    agreeing = np.where(inside, clipped, 0.0).sum(axis=-1) / np.maximum(k, 1)
    share = others_at_most(k, values.shape[-1], confidence)
    return np.stack([(1.0 - share) * agreeing + share * o for o in zone.opposite]), share


def supported(
    values: FloatArray, verdict: Verdict, confidence: float = 0.95, error: ArrayLike = 0.0
) -> tuple[BoolArray, BoolArray]:
    """Whether interval and count support a verdict, for many groups at once.

    Args:
        values: recoveries in per cent, shape ``(..., n)``, all defined, n at least 2.
        verdict: One of :data:`ZONES`.
        confidence: Of the interval, and of the bound on the share of others.
        error: Standard error of measurement, points.

    Returns:
        By the interval and by the count, each of shape ``(...)``; a verdict takes both.
    """
    zone = ZONES[verdict]
    low, high = recovery_bounds(values, confidence, error)
    by_interval = zone.holds(low) & zone.holds(high)
    worst, _ = worst_means(values, zone, confidence)
    enough = values.shape[-1] >= MIN_VERDICT_CHECKPOINTS
    return by_interval, zone.holds(worst).all(axis=0) & enough


def decided(
    values: FloatArray, confidence: float = 0.95, error: ArrayLike = 0.0
) -> dict[Verdict, BoolArray]:
    """Which verdict each of many groups gets: verdict → bool of shape ``(...)``, at most one True.

    Args:
        values: recoveries in per cent, shape ``(..., n)``, all defined.
        confidence: As :func:`supported`.
        error: As :func:`supported`.
    """
    found: dict[Verdict, BoolArray] = {}
    taken = np.zeros(values.shape[:-1], dtype=np.bool_)
    for verdict in ZONES:
        by_interval, by_count = supported(values, verdict, confidence, error)
        found[verdict] = by_interval & by_count & ~taken
        taken |= by_interval  # an interval decides for one zone, the first that holds it
    return found


def checkpoints_needed(mean: float, verdict: Verdict, confidence: float = 0.95) -> int | None:
    """Fewest checkpoints that carry a verdict by their count, if all of them recover by ``mean``.

    From 1 − (1 − confidence)^(1/n) < the largest share of others under which the worst-case mean
    stays in the zone.

    Args:
        mean: per cent.
        verdict: One of :data:`ZONES`.
        confidence: Of the bound on the share of others.

    Returns:
        ``None`` where the mean does not lie inside the zone.
    """
    zone = ZONES[verdict]
    m = min(max(mean, zone.floor), HEALED)
    if not zone.low < m < zone.high:
        return None
    limits = [zone.high if o > m else zone.low for o in zone.opposite]
    share = min((t - m) / (o - m) for t, o in zip(limits, zone.opposite, strict=True))
    n = math.floor(math.log(1.0 - confidence) / math.log1p(-share)) + 1
    return max(MIN_VERDICT_CHECKPOINTS, n)


def group_verdict(
    means: ArrayLike,
    undefined_fraction: float = 0.0,
    worst_case: tuple[ArrayLike, ArrayLike] | None = None,
    confidence: float = 0.95,
    error: float = 0.0,
) -> GroupVerdict:
    """Verdict of a group from the recoveries of its checkpoints; the rule is at the module's top.

    Args:
        means: one mean per checkpoint in per cent, shape ``(checkpoints,)``; NaN is left out.
        undefined_fraction: share of the group's runs without a defined recovery.
        worst_case: the same means with every run that was damaged and has no recovery counted as
            not healed, and as healed; ``None`` where there is none.
        confidence: of the interval, and of the bound on the share of others.
        error: standard error of measurement, points; 0 where unknown.

    Raises:
        ValueError: bad shape, infinite entries, undefined_fraction outside [0, 1], confidence
            outside (0, 1).
    """
    if not 0.0 <= undefined_fraction <= 1.0:
        raise ValueError(f"undefined_fraction is {undefined_fraction}; pass a share in [0, 1]")
    require_open_unit("confidence", confidence)
    every = as_vector("means", means)
    values = drop_undefined(every)
    cases = _worst_cases(every, worst_case)
    n_missing = int((cases[0] != cases[1]).sum())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # the caller's interval warns
        interval = recovery_interval(values, confidence, error)
    each = [verdict_of(value) for value in values]
    counts = {v: each.count(v) for v in ZONES if v in each}
    side = _side(values, interval)
    if undefined_fraction > MAX_UNDEFINED_FRACTION or side is None:
        return GroupVerdict(
            Verdict.UNDEFINED, Open.MOST_UNDEFINED, interval, counts, n_missing=n_missing
        )
    inside = ZONES[side].holds(values)
    worst, share = worst_means(values, ZONES[side], confidence)
    opposite = int(np.abs(worst - values[inside].mean()).argmax()) if inside.any() else 0
    why = _why_open(values, side, interval, cases, confidence, error)
    verdicts = {Open.NO: side, Open.TOO_FEW: Verdict.TOO_FEW, Open.COUNT: Verdict.TOO_FEW}
    return GroupVerdict(
        verdict=verdicts.get(why, Verdict.INCONCLUSIVE),
        why_open=why,
        interval=interval,
        counts=counts,
        side=side,
        n_on_side=int(inside.sum()),
        others_at_most=float(share),
        worst_mean=float(worst[opposite]),
        n_missing=n_missing,
        n_needed=checkpoints_needed(float(values[inside].mean()), side, confidence)
        if inside.any()
        else None,
    )


def _worst_cases(
    every: FloatArray, worst_case: tuple[ArrayLike, ArrayLike] | None
) -> tuple[FloatArray, FloatArray]:
    """Means with what is missing as not healed, and as healed; without what is undefined in both.

    Raises:
        ValueError: another number of checkpoints.
    """
    if worst_case is None:
        values = drop_undefined(every)
        return values, values
    low, high = (as_vector("worst_case", case) for case in worst_case)
    require_same_length(means=every, not_healed=low, healed=high)
    known = ~(np.isnan(low) | np.isnan(high))
    return low[known], high[known]


def _side(values: FloatArray, interval: Interval) -> Verdict | None:
    """The verdict of the interval, else of most checkpoints (of the mean's where they tie)."""
    if len(values) == 0:
        return None
    bounds = np.array([interval.low, interval.high])
    for verdict, zone in ZONES.items():
        if interval.defined and zone.holds(bounds).all():
            return verdict
    each = [verdict_of(value) for value in values]
    mean = verdict_of(float(values.mean()))
    return max(ZONES, key=lambda verdict: (each.count(verdict), verdict == mean))


def _why_open(
    values: FloatArray,
    side: Verdict,
    interval: Interval,
    cases: tuple[FloatArray, FloatArray],
    confidence: float,
    error: float,
) -> Open:
    """The first thing that a verdict lacks."""
    if len(values) < max(MIN_CHECKPOINTS, MIN_VERDICT_CHECKPOINTS):
        return Open.TOO_FEW
    by_interval, by_count = supported(values, side, confidence, error)
    if not by_interval:
        return Open.INTERVAL
    if not by_count:
        return Open.COUNT if ZONES[side].holds(values).all() else Open.SPLIT
    against = [case for case, o in zip(cases, (UNHEALED, HEALED), strict=True)
               if o in ZONES[side].opposite]  # fmt: skip
    for case in against:
        if not all(ok.all() for ok in supported(case, side, confidence, error)):
            return Open.MISSING
    return Open.NO
