"""Where a recovery trajectory is heading: least-squares fits of two laws of approach.

Both start at 0 in the collapsed state and approach ``asymptote``; only their tails differ:

- exponential: r(t) = a(1 − exp(−t/τ)), half-life τ ln 2;
- power law: r(t) = a(1 − (1 + t/τ)^−b), half-life τ(2^(1/b) − 1).

Errors of one trajectory depend on those before (:mod:`healing.statistics.fits.autocorrelation`):
the fit is generalised least squares, and the correlation's own uncertainty widens the intervals.
They are conditional on the law: where noise hides a power law's tail, AICc takes the exponential,
whose asymptote is too low and whose 95 % interval then covers half of the time. An asymptote is an
extrapolation. When one may be said of a group of checkpoints is the rule of
:mod:`healing.statistics.fits.asymptotes`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize

from healing.statistics.fits.autocorrelation import (
    GRID,
    log_determinant,
    neighbour_correlations,
    weights,
    whiten,
)
from healing.statistics.fits.laws import LAWS, Law
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


@dataclass(frozen=True, eq=False)
class _LeastSquares:
    law: Law
    theta: FloatArray  # asymptote, then log shape parameters
    jacobian: FloatArray  # as it is, not whitened
    residuals: FloatArray  # likewise; data minus curve
    phi: float  # correlation of neighbouring errors that the fit took
    rss: float  # of the whitened residuals
    log_determinant: float  # of the errors' correlation matrix
    success: bool
    at_bound: bool


def fit_trajectory(
    times: ArrayLike,
    recovery_pct: ArrayLike,
    confidence: float = 0.95,
    max_asymptote_half_width: float = MAX_ASYMPTOTE_HALF_WIDTH,
    autocorrelated: bool = True,
) -> TrajectoryFit:
    """Fit both laws by least squares, keep the one with the lower AICc, judge what it determines.

    AICc = n ln(RSS/n) + ln|R| + 2k + 2k(k + 1)/(n − k − 1), RSS of the whitened residuals, R the
    correlations of the errors, k counting their variance and their correlation (Hurvich & Tsai
    1989). Intervals by the delta method: Student t on n − p degrees of freedom around the
    asymptote, and around the logarithm of the half-life; their variance is averaged over the
    correlations that the residuals leave possible. Not converged: the optimiser fails or
    stops at a bound, the Jacobian is singular, the half-life lies beyond the last measurement, or
    an interval is too wide. Both quantities are then NaN.

    Args:
        times: ascending, steps or tokens, shape ``(measurements,)``. The collapsed state at 0 is
            left out: its recovery is 0 by definition.
        recovery_pct: per cent, same shape; NaN is left out.
        confidence: nominal coverage of both intervals.
        max_asymptote_half_width: points; a wider interval counts as not converged.
        autocorrelated: whether errors may depend on those before; otherwise least squares is
            ordinary.

    Raises:
        ValueError: bad shapes or lengths, infinite entries, times not ascending from 0,
            confidence outside (0, 1), max_asymptote_half_width not positive.

    Warns:
        TooFewMeasurementsWarning: under 6 measurements, 5 of independent ones; no law is fitted.
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

    candidates = [law for law in LAWS if _aicc_is_defined(law, len(t), autocorrelated)]
    if not candidates:
        return _no_law(len(t), confidence, TooFewMeasurementsWarning, "too few measurements")
    if has_no_spread(r):
        return _no_law(len(t), confidence, ZeroVarianceWarning, "recovery is constant")
    fits = {law: _fit(law, t, r, autocorrelated) for law in candidates}
    aicc = {law: _aicc(fit, r, autocorrelated) for law, fit in fits.items()}
    best = fits[min(aicc, key=lambda law: aicc[law])]
    asymptote, half_life = _delta_intervals(best, t, confidence, autocorrelated)
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


def _n_estimated(law: Law, autocorrelated: bool) -> int:
    return LAWS[law].n_shape + 2 + autocorrelated  # asymptote, shape, error variance, correlation


def _aicc_is_defined(law: Law, n: int, autocorrelated: bool) -> bool:
    return n - _n_estimated(law, autocorrelated) - 1 > 0


def _aicc(fit: _LeastSquares, recovery: FloatArray, autocorrelated: bool) -> float:
    n, k = len(recovery), _n_estimated(fit.law, autocorrelated)
    # Below the rounding of the data a smaller RSS is no better fit.
    rss = max(fit.rss, float(np.finfo(np.float64).eps * (recovery @ recovery)))
    return n * math.log(rss / n) + fit.log_determinant + 2 * k + 2 * k * (k + 1) / (n - k - 1)


def _fit(law: Law, t: FloatArray, r: FloatArray, autocorrelated: bool) -> _LeastSquares:
    """Ordinary least squares, then generalised ones with the mean correlation of its residuals."""
    fit = _least_squares(law, t, r)
    if not autocorrelated or _unit_gram_inverse(fit.jacobian) is None:
        return fit
    phi = float(weights(t, fit.jacobian, fit.residuals) @ GRID)
    return _least_squares(law, t, r, phi, fit.theta)


