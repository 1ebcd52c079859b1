"""Errors that depend on the error before: whitening, and how likely each correlation is.

Measurements of one healing run are errors around a curve that follow one another: what moves the
model at one step still moves it at the next. Two errors at times s and t are taken to correlate by
φ^(|t − s|/Δ), Δ the median distance of the measurements (AR(1) at equal distances).
"""

from __future__ import annotations

import numpy as np

from healing.statistics.intervals import FloatArray

GRID = (np.arange(12) + 0.5) / 12.0
"""Correlations of neighbours that are weighed, all equally likely beforehand."""


def neighbour_correlations(times: FloatArray, phi: float) -> FloatArray:
    """Correlation of each error with the one before, shape ``(measurements − 1,)``.

    Args:
        times: ascending, shape ``(measurements,)``.
        phi: correlation at the median distance, from 0 to under 1.
    """
    gaps = np.diff(times)
    correlations: FloatArray = np.power(phi, gaps / np.median(gaps))
    return correlations


def whiten(values: FloatArray, correlations: FloatArray) -> FloatArray:
    """Values whose errors have unit correlation matrix (Prais & Winsten 1954).

    e₁ = u₁ and eᵢ = (uᵢ − ρᵢuᵢ₋₁)/√(1 − ρᵢ²).

    Args:
        values: shape ``(measurements,)`` or ``(measurements, columns)``.
        correlations: of :func:`neighbour_correlations`.
    """
    rho = correlations.reshape(-1, *(1,) * (values.ndim - 1))
    later = (values[1:] - rho * values[:-1]) / np.sqrt(1.0 - rho**2)
    return np.concatenate([values[:1], later])


def log_determinant(correlations: FloatArray) -> float:
    """Logarithm of the determinant of the correlation matrix: Σ ln(1 − ρᵢ²)."""
    return float(np.log1p(-(correlations**2)).sum())


def weights(times: FloatArray, jacobian: FloatArray, residuals: FloatArray) -> FloatArray:
    """Probability of each correlation of :data:`GRID`, by the restricted likelihood.

    ln L(φ) = −½[(n − p) ln RSS(φ) + ln|R| + ln|JᵀR⁻¹J|] with R the correlations and RSS(φ) what
    generalised least squares leaves (Patterson & Thompson 1971). Residuals of a fit correlate less
    than the errors do; the restricted likelihood knows that, up to what few measurements can say.

    Args:
        times: ascending, shape ``(n,)``.
        jacobian: of the fitted curve in its parameters, shape ``(n, p)``, of full rank.
        residuals: data minus curve, shape ``(n,)``.
    """
    n, p = jacobian.shape
    floor = np.finfo(np.float64).tiny
    log_likelihood = np.empty(len(GRID))
    for place, phi in enumerate(GRID):
        rho = neighbour_correlations(times, phi)
        columns, values = whiten(jacobian, rho), whiten(residuals, rho)
        q, r = np.linalg.qr(columns)
        rss = max(float(values @ values - (q.T @ values) @ (q.T @ values)), floor)
        half_log_gram = float(np.log(np.abs(np.diag(r)) + floor).sum())
        log_likelihood[place] = -0.5 * (
            (n - p) * np.log(rss) + log_determinant(rho) + 2.0 * half_log_gram
        )
    likelihood = np.exp(log_likelihood - log_likelihood.max())
    weight: FloatArray = likelihood / likelihood.sum()
    return weight
