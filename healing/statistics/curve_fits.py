"""Where a recovery trajectory is heading: least-squares fits of two laws of approach.

Both start at 0 in the collapsed state and approach ``asymptote``; only their tails differ:

- exponential: r(t) = a(1 − exp(−t/τ)), half-life τ ln 2;
- power law: r(t) = a(1 − (1 + t/τ)^−b), half-life τ(2^(1/b) − 1).

The intervals are conditional on the law and on independent errors. Where noise hides a power
law's tail, AICc takes the exponential, whose asymptote is too low and whose 95 % interval then
covers half of the time: an asymptote is an extrapolation. The intervals describe one trajectory;
the spread between checkpoints comes from ``t_interval`` (:mod:`healing.statistics.intervals`) over
their asymptotes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from healing.statistics.intervals import (
    DegenerateDataWarning,
    FloatArray,
    Interval,
    ZeroVarianceWarning,
    as_vector,
    exp_interval,
    has_no_spread,
    require_open_unit,
    require_same_length,
    with_t_bounds,
)

Law = Literal["exponential", "power law"]

MAX_ASYMPTOTE_HALF_WIDTH = 20.0
"""Points; an asymptote known less well than this is not reported."""
MAX_HALF_LIFE_RATIO = 10.0
"""Upper over lower bound; a half-life known less well than this is not reported."""
MAX_CONDITION_NUMBER = 1e6
"""Of the Jacobian with unit columns; above, the parameters can't be told apart."""
EXPONENT_RANGE = (0.05, 50.0)
"""Power laws steeper than this are exponentials, shallower ones logarithms."""
MAX_TIME_SCALE_RATIO = 1000.0
"""Time constants are sought from the first time over this to the last time times this."""
MAX_EVALUATIONS = 100
"""Determined fits need about 10; flat valleys would take thousands and stay undetermined."""
GRID_POINTS = 25
"""Starting values tried per shape parameter."""


class TooFewMeasurementsWarning(DegenerateDataWarning):
    """Fewer measurements than the smallest law needs."""


class NotConvergedWarning(DegenerateDataWarning):
    """The trajectory does not determine an asymptote and a half-life."""


@dataclass(frozen=True)
class TrajectoryFit:
    """The law that AICc prefers, and what it says where the data determine it.

    ``asymptote`` (points) and ``half_life`` (time until half the asymptote, unit of the times) are
    all NaN unless ``converged``; ``reason`` then says why. ``parameters`` (a, τ[, b]) stay, so that
    the curve can be drawn.
    """

    law: Law | None
    parameters: tuple[float, ...]
    asymptote: Interval
    half_life: Interval
    aicc: Mapping[Law, float]
    converged: bool
    reason: str
    n: int

    def predict(self, times: ArrayLike) -> FloatArray:
        """Fitted recovery at ``times`` (same shape); NaN without a law."""
        t = np.asarray(times, dtype=np.float64)
        if self.law is None:
            return np.full_like(t, math.nan)
        asymptote, *shape = self.parameters
        return asymptote * LAWS[self.law].approach(t, np.log(shape))


@dataclass(frozen=True)
class ApproachLaw:
    """Shape of an approach from 0 to 1, by the logarithms of its positive parameters."""

    approach: Callable[[FloatArray, FloatArray], FloatArray]
    """Of times and log parameters; parameters of shape (n_shape, m, 1) give m rows."""
    log_half_life: Callable[[FloatArray], tuple[float, FloatArray]]
    """Logarithm of the half-life and its gradient in the log parameters."""
    n_shape: int


def _exponential(t: FloatArray, log_shape: FloatArray) -> FloatArray:
    fraction: FloatArray = -np.expm1(-t / np.exp(log_shape[0]))
    return fraction


def _power_law(t: FloatArray, log_shape: FloatArray) -> FloatArray:
    tau, b = np.exp(log_shape)
    fraction: FloatArray = -np.expm1(-b * np.log1p(t / tau))
    return fraction


def _exponential_half_life(log_shape: FloatArray) -> tuple[float, FloatArray]:
    return float(log_shape[0]) + math.log(math.log(2.0)), np.array([1.0])


def _power_law_half_life(log_shape: FloatArray) -> tuple[float, FloatArray]:
    halvings = math.log(2.0) / math.exp(log_shape[1])  # ln(2)/b
    value = float(log_shape[0]) + math.log(math.expm1(halvings))
    return value, np.array([1.0, halvings / math.expm1(-halvings)])


LAWS: dict[Law, ApproachLaw] = {
    "exponential": ApproachLaw(_exponential, _exponential_half_life, 1),
    "power law": ApproachLaw(_power_law, _power_law_half_life, 2),
}


