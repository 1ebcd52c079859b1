"""Evidence about the mean of bounded values that holds for skewed and split ones: Gaffke's p value.

Student's t takes it that what was not drawn looks like what was. Where nine in ten pairs differ by
-10 points and one by +90, ten pairs are all of the first kind in a third of the cases, and t is
sure that the mean is negative: it is zero. Here one more value is added, the worst there could be,
and all get random weights that sum to one (flat Dirichlet):

    p = P(sum of W_i x_i + W_{n+1} worst >= threshold)

For values of two kinds this is the exact binomial tail, and the bound of the mean is Clopper and
Pearson's (Gaffke 2005; Learned-Miller & Thomas 2019). That p keeps its level for every
bounded distribution is proved for special cases and has held in every simulation, here too
(``tests/statistics/test_contrast_rule.py``).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from healing.statistics.intervals import FloatArray

LARGEST = 100.0
"""Points: the largest difference of two recoveries between 0 and 100 %."""
SPACING, SPACED_VALUES = 0.1, 50
"""Of the quadrature, in ln t, up to this many values; closer for more of them."""
SMALLEST_T, LARGEST_T = 1e-12, 1e9
"""Range of the quadrature, in units of one over the largest coefficient: what is left out is under
1e-8."""


def positive_probability(coefficients: ArrayLike) -> FloatArray:
    """P(Σ aᵢEᵢ >= 0) for independent standard exponential Eᵢ.

    Divided by their sum they are the weights of a flat Dirichlet distribution.

    By inversion of the characteristic function Π 1/(1 − iaᵢt) (Gil-Pelaez 1951; Imhof 1961):
    ½ + (1/π) ∫ sin(Σ arctan aᵢt) / Π√(1 + aᵢ²t²) d ln t, by the trapezoidal rule in ln t, which
    converges exponentially for this integrand.

    Args:
        coefficients: shape ``(..., n)``.

    Returns:
        Shape ``(...)``, absolute error under 1e-7.
    """
    a = np.asarray(coefficients, dtype=np.float64)
    spacing = SPACING * min(1.0, math.sqrt(SPACED_VALUES / a.shape[-1]))
    largest = np.abs(a).max(axis=-1, keepdims=True)
    a = a / np.where(largest > 0.0, largest, 1.0)
    total = np.zeros(a.shape[:-1])
    for u in np.arange(math.log(SMALLEST_T), math.log(LARGEST_T), spacing):
        at = a * math.exp(u)
        size = np.exp(-0.5 * np.log1p(at * at).sum(axis=-1))
        total += np.sin(np.arctan(at).sum(axis=-1)) * size
    inside = np.clip(0.5 + spacing * total / math.pi, 0.0, 1.0)
    never, always = (a < 0.0).all(axis=-1), (a >= 0.0).all(axis=-1)
    result: FloatArray = np.where(always, 1.0, np.where(never, 0.0, inside))
    return result


def p_mean_below(values: ArrayLike, threshold: float) -> FloatArray:
    """One-sided p value against "the mean is at or above the threshold", worst case 100 points.

    Values below −100 count as −100, since one far outlier must not carry the others; where one is
    above 100, that is the worst case.

    Args:
        values: points, all defined, shape ``(..., n)``; n may be 0, which gives 1.
        threshold: points, under 100.
    """
    x = np.asarray(values, dtype=np.float64)
    worst = np.maximum(LARGEST, x.max(axis=-1, keepdims=True, initial=LARGEST))
    every = np.concatenate([np.maximum(x, -LARGEST), worst], axis=-1)
    return positive_probability(every - threshold)


def p_mean_above(values: ArrayLike, threshold: float) -> FloatArray:
    """As :func:`p_mean_below`, against "the mean is at or below the threshold"."""
    return p_mean_below(-np.asarray(values, dtype=np.float64), -threshold)
