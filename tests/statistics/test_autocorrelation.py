"""Whitening and the restricted likelihood, against dense matrices and simulated errors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from healing.statistics.fits import curve_fits
from healing.statistics.fits.autocorrelation import (
    GRID,
    log_determinant,
    neighbour_correlations,
    weights,
    whiten,
)
from healing.statistics.fits.curve_fits import fit_trajectory
from tests.statistics.limit_rates import errors

UNEVEN = np.array([10.0, 20, 30, 50, 75, 100, 150, 200])


def dense(times: np.ndarray, phi: float) -> np.ndarray:
    distance = np.abs(times[:, None] - times) / np.median(np.diff(times))
    return phi**distance


@pytest.mark.parametrize("phi", [0.0, 0.3, 0.95])
def test_whitening_is_the_inverse_of_the_cholesky_factor(phi: float) -> None:
    matrix, values = dense(UNEVEN, phi), np.random.default_rng(0).normal(size=(8, 3))
    rho = neighbour_correlations(UNEVEN, phi)
    expected = np.linalg.solve(np.linalg.cholesky(matrix), values)
    np.testing.assert_allclose(whiten(values, rho), expected, atol=1e-12)
    np.testing.assert_allclose(whiten(values[:, 0], rho), expected[:, 0], atol=1e-12)
    assert log_determinant(rho) == pytest.approx(np.linalg.slogdet(matrix)[1], abs=1e-12)


def test_weights_are_the_density_of_error_contrasts() -> None:
    """The restricted likelihood is that of n − p contrasts AᵀY with AᵀJ = 0, A orthonormal, at the
    variance that is likeliest for each correlation, up to a power of it (n − p)/2."""
    rng = np.random.default_rng(1)
    jacobian, residuals = rng.normal(size=(8, 2)), rng.normal(size=8)
    contrasts = np.linalg.svd(jacobian.T)[2][2:]
    logs = []
    for phi in GRID:
        covariance = contrasts @ dense(UNEVEN, phi) @ contrasts.T
        z = contrasts @ residuals
        variance = z @ np.linalg.solve(covariance, z) / 6
        logs.append(-0.5 * (6 * math.log(variance) + np.linalg.slogdet(covariance)[1]))
    expected = np.exp(np.array(logs) - max(logs))
    expected /= expected.sum()
    np.testing.assert_allclose(weights(UNEVEN, jacobian, residuals), expected, rtol=1e-8)


@pytest.mark.parametrize("phi", [0.1, 0.5, 0.8])
def test_the_mean_correlation_is_near_the_truth(phi: float) -> None:
    times = np.arange(1.0, 201.0)
    jacobian = np.column_stack([np.ones(200), np.log(times)])
    draws = errors(np.random.default_rng(2), 20, 200, phi, 3.0)
    means = [float(weights(times, jacobian, row) @ GRID) for row in draws]
    # Standard error of one √((1 − φ²)/200), at most 0.07; of the mean of 20 0.016, and the grid's
    # distance 0.08 with its ends at 0.04 and 0.96.
    assert np.mean(means) == pytest.approx(phi, abs=0.06)


def test_the_fit_is_scipys_with_the_full_covariance_matrix() -> None:
    t = np.arange(1.0, 31.0)
    row = 60.0 * -np.expm1(-t / 6.0) + errors(np.random.default_rng(4), 1, 30, 0.8, 3.0)[0]
    fit = curve_fits._fit("exponential", t, row, autocorrelated=True)
    assert 0.2 < fit.phi < 0.95
    wanted, _ = optimize.curve_fit(
        lambda t, a, log_tau: a * -np.expm1(-t / np.exp(log_tau)),
        t, row, p0=(50.0, 2.0), sigma=dense(t, fit.phi),
    )  # fmt: skip
    np.testing.assert_allclose(fit.theta, wanted, rtol=1e-6)


@pytest.mark.parametrize(("modelled", "low", "high"), [(False, 0.25, 0.75), (True, 0.86, 1.0)])
def test_correlated_errors_need_their_correlation(modelled: bool, low: float, high: float) -> None:
    """48 measurements with φ = 0.8: intervals of independent errors cover half of the time."""
    t = np.arange(1.0, 49.0)
    curve = 60.0 * -np.expm1(-t / 6.0)
    rows = curve + errors(np.random.default_rng(3), 100, 48, 0.8, 1.0)
    fits = [fit_trajectory(t, row, autocorrelated=modelled) for row in rows]
    known = [f.asymptote for f in fits if f.converged and f.law == "exponential"]
    assert len(known) > 50
    covered = np.mean([i.low <= 60.0 <= i.high for i in known])
    print(f"φ = 0.8, modelled {modelled}: covers {100 * covered:.0f} % of {len(known)}")
    assert low <= covered <= high