@dataclass(frozen=True, eq=False)
class _LeastSquares:
    law: Law
    theta: FloatArray  # asymptote, then log shape parameters
    jacobian: FloatArray
    rss: float
    success: bool
    at_bound: bool


def fit_trajectory(
    times: ArrayLike,
    recovery_pct: ArrayLike,
    confidence: float = 0.95,
    max_asymptote_half_width: float = MAX_ASYMPTOTE_HALF_WIDTH,
) -> TrajectoryFit:
    """Fit both laws by least squares, keep the one with the lower AICc, judge what it determines.

    AICc = n ln(RSS/n) + 2k + 2k(k + 1)/(n − k − 1), k counting the error variance (Hurvich & Tsai
    1989). Intervals by the delta method: Student t on n − p degrees of freedom around the
    asymptote, and around the logarithm of the half-life. Not converged: the optimiser fails or
    stops at a bound, the Jacobian is singular, the half-life lies beyond the last measurement, or
    an interval is too wide. Both quantities are then NaN.

    Args:
        times: ascending, steps or tokens, shape ``(measurements,)``. The collapsed state at 0 is
            left out: its recovery is 0 by definition.
        recovery_pct: per cent, same shape; NaN is left out.
        confidence: nominal coverage of both intervals.
        max_asymptote_half_width: points; a wider interval counts as not converged.

    Raises:
        ValueError: bad shapes or lengths, infinite entries, times not ascending from 0,
            confidence outside (0, 1), max_asymptote_half_width not positive.

    Warns:
        TooFewMeasurementsWarning: under 5 measurements; no law is fitted.
        ZeroVarianceWarning: constant recovery; no law is fitted.
        NotConvergedWarning: see above.
    """
    require_open_unit("confidence", confidence)
    if not max_asymptote_half_width > 0.0:
        got = f"max_asymptote_half_width is {max_asymptote_half_width}"
        raise ValueError(f"{got}; pass a positive number of points")
    t, r = as_vector("times", times), as_vector("recovery_pct", recovery_pct)
    require_same_length(times=t, recovery_pct=r)
    if not (np.diff(t) > 0.0).all() or (t < 0.0).any() or np.isnan(t).any():
        raise ValueError("times are not ascending from 0 or later; sort them and drop repeats")
    informative = (t > 0.0) & ~np.isnan(r)
    t, r = t[informative], r[informative]

    candidates = [law for law in LAWS if _aicc_is_defined(law, len(t))]
    if not candidates:
        return _no_law(len(t), confidence, TooFewMeasurementsWarning, "too few measurements")
    if has_no_spread(r):
        return _no_law(len(t), confidence, ZeroVarianceWarning, "recovery is constant")
    fits = {law: _least_squares(law, t, r) for law in candidates}
    aicc = {law: _aicc(fit, r) for law, fit in fits.items()}
    best = fits[min(aicc, key=lambda law: aicc[law])]
    asymptote, half_life = _delta_intervals(best, confidence)
    reason = _why_undetermined(best, asymptote, half_life, t[-1], max_asymptote_half_width)
    if reason:
        warnings.warn(f"{best.law} fit not converged: {reason}", NotConvergedWarning, stacklevel=2)
        asymptote, half_life = (_blank(interval) for interval in (asymptote, half_life))
    parameters = (float(best.theta[0]), *(float(p) for p in np.exp(best.theta[1:])))
    return TrajectoryFit(
        best.law, parameters, asymptote, half_life, aicc, not reason, reason, len(t)
    )


def _blank(interval: Interval) -> Interval:
    return replace(interval, low=math.nan, point=math.nan, high=math.nan)


def _no_law(
    n: int, confidence: float, category: type[DegenerateDataWarning], reason: str
) -> TrajectoryFit:
    warnings.warn(f"no trajectory fit: {reason} ({n} after time 0)", category, stacklevel=3)
    blank = Interval(math.nan, math.nan, math.nan, n, "none", confidence)
    return TrajectoryFit(None, (), blank, blank, {}, False, reason, n)


def _n_estimated(law: Law) -> int:
    return LAWS[law].n_shape + 2  # asymptote, shape, error variance


def _aicc_is_defined(law: Law, n: int) -> bool:
    return n - _n_estimated(law) - 1 > 0


