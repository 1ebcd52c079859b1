"""Does one arm recover differently from another: paired by seed, superiority and equivalence.

The error rates of ``compare_arms``, with normal differences and any dependence between endpoints:

- false "superior" <= alpha: some endpoint whose true mean difference is <= 0 is rejected upwards.
  Holm rejects such an endpoint upwards only if its one-sided p <= alpha/2; over two endpoints the
  sum is <= alpha. The same holds for "inferior".
- false "equivalent" <= alpha: it needs every endpoint to pass its own level-alpha TOST, so that one
  truly different endpoint fails with probability >= 1 - alpha (intersection-union test).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from healing.statistics.intervals import (
    MAX_UNDEFINED_FRACTION,
    MIN_CHECKPOINTS,
    ClusterMeans,
    FloatArray,
    Interval,
    UndefinedDataWarning,
    as_vector,
    degeneracy,
    drop_undefined,
    require_open_unit,
    undetermined,
    with_t_bounds,
)

Alternative = Literal["two-sided", "greater", "less"]
Statement = Literal["superior", "inferior", "equivalent", "inconclusive"]

EQUIVALENCE_MARGIN = 10.0
"""Differences within ± this many recovery points count as none."""
ALPHA = 0.05
"""Overall probability of a false statement of each kind."""
PRIMARY_ENDPOINTS = ("rank_recovery_pct", "loss_recovery_pct")
"""The family over which superiority is adjusted, fixed in advance."""
MAX_ENDPOINTS = 2
"""Above two, directional errors of the Holm step are no longer bounded by the argument above."""


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


@dataclass(frozen=True)
class EndpointComparison:
    """One endpoint: its tests and what they say, superiority after the Holm adjustment."""

    endpoint: str
    superiority: PairedTest
    p_adjusted: float
    equivalence: EquivalenceTest
    n_undefined: int
    statement: Statement
    differences: tuple[float, ...] = ()
    """Treatment minus control of every pair, points; NaN where either side is undefined."""


@dataclass(frozen=True)
class ArmComparison:
    """What all endpoints say together, and each of them."""

    statement: Statement
    endpoints: tuple[EndpointComparison, ...]


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


def _usable(endpoint: str, differences: FloatArray) -> FloatArray:
    """Defined differences, or none of them where most are undefined."""
    defined = drop_undefined(differences)
    n_undefined = len(differences) - len(defined)
    if n_undefined <= MAX_UNDEFINED_FRACTION * len(differences):
        return defined
    message = f"{endpoint}: {n_undefined} of {len(differences)} pairs undefined; left undecided"
    warnings.warn(message, UndefinedDataWarning, stacklevel=3)
    return defined[:0]


def _endpoint_statement(
    superiority: PairedTest, p_adjusted: float, equivalence: EquivalenceTest
) -> Statement:
    if equivalence.equivalent:
        return "equivalent"
    if not p_adjusted <= equivalence.alpha:  # NaN is not a rejection
        return "inconclusive"
    return "superior" if superiority.statistic > 0.0 else "inferior"


def _joint_statement(statements: Sequence[Statement]) -> Statement:
    if all(statement == "equivalent" for statement in statements):
        return "equivalent"
    directions = {s for s in statements if s in ("superior", "inferior")}
    return directions.pop() if len(directions) == 1 else "inconclusive"


def compare_arms(
    differences: Mapping[str, ArrayLike],
    margin: float = EQUIVALENCE_MARGIN,
    alpha: float = ALPHA,
    family: tuple[str, ...] = PRIMARY_ENDPOINTS,
) -> ArmComparison:
    """State how a treatment arm recovers against a control, from differences paired by seed.

    Per endpoint: "equivalent" where TOST rejects, else "superior" (recovers more) or "inferior"
    where the two-sided paired t test rejects after Holm's adjustment, else "inconclusive". A
    difference that is both significant and inside the margin is thus called equivalent; its
    adjusted p-value remains in the record. Together: "equivalent" where every endpoint is;
    "superior" where at least one is and none is inferior, and conversely; else "inconclusive".
    The level ``alpha`` holds for this joint statement, see the top of the module.

    Args:
        differences: endpoint name to treatment minus control, points, shape ``(pairs,)`` each;
            an endpoint with more than half of its pairs undefined (NaN) is left undecided.
        margin: half-width of the equivalence region, points.
        alpha: overall probability of a false statement of each kind.
        family: the endpoints, at most two; all of them must be passed.

    Raises:
        ValueError: endpoints other than the family, none or over two, and as ``tost_paired``.

    Warns:
        DegenerateDataWarning: an endpoint is undetermined (its subclass says why).
    """
    if not 1 <= len(family) <= MAX_ENDPOINTS:
        raise ValueError(f"family has {len(family)} endpoints; pass 1 to {MAX_ENDPOINTS}")
    if set(differences) != set(family):
        got = sorted(differences)
        raise ValueError(f"differences are of {got}; pass every endpoint of {sorted(family)}")
    vectors = {name: as_vector(name, differences[name]) for name in family}
    usable = {name: _usable(name, vector) for name, vector in vectors.items()}
    tosts = [tost_paired(usable[name], margin, alpha) for name in family]
    tests = [paired_t_test(usable[name], "two-sided", 1.0 - alpha) for name in family]
    adjusted = [float(p) for p in holm_adjust([test.p_value for test in tests])]
    endpoints = tuple(
        EndpointComparison(
            name,
            test,
            p,
            tost,
            n_undefined=int(np.isnan(vectors[name]).sum()),
            statement=_endpoint_statement(test, p, tost),
            differences=tuple(vectors[name].tolist()),
        )
        for name, test, p, tost in zip(family, tests, adjusted, tosts, strict=True)
    )
    return ArmComparison(_joint_statement([e.statement for e in endpoints]), endpoints)
