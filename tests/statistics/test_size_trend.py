"""Slope of recovery against log10(parameters)."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.statistics.fits.size_trend import TooFewSizesWarning, scaling_slope
from healing.statistics.intervals import ZeroVarianceWarning


def test_slope_of_three_points_by_hand() -> None:
    # y = 5/2 x − 29/2 + (1/2, −1, 1/2): RSS 3/2 on 1 degree of freedom, Sxx 2; t(1) = 12.7062.
    fit = scaling_slope([6.0, 7.0, 8.0], [1.0, 2.0, 6.0])
    assert fit.slope.point == pytest.approx(2.5, rel=1e-12)
    assert fit.intercept == pytest.approx(-14.5, rel=1e-12)
    half_width = 12.7062 * math.sqrt(0.75)
    assert fit.slope.high - 2.5 == pytest.approx(half_width, rel=1e-5)  # the digits of t(1)
    assert 2.5 - fit.slope.low == pytest.approx(half_width, rel=1e-5)
    assert (fit.n_sizes, fit.slope.n) == (3, 3)


def test_slope_agrees_with_scipy_with_replicated_sizes() -> None:
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.log10([1.3e6, 1.4e7, 7e7, 1.6e8]), 3)
    recovery = 120.0 - 9.0 * sizes + rng.normal(scale=6.0, size=12)
    fit, theirs = scaling_slope(sizes, recovery), scipy_stats.linregress(sizes, recovery)
    half_width = scipy_stats.t.ppf(0.975, 10) * theirs.stderr
    assert fit.slope.point == pytest.approx(theirs.slope, rel=1e-9)
    assert fit.intercept == pytest.approx(theirs.intercept, rel=1e-9)
    assert fit.slope.high == pytest.approx(theirs.slope + half_width, rel=1e-9)
    assert (fit.n_sizes, fit.slope.n) == (4, 12)


def test_undefined_recovery_is_left_out() -> None:
    kept = scaling_slope([6.0, 7.0, 8.0], [1.0, 2.0, 6.0])
    assert scaling_slope([6.0, 7.0, 8.0, 9.0], [1.0, 2.0, 6.0, math.nan]) == kept


@pytest.mark.parametrize(
    ("sizes", "recovery"),
    [
        ([6.0, 6.0, 6.0, 8.0, 8.0, 8.0], [1.0, 2.0, 3.0, 4.0, 5.0, 7.0]),
        ([6.0, 7.0, 8.0], [1.0, 2.0, math.nan]),
        ([], []),
    ],
)
def test_under_three_sizes_there_is_no_slope(sizes: list[float], recovery: list[float]) -> None:
    with pytest.warns(TooFewSizesWarning, match="distinct sizes, at least 3 needed"):
        fit = scaling_slope(sizes, recovery)
    assert all(math.isnan(v) for v in (fit.slope.point, fit.slope.low, fit.intercept))


@pytest.mark.parametrize("recovery", [[10.0, 20.0, 30.0], [50.0, 50.0, 50.0], [0.0, 0.0, 0.0]])
def test_points_on_a_line_give_no_bounds(recovery: list[float]) -> None:
    with pytest.warns(ZeroVarianceWarning, match="all 3 points on the line"):
        fit = scaling_slope([6.0, 7.0, 8.0], recovery)
    assert fit.slope.point == pytest.approx((recovery[2] - recovery[0]) / 2.0, abs=1e-12)
    assert not fit.slope.defined


def test_bad_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"holds NaN or raw counts; pass numpy.log10\(n_params\)"):
        scaling_slope([1.3e6, 1.4e7, 7e7], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="log10_params holds NaN"):
        scaling_slope([6.0, 7.0, math.nan], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=r"lengths differ: \{'log10_params': 3, 'recovery': 2\}"):
        scaling_slope([6.0, 7.0, 8.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="confidence is 1"):
        scaling_slope([6.0, 7.0, 8.0], [1.0, 2.0, 6.0], confidence=1.0)
