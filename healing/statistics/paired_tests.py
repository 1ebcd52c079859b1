"""Tests of one mean difference, paired by seed: superiority and equivalence; Holm's adjustment.

What several of them say together, and what a count of pairs adds: ``contrasts/family.py``.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from healing.statistics.intervals import (
    MIN_CHECKPOINTS,
    ClusterMeans,
    FloatArray,
    Interval,
    as_vector,
    degeneracy,
    drop_undefined,
    require_open_unit,
    undetermined,
    with_t_bounds,
)

Alternative = Literal["two-sided", "greater", "less"]

EQUIVALENCE_MARGIN = 10.0
"""Differences within ± this many recovery points count as none."""
ALPHA = 0.05
"""Overall probability of a false statement of each kind."""
PRIMARY_ENDPOINTS = ("rank_recovery_pct", "loss_recovery_pct")
"""The family over which superiority is adjusted, fixed in advance."""


@dataclass(frozen=True, eq=False)
class PairedDifferences:
    """Treatment minus control of the checkpoints that share a label, usually a seed."""

    labels: tuple[Hashable, ...]
    differences: FloatArray
    """Points, shape ``(pairs,)``; NaN where either side is undefined."""
    n_unpaired: int
    """Checkpoints of either arm without a partner."""


@dataclass(frozen=True)
class PairedTest:
    """Paired t test of a zero mean difference; ``interval`` is always two-sided."""

    statistic: float
    p_value: float
    interval: Interval
    alternative: Alternative


@dataclass(frozen=True)
class EquivalenceTest:
    """Two one-sided t tests; equivalent at ``alpha`` where p_value <= alpha.

    ``interval`` has coverage 1 - 2·alpha and lies inside ±margin exactly then.
    """

    p_value: float
    interval: Interval
    margin: float
    alpha: float

    @property
    def equivalent(self) -> bool:
        """Whether both one-sided tests reject; False where undetermined."""
        return self.p_value <= self.alpha


def paired_differences(treatment: ClusterMeans, control: ClusterMeans) -> PairedDifferences:
    """Treatment minus control, paired by label, in the treatment's order.

    Raises:
        ValueError: the arms share no label.
    """
    control_mean = dict(zip(control.labels, control.means, strict=True))
    shared = [label for label in treatment.labels if label in control_mean]
    if not shared:
        raise ValueError("treatment and control share no label; label both by the same seeds")
    treatment_mean = dict(zip(treatment.labels, treatment.means, strict=True))
    differences = np.array([treatment_mean[label] - control_mean[label] for label in shared])
    n_unpaired = len(treatment.labels) + len(control.labels) - 2 * len(shared)
    return PairedDifferences(tuple(shared), differences, n_unpaired)


def _mean_and_error(differences: FloatArray) -> tuple[float, float]:
    return float(differences.mean()), float(differences.std(ddof=1)) / math.sqrt(len(differences))


def paired_t_test(
    differences: ArrayLike, alternative: Alternative = "two-sided", confidence: float = 0.95
) -> PairedTest:
    """Student's paired t test that the mean difference is zero (Student 1908).

    t = mean/(s/√n) on n − 1 degrees of freedom.

    Args:
        differences: one per pair, in points, shape ``(pairs,)``; NaN is left out.
        alternative: "two-sided", "greater" (mean difference above 0) or "less".
        confidence: nominal coverage of the two-sided interval of the mean difference.

    Raises:
        ValueError: bad shape, infinite entries, unknown alternative, confidence outside (0, 1).

    Warns:
        TooFewCheckpointsWarning: under 3 pairs; statistic, p-value and bounds are NaN.
        ZeroVarianceWarning: equal differences; the same.
    """
    require_open_unit("confidence", confidence)
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative is {alternative!r}; pass one of {get_args(Alternative)}")
    kept = drop_undefined(as_vector("differences", differences))
    point, df = float(kept.mean()) if len(kept) else math.nan, len(kept) - 1
    estimate = Interval(math.nan, point, math.nan, len(kept), "paired Student t", confidence)
    problem = degeneracy(kept, MIN_CHECKPOINTS)
    if problem is not None:
        return PairedTest(math.nan, math.nan, undetermined(estimate, *problem), alternative)
    mean, standard_error = _mean_and_error(kept)
    t = mean / standard_error
    tail = {"greater": -t, "less": t, "two-sided": -abs(t)}[alternative]
    p_value = float(special.stdtr(df, tail)) * (2.0 if alternative == "two-sided" else 1.0)
    return PairedTest(t, p_value, with_t_bounds(estimate, standard_error, df), alternative)


def tost_paired(
    differences: ArrayLike, margin: float = EQUIVALENCE_MARGIN, alpha: float = ALPHA
) -> EquivalenceTest:
    """Paired equivalence by two one-sided t tests (Schuirmann 1987).

    p = max(P(T > (mean + margin)/se), P(T < (mean − margin)/se)), T on n − 1 degrees of freedom.

    Args:
        differences: one per pair, in points, shape ``(pairs,)``; NaN is left out.
        margin: half-width of the equivalence region, points.
        alpha: level of each one-sided test, which is also the level of the whole.

    Raises:
        ValueError: bad shape, infinite entries, margin not positive, alpha outside (0, 0.5).

    Warns:
        TooFewCheckpointsWarning: under 3 pairs; p-value and bounds are NaN.
        ZeroVarianceWarning: equal differences; the same.
    """
    if not 0.0 < alpha < 0.5:
        raise ValueError(f"alpha is {alpha}; pass a level strictly between 0 and 0.5")
    if not 0.0 < margin < math.inf:
        raise ValueError(f"margin is {margin}; pass a positive number of points")
    kept = drop_undefined(as_vector("differences", differences))
    point, df = float(kept.mean()) if len(kept) else math.nan, len(kept) - 1
    estimate = Interval(math.nan, point, math.nan, len(kept), "TOST", 1.0 - 2.0 * alpha)
    problem = degeneracy(kept, MIN_CHECKPOINTS)
    if problem is not None:
        return EquivalenceTest(math.nan, undetermined(estimate, *problem), margin, alpha)
    mean, standard_error = _mean_and_error(kept)
    p_above_lower = float(special.stdtr(df, -(mean + margin) / standard_error))
    p_below_upper = float(special.stdtr(df, (mean - margin) / standard_error))
    interval = with_t_bounds(estimate, standard_error, df)
    return EquivalenceTest(max(p_above_lower, p_below_upper), interval, margin, alpha)


def holm_adjust(p_values: ArrayLike) -> FloatArray:
    """Holm's step-down adjusted p-values (Holm 1979): strong control of the family-wise error.

    Sorted ascending, p̃₍ᵢ₎ = max over j <= i of min(1, (m − j + 1)·p₍ⱼ₎). An undetermined (NaN)
    endpoint stays NaN but still counts in m, because the family was fixed in advance.

    Args:
        p_values: shape ``(endpoints,)``.

    Returns:
        Adjusted p-values, same shape and order.

    Raises:
        ValueError: bad shape, or p-values outside [0, 1].
    """
    p = as_vector("p_values", p_values)
    if ((p < 0.0) | (p > 1.0)).any():
        raise ValueError(f"p_values are {p.tolist()}; pass probabilities in [0, 1] or NaN")
    order = np.argsort(p)  # NaN sorts last, where it takes the smallest multipliers
    stepped = np.minimum(1.0, p[order] * np.arange(len(p), 0, -1))
    adjusted = np.empty_like(p)
    adjusted[order] = np.maximum.accumulate(stepped)
    return adjusted
