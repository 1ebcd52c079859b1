"""Half-recovery times, with runs that never got there kept as right-censored.

Times are in the unit of the trajectory, optimiser steps or tokens; one time per checkpoint.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from healing.statistics.intervals import (
    MIN_CHECKPOINTS,
    DegenerateDataWarning,
    FloatArray,
    Interval,
    TooFewCheckpointsWarning,
    UndefinedDataWarning,
    ZeroVarianceWarning,
    as_vector,
    exp_interval,
    require_open_unit,
    require_same_length,
    t_interval,
    undetermined,
)

BoolArray = NDArray[np.bool_]

HALF_RECOVERY_PCT = 50.0
"""The recovery whose first passage is timed."""
MAX_EXACT_SPLITS = 200_000
"""Up to this many ways to split the units in two groups (10 + 10), the log-rank test is exact."""
KAPLAN_MEIER = "Kaplan-Meier, log-log"
ROUNDING = 1e-9
"""Slack on survival probabilities and log-rank sums, which are of order 1."""


class CensoredDataWarning(DegenerateDataWarning):
    """Censoring leaves the quantity undetermined."""


class AllCensoredWarning(CensoredDataWarning):
    """No unit reached the threshold."""


class MedianNotReachedWarning(CensoredDataWarning):
    """More than half of the units survive the last measurement, so that the median lies beyond."""


@dataclass(frozen=True)
class HalfRecovery:
    """Time at which recovery first reached the threshold, or the last time without it."""

    time: float
    censored: bool


@dataclass(frozen=True, eq=False)
class SurvivalCurve:
    """Kaplan-Meier estimate of the share of checkpoints not yet recovered, and its median."""

    times: FloatArray
    """Distinct times, ascending, shape ``(times,)``."""
    probabilities: FloatArray
    """Share still under the threshold right after each time, same shape."""
    median: Interval
    n: int
    n_censored: int


@dataclass(frozen=True)
class LogRankTest:
    """Log-rank comparison; ``method`` says whether ``p_value`` is exact or asymptotic."""

    statistic: float
    p_value: float
    p_asymptotic: float
    method: Literal["exact permutation", "asymptotic"]
    n: tuple[int, int]
    n_events: tuple[int, int]


def half_recovery_time(
    steps: ArrayLike, recovery_pct: ArrayLike, threshold: float = HALF_RECOVERY_PCT
) -> HalfRecovery:
    """First time at which the recovery of a checkpoint reaches the threshold.

    Linear interpolation between the last measurement below and the first at or above it. Without
    one the time is the last measurement, right-censored. Replicates are averaged first; a step at
    which one of them is undefined (NaN) is left out, as are replicates that never are defined.

    Args:
        steps: ascending times from the collapsed state on, steps or tokens, shape ``(steps,)``.
        recovery_pct: per cent, shape ``(steps,)`` or ``(replicates, steps)``.
        threshold: per cent, above 0.

    Raises:
        ValueError: bad shapes, infinite entries, steps not ascending, threshold not positive, or
            a first recovery at or above the threshold (its time would be censored on the left).

    Warns:
        UndefinedDataWarning: nothing is defined after time 0; the time is NaN.
    """
    if not 0.0 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold}; pass a positive percentage")
    t = as_vector("steps", steps)
    if not (len(t) and t[0] >= 0.0 and (np.diff(t) > 0.0).all()):
        raise ValueError("steps are not ascending from 0 or later; sort them and drop repeats")
    mean = mean_trajectory(t, recovery_pct)
    t, mean = t[~np.isnan(mean)], mean[~np.isnan(mean)]
    if not (t > 0.0).any():
        warnings.warn("half_recovery_time: no recovery is defined", UndefinedDataWarning, 2)
        return HalfRecovery(math.nan, censored=False)
    if mean[0] >= threshold:
        start = f"recovery starts at {mean[0]:g} %, not under {threshold:g} %"
        raise ValueError(f"{start}; start the trajectory at the collapsed state (0 %)")
    reached = np.flatnonzero(mean >= threshold)
    if len(reached) == 0:
        return HalfRecovery(float(t[-1]), censored=True)
    after = int(reached[0])
    share = (threshold - mean[after - 1]) / (mean[after] - mean[after - 1])
    return HalfRecovery(float(t[after - 1] + share * (t[after] - t[after - 1])), censored=False)


def mean_trajectory(times: FloatArray, recovery_pct: ArrayLike) -> FloatArray:
    """Mean over the replicates of one checkpoint that are defined after time 0, shape ``(steps,)``.

    NaN at a step where one of these is undefined: a mean over fewer of them would jump there. The
    collapsed state at 0 says nothing of a replicate: its recovery is 0 by definition.

    Args:
        times: steps or tokens, shape ``(steps,)``.
        recovery_pct: per cent, shape ``(steps,)`` or ``(replicates, steps)``.

    Raises:
        ValueError: another shape, or infinite entries.
    """
    rows = np.atleast_2d(np.asarray(recovery_pct, dtype=np.float64))
    if rows.ndim != 2:
        raise ValueError(
            f"recovery_pct has shape {rows.shape}; pass (steps,) or (replicates, steps)"
        )
    require_same_length(steps=times, recovery_pct=rows[0])
    ever_defined = ~np.isnan(rows[:, times > 0.0]).all(axis=1)
    kept = rows[ever_defined] if ever_defined.any() else rows[:1]
    return as_vector("recovery_pct", kept.mean(axis=0))


def _right_censored(
    times: ArrayLike, censored: ArrayLike, name: str = "times"
) -> tuple[FloatArray, BoolArray]:
    """Validate and drop undefined (NaN) times."""
    t, c = as_vector(name, times), np.asarray(censored)
    if c.shape != t.shape or (len(c) and c.dtype != np.bool_):
        got = f"{c.dtype} of shape {c.shape}"
        raise ValueError(f"censored is {got}; pass one bool per entry of {name} {t.shape}")
    if (t <= 0.0).any():
        raise ValueError(
            f"{name} holds {t.min():g}; pass positive times, counted from the collapse"
        )
    defined = ~np.isnan(t)
    return t[defined], c[defined].astype(np.bool_)


def kaplan_meier(times: ArrayLike, censored: ArrayLike, confidence: float = 0.95) -> SurvivalCurve:
    """Kaplan-Meier curve of half-recovery times with its median (Kaplan & Meier 1958).

    The median is the first time at which the curve is <= 1/2. Its interval inverts the log-log
    Greenwood interval of the curve (Brookmeyer & Crowley 1982): from the first time at which the
    lower limit is <= 1/2 to the first at which the upper limit is. An upper limit that stays
    above 1/2 gives an infinite bound: the data bound the median on one side only. At 95 % with
    six checkpoints or fewer that is always so.

    Args:
        times: half-recovery or censoring time per checkpoint, shape ``(checkpoints,)``; NaN is
            left out.
        censored: True where the threshold was not reached, bool, same shape.
        confidence: nominal coverage of the median's interval.

    Raises:
        ValueError: bad shapes, infinite or non-positive times, confidence outside (0, 1).

    Warns:
        TooFewCheckpointsWarning: n < 3; the bounds are NaN.
        AllCensoredWarning: no time is observed; median and bounds are NaN.
        MedianNotReachedWarning: the median is NaN; the lower bound remains.
    """
    require_open_unit("confidence", confidence)
    t, c = _right_censored(times, censored)
    if len(t) == 0:
        nothing = Interval(math.nan, math.nan, math.nan, 0, KAPLAN_MEIER, confidence)
        median = undetermined(nothing, TooFewCheckpointsWarning, "no checkpoints")
        return SurvivalCurve(t, t, median, 0, 0)
    sample = stats.CensoredData.right_censored(t, c)
    survival = stats.ecdf(sample).sf
    point = _first_time(survival.quantiles, survival.probabilities, default=math.nan)
    estimate = Interval(math.nan, point, math.nan, len(t), KAPLAN_MEIER, confidence)
    if len(t) < MIN_CHECKPOINTS:
        reason = f"{len(t)} checkpoints, at least {MIN_CHECKPOINTS} needed"
        median = undetermined(estimate, TooFewCheckpointsWarning, reason)
    elif c.all():
        reason = f"all {len(t)} checkpoints are censored"
        median = undetermined(estimate, AllCensoredWarning, reason)
    else:
        median = _with_median_bounds(estimate, sample)
        if math.isnan(point):
            message = f"{c.sum()} of {len(t)} checkpoints are censored, the median is not reached"
            warnings.warn(f"{KAPLAN_MEIER}: {message}", MedianNotReachedWarning, stacklevel=2)
    return SurvivalCurve(survival.quantiles, survival.probabilities, median, len(t), int(c.sum()))


def _with_median_bounds(estimate: Interval, sample: stats.CensoredData) -> Interval:
    survival = stats.ecdf(sample).sf
    with warnings.catch_warnings():
        # The limits are NaN where the curve is exactly 1 or 0.
        warnings.filterwarnings("ignore", "The confidence interval is undefined", RuntimeWarning)
        band: Any = survival.confidence_interval(estimate.confidence, method="log-log")
    lower = np.where(survival.probabilities <= ROUNDING, 0.0, band.low.probabilities)
    low = _first_time(survival.quantiles, lower, default=math.nan)
    high = _first_time(survival.quantiles, band.high.probabilities, default=math.inf)
    return replace(estimate, low=low, high=high)


def _first_time(times: FloatArray, curve: FloatArray, default: float) -> float:
    """First time at which ``curve`` is at or below one half."""
    reached = np.flatnonzero(curve <= 0.5 + ROUNDING)
    return float(times[reached[0]]) if len(reached) else default


def log_time_interval(times: ArrayLike, censored: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student t interval of the geometric mean time: exp of ``t_interval`` on log times.

    Args:
        times: half-recovery time per checkpoint, shape ``(checkpoints,)``; NaN is left out.
        censored: bool, same shape; a censored time has no place in a mean.
        confidence: nominal coverage.

    Raises:
        ValueError: bad shapes, infinite or non-positive times, confidence outside (0, 1).

    Warns:
        CensoredDataWarning: a time is censored; point and bounds are NaN.
        TooFewCheckpointsWarning, ZeroVarianceWarning: as ``t_interval``.
    """
    require_open_unit("confidence", confidence)
    t, c = _right_censored(times, censored)
    method = "log-scale Student t"
    if c.any():
        blank = Interval(math.nan, math.nan, math.nan, len(t), method, confidence)
        reason = f"{int(c.sum())} of {len(t)} times are censored, use kaplan_meier"
        return undetermined(blank, CensoredDataWarning, reason)
    return replace(exp_interval(t_interval(np.log(t), confidence)), method=method)