def _aicc(fit: _LeastSquares, recovery: FloatArray) -> float:
    n, k = len(recovery), _n_estimated(fit.law)
    # Below the rounding of the data a smaller RSS is no better fit.
    rss = max(fit.rss, float(np.finfo(np.float64).eps * (recovery @ recovery)))
    return n * math.log(rss / n) + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _least_squares(law: Law, t: FloatArray, r: FloatArray) -> _LeastSquares:
    """Minimise from the best point of a grid over the shape, the asymptote being linear in it."""
    approach = LAWS[law].approach

    def residuals(theta: FloatArray) -> FloatArray:
        misfit: FloatArray = theta[0] * approach(t, theta[1:]) - r
        return misfit

    lower, upper = _log_shape_bounds(law, t)
    result = optimize.least_squares(
        residuals,
        x0=_grid_start(law, t, r, lower, upper),
        bounds=(np.r_[-np.inf, lower], np.r_[np.inf, upper]),
        x_scale="jac",
        jac="3-point",
        ftol=1e-12,  # the default 1e-8 stops short of certified digits along flat valleys
        xtol=1e-12,
        gtol=1e-12,
        max_nfev=MAX_EVALUATIONS,
    )
    return _LeastSquares(
        law=law,
        theta=result.x,
        jacobian=np.asarray(result.jac),
        rss=2.0 * float(result.cost),
        success=bool(result.success),
        at_bound=bool(np.any(result.active_mask != 0)),
    )


def _log_shape_bounds(law: Law, t: FloatArray) -> tuple[FloatArray, FloatArray]:
    time_range = (t[0] / MAX_TIME_SCALE_RATIO, t[-1] * MAX_TIME_SCALE_RATIO)
    ranges = [time_range, EXPONENT_RANGE][: LAWS[law].n_shape]
    lower, upper = np.log(ranges).T
    return lower, upper


def _grid_start(
    law: Law, t: FloatArray, r: FloatArray, lower: FloatArray, upper: FloatArray
) -> FloatArray:
    axes = [np.linspace(*ends, GRID_POINTS + 2)[1:-1] for ends in zip(lower, upper, strict=True)]
    shapes = np.stack([axis.ravel() for axis in np.meshgrid(*axes)])
    curves = LAWS[law].approach(t, shapes[:, :, None])
    asymptotes = (curves @ r) / (curves**2).sum(axis=1)
    best = int(((asymptotes[:, None] * curves - r) ** 2).sum(axis=1).argmin())
    return np.concatenate([asymptotes[[best]], shapes[:, best]])


def _covariance(fit: _LeastSquares) -> FloatArray | None:
    """s²(JᵀJ)⁻¹ with s² = RSS/(n − p), or None where the Jacobian is singular."""
    n, p = fit.jacobian.shape
    lengths = np.linalg.norm(fit.jacobian, axis=0)
    if not (lengths > 0.0).all():
        return None
    unit_columns = fit.jacobian / lengths
    if np.linalg.cond(unit_columns) > MAX_CONDITION_NUMBER:
        return None
    inverse = np.linalg.inv(unit_columns.T @ unit_columns) / np.outer(lengths, lengths)
    covariance: FloatArray = inverse * (fit.rss / (n - p))
    return covariance


def _delta_intervals(fit: _LeastSquares, confidence: float) -> tuple[Interval, Interval]:
    """Asymptote and half-life with delta-method bounds, NaN where the Jacobian is singular."""
    n, p = fit.jacobian.shape
    method = f"{fit.law}, delta method"
    log_point, gradient = LAWS[fit.law].log_half_life(fit.theta[1:])
    asymptote = Interval(math.nan, float(fit.theta[0]), math.nan, n, method, confidence)
    log_half_life = replace(asymptote, point=log_point)
    covariance = _covariance(fit)
    if covariance is not None:
        variance = float(gradient @ covariance[1:, 1:] @ gradient)
        asymptote = with_t_bounds(asymptote, math.sqrt(covariance[0, 0]), n - p)
        log_half_life = with_t_bounds(log_half_life, math.sqrt(variance), n - p)
    return asymptote, exp_interval(log_half_life)


def _why_undetermined(
    fit: _LeastSquares,
    asymptote: Interval,
    half_life: Interval,
    last_time: float,
    max_asymptote_half_width: float,
) -> str:
    """First reason why the data do not determine the fit, or an empty string."""
    if not fit.success:
        return "the optimiser did not converge"
    if fit.at_bound:
        return "a parameter is at its bound"
    if not asymptote.defined:
        return "singular Jacobian"
    if half_life.point > last_time:
        return "half-life beyond the observed window"
    if asymptote.high - asymptote.point > max_asymptote_half_width:
        return "asymptote interval too wide"
    if half_life.high > MAX_HALF_LIFE_RATIO * half_life.low:
        return "half-life interval too wide"
    return ""
