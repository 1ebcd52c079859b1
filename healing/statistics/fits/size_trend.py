"""Does recovery change with model size: the slope of recovery against log10(parameters)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from healing.statistics.intervals import (
    RELATIVE_SPREAD_FLOOR,
    DegenerateDataWarning,
    Interval,
    ZeroVarianceWarning,
    as_vector,
    require_open_unit,
    require_same_length,
    undetermined,
    with_t_bounds,
)

MIN_SIZES = 3
"""Fewest distinct model sizes that get a slope."""
MAX_LOG10_PARAMS = 20.0
"""Larger values are parameter counts whose logarithm was forgotten."""


class TooFewSizesWarning(DegenerateDataWarning):
    """Fewer distinct model sizes than a slope needs."""


@dataclass(frozen=True)
class ScalingSlope:
    """Straight line of recovery against log10(parameters); slope in points per decade."""

    slope: Interval
    intercept: float
    n_sizes: int


def scaling_slope(
    log10_params: ArrayLike, recovery: ArrayLike, confidence: float = 0.95
) -> ScalingSlope:
    """Least-squares slope of recovery against log10(parameters), with its Student t interval.

    slope ± t(n − 2) · √(RSS/(n − 2)/Sxx) over n cluster means. The interval treats checkpoints as
    independent given the line. Where each size also deviates from the line in its own way, pass
    one mean per size instead: the n − 2 degrees of freedom then count sizes, as they should.

    Args:
        log10_params: log10 of the parameter count of each checkpoint, shape ``(checkpoints,)``.
        recovery: its mean recovery, same length; NaN is left out.
        confidence: nominal coverage.

    Raises:
        ValueError: bad shapes or lengths, infinite entries, NaN or unlogged parameter counts, or
            confidence outside (0, 1).

    Warns:
        TooFewSizesWarning: under 3 distinct sizes; slope and intercept are NaN.
        ZeroVarianceWarning: the points lie exactly on the line; the bounds are NaN.
    """
    require_open_unit("confidence", confidence)
    x, y = as_vector("log10_params", log10_params), as_vector("recovery", recovery)
    require_same_length(log10_params=x, recovery=y)
    if np.isnan(x).any() or (np.abs(x) > MAX_LOG10_PARAMS).any():
        raise ValueError("log10_params holds NaN or raw counts; pass numpy.log10(n_params)")
    x, y = x[~np.isnan(y)], y[~np.isnan(y)]
    n_sizes, method = len(np.unique(x)), "OLS slope, Student t"
    if n_sizes < MIN_SIZES:
        estimate = Interval(math.nan, math.nan, math.nan, len(y), method, confidence)
        reason = f"{n_sizes} distinct sizes, at least {MIN_SIZES} needed"
        return ScalingSlope(undetermined(estimate, TooFewSizesWarning, reason), math.nan, n_sizes)

    centred = x - x.mean()
    s_xx = float(centred @ centred)
    point = float(centred @ y) / s_xx
    intercept = float(y.mean() - point * x.mean())
    residuals = y - intercept - point * x
    estimate = Interval(math.nan, point, math.nan, len(y), method, confidence)
    if np.abs(residuals).max() <= RELATIVE_SPREAD_FLOOR * np.abs(y).max():
        slope = undetermined(estimate, ZeroVarianceWarning, f"all {len(y)} points on the line")
        return ScalingSlope(slope, intercept, n_sizes)
    df = len(y) - 2
    standard_error = math.sqrt(float(residuals @ residuals) / df / s_xx)
    return ScalingSlope(with_t_bounds(estimate, standard_error, df), intercept, n_sizes)