def logrank_test(
    treatment_times: ArrayLike,
    treatment_censored: ArrayLike,
    control_times: ArrayLike,
    control_censored: ArrayLike,
) -> LogRankTest:
    """Two-sided log-rank test that two groups recover at the same pace (Mantel 1966).

    ``statistic`` = (observed − expected events of the treatment)/√variance, positive where the
    treatment recovers sooner. Its normal approximation rejects too often in small groups (9 % at
    3 + 3), so up to 200,000 splits p is the exact share of splits of the pooled units whose
    |observed − expected| is at least as large; 3 + 3 units then cannot get below 0.1. Exactness
    needs the same censoring in both groups, such as one training budget.

    Args:
        treatment_times: one per checkpoint, shape ``(n_treatment,)``; NaN is left out.
        treatment_censored: bool, same shape.
        control_times: shape ``(n_control,)``.
        control_censored: bool, same shape.

    Raises:
        ValueError: bad shapes, infinite or non-positive times.

    Warns:
        TooFewCheckpointsWarning: under 3 units in a group; statistic and p-values are NaN.
        AllCensoredWarning: no events; the same.
        ZeroVarianceWarning: no event leaves anything to compare; the same.
    """
    x, x_censored = _right_censored(treatment_times, treatment_censored, "treatment_times")
    y, y_censored = _right_censored(control_times, control_censored, "control_times")
    n, n_events = (len(x), len(y)), (int((~x_censored).sum()), int((~y_censored).sum()))
    problem = _logrank_degeneracy(n, n_events)
    if problem is None:
        with np.errstate(invalid="ignore"):  # 0/0 where no event has both groups at risk
            asymptotic = stats.logrank(
                stats.CensoredData.right_censored(x, x_censored),
                stats.CensoredData.right_censored(y, y_censored),
            )
        z, p = float(asymptotic.statistic), float(asymptotic.pvalue)
        if math.isnan(z):
            problem = ZeroVarianceWarning, "no event has units of both groups at risk"
    if problem is not None:
        warnings.warn(f"log-rank: {problem[1]}", problem[0], stacklevel=2)
        return LogRankTest(math.nan, math.nan, math.nan, "asymptotic", n, n_events)
    if math.comb(sum(n), n[0]) > MAX_EXACT_SPLITS:
        return LogRankTest(z, p, p, "asymptotic", n, n_events)
    scores = _logrank_scores(np.r_[x, y], ~np.r_[x_censored, y_censored])
    return LogRankTest(z, _permutation_p(scores, n[0]), p, "exact permutation", n, n_events)


def _logrank_degeneracy(
    n: tuple[int, int], n_events: tuple[int, int]
) -> tuple[type[DegenerateDataWarning], str] | None:
    if min(n) < MIN_CHECKPOINTS:
        reason = f"groups of {n[0]} and {n[1]} units, at least {MIN_CHECKPOINTS} needed"
        return TooFewCheckpointsWarning, reason
    return (AllCensoredWarning, "every time is censored") if sum(n_events) == 0 else None


def _logrank_scores(times: FloatArray, observed: BoolArray) -> FloatArray:
    """Observed minus expected events of each unit: event − pooled Nelson-Aalen hazard so far."""
    event_times, n_events = np.unique(times[observed], return_counts=True)
    at_risk = times[:, None] >= event_times
    hazard: FloatArray = n_events / at_risk.sum(axis=0)
    scores: FloatArray = observed - at_risk @ hazard
    return scores


def _permutation_p(scores: FloatArray, n_first: int) -> float:
    """Share of all splits whose first group deviates at least as much as the first ``n_first``."""
    splits = np.array(list(combinations(range(len(scores)), n_first)))
    deviations = np.abs(scores[splits].sum(axis=1))
    return float((deviations >= abs(scores[:n_first].sum()) - ROUNDING).mean())