def _least_squares(
    law: Law, t: FloatArray, r: FloatArray, phi: float = 0.0, start: FloatArray | None = None
) -> _LeastSquares:
    """Minimise the whitened misfit from a start, or from the best point of a grid over the shape,
    the asymptote being linear in it.
    """
    approach, gradient = LAWS[law].approach, LAWS[law].gradient
    rho = neighbour_correlations(t, phi)

    def jacobian(theta: FloatArray) -> FloatArray:
        return np.column_stack([approach(t, theta[1:]), theta[0] * gradient(t, theta[1:])])

    def whitened(theta: FloatArray) -> FloatArray:
        return whiten(residuals(theta), rho)

    def slopes(theta: FloatArray) -> FloatArray:
        return -whiten(jacobian(theta), rho)

    def residuals(theta: FloatArray) -> FloatArray:
        misfit: FloatArray = r - theta[0] * approach(t, theta[1:])
        return misfit

    lower, upper = _log_shape_bounds(law, t)
    result = optimize.least_squares(
        whitened,
        x0=_grid_start(law, t, r, lower, upper) if start is None else _inside(start, lower, upper),
        bounds=(np.r_[-np.inf, lower], np.r_[np.inf, upper]),
        x_scale="jac",
        jac=slopes,
        ftol=1e-12,  # the default 1e-8 stops short of certified digits along flat valleys
        xtol=1e-12,
        gtol=1e-12,
        max_nfev=MAX_EVALUATIONS,
    )
    return _LeastSquares(
        law=law,
        theta=result.x,
        jacobian=jacobian(result.x),
        residuals=residuals(result.x),
        phi=phi,
        rss=2.0 * float(result.cost),
        log_determinant=log_determinant(rho),
        success=bool(result.success),
        at_bound=bool(np.any(result.active_mask != 0)),
    )


def _inside(theta: FloatArray, lower: FloatArray, upper: FloatArray) -> FloatArray:
    """A start strictly within the bounds, which the optimiser asks for."""
    room = 1e-6 * (upper - lower)
    return np.r_[theta[:1], np.clip(theta[1:], lower + room, upper - room)]


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


def _unit_gram_inverse(jacobian: FloatArray) -> FloatArray | None:
    """(JᵀJ)⁻¹, or None where the Jacobian is singular."""
    lengths = np.linalg.norm(jacobian, axis=0)
    if not (lengths > 0.0).all():
        return None
    unit_columns = jacobian / lengths
    if np.linalg.cond(unit_columns) > MAX_CONDITION_NUMBER:
        return None
    inverse: FloatArray = np.linalg.inv(unit_columns.T @ unit_columns) / np.outer(lengths, lengths)
    return inverse


def _covariance(fit: _LeastSquares, t: FloatArray, autocorrelated: bool) -> FloatArray | None:
    """s²(JᵀR⁻¹J)⁻¹ with s² = RSS/(n − p), or None where the Jacobian is singular.

    With errors that may correlate: its mean over the correlations of the grid, by their weights,
    plus the covariance of the estimates that they would give (law of total variance).
    """
    n, p = fit.jacobian.shape
    if _unit_gram_inverse(fit.jacobian) is None:
        return None
    if autocorrelated:
        correlations, share = GRID, weights(t, fit.jacobian, fit.residuals)
    else:
        correlations, share = np.zeros(1), np.ones(1)
    within, steps = np.zeros((p, p)), np.zeros((len(correlations), p))
    for place, (phi, weight) in enumerate(zip(correlations, share, strict=True)):
        rho = neighbour_correlations(t, phi)
        columns, values = whiten(fit.jacobian, rho), whiten(fit.residuals, rho)
        inverse = _unit_gram_inverse(columns)
        if inverse is None:
            return None
        steps[place] = inverse @ (columns.T @ values)
        left = values - columns @ steps[place]
        within += weight * float(left @ left) / (n - p) * inverse
    apart = steps - share @ steps
    covariance: FloatArray = within + (apart * share[:, None]).T @ apart
    return covariance


def _delta_intervals(
    fit: _LeastSquares, t: FloatArray, confidence: float, autocorrelated: bool
) -> tuple[Interval, Interval]:
    """Asymptote and half-life with delta-method bounds, NaN where the Jacobian is singular."""
    n, p = fit.jacobian.shape
    method = f"{fit.law}, delta method"
    log_point, gradient = LAWS[fit.law].log_half_life(fit.theta[1:])
    asymptote = Interval(math.nan, float(fit.theta[0]), math.nan, n, method, confidence)
    log_half_life = replace(asymptote, point=log_point)
    covariance = _covariance(fit, t, autocorrelated)
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
