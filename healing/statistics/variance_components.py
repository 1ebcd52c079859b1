"""How much of the variance of recovery lies between checkpoints, how much between replicates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from healing.statistics.intervals import (
    MIN_CHECKPOINTS,
    DegenerateDataWarning,
    FloatArray,
    TooFewCheckpointsWarning,
    ZeroVarianceWarning,
    as_vector,
    cluster_means,
    drop_undefined,
    has_no_spread,
)


@dataclass(frozen=True)
class VarianceComponents:
    """Variance between and within checkpoints (squared points) and their intraclass correlation."""

    between: float
    within: float
    icc: float
    n_checkpoints: int
    n_replicates: int


def variance_components(values: ArrayLike, clusters: Iterable[Hashable]) -> VarianceComponents:
    """Variance components of replicates nested in checkpoints, by ANOVA (method of moments).

    With k checkpoints of nᵢ replicates, N = Σnᵢ and n₀ = (N − Σnᵢ²/N)/(k − 1):
    within = MSW, between = (MSB − MSW)/n₀, icc = between/(between + within); for balanced data
    the ICC(1,1) of Shrout & Fleiss (1979); unbalanced: Searle, Casella & McCulloch (1992), ch. 3.
    The components are unbiased, therefore unclamped: ``between`` and ``icc`` can be negative.

    Args:
        values: one per replicate, shape ``(replicates,)``; NaN is left out.
        clusters: the checkpoint of each replicate, same length.

    Raises:
        ValueError: no values, different lengths, infinite values, or NaN as a label.

    Warns:
        TooFewCheckpointsWarning: under 3 checkpoints, or one replicate each; all NaN.
        ZeroVarianceWarning: all values are equal; all NaN.
        UndefinedDataWarning: every replicate is undefined (then too few checkpoints as well).
    """
    vector, memberships = as_vector("values", values), list(clusters)
    means = cluster_means(vector, memberships)
    kept = means.counts > 0
    sizes, k, n = means.counts[kept], int(kept.sum()), int(means.counts.sum())
    category = _degeneracy(drop_undefined(vector), k)
    if category is not None:
        message = f"variance_components: {n} values of {k} checkpoints determine no variance"
        warnings.warn(message, category, stacklevel=2)
        return VarianceComponents(math.nan, math.nan, math.nan, k, n)

    mean_of = dict(zip(means.labels, means.means, strict=True))
    residuals = vector - np.array([mean_of[label] for label in memberships])
    within = float(np.nansum(residuals**2)) / (n - k)
    deviations = means.means[kept] - np.nanmean(vector)
    mean_square_between = float((sizes * deviations**2).sum()) / (k - 1)
    n0 = (n - float((sizes**2).sum()) / n) / (k - 1)
    between = (mean_square_between - within) / n0
    return VarianceComponents(between, within, between / (between + within), k, n)


def _degeneracy(defined: FloatArray, n_checkpoints: int) -> type[DegenerateDataWarning] | None:
    if n_checkpoints < MIN_CHECKPOINTS or len(defined) == n_checkpoints:
        return TooFewCheckpointsWarning
    return ZeroVarianceWarning if has_no_spread(defined) else None
