"""What several contrasts say together: more, less, alike or undecided, adjusted over all of them.

Per endpoint of a contrast there are three claims: the treatment recovers more on average, it
recovers less, the mean difference lies within ± the margin. The p value of a claim is the larger of

- Student's t over pairs, which speaks of the spread that was seen (one-sided; TOST for the third);
- Gaffke's p (``mean_bounds``), which speaks of the count: it asks what further pairs that did the
  opposite, by 100 points, would make of the mean. Where all n pairs differ by m it is
  (100/(100 + |m|))^n, so that few pairs decide nothing, however alike they are.

The maximum keeps its level where either of the two does. Over a family of m endpoints Holm's
adjustment is applied to the 2m one-sided claims "more" and "less": any false one among them has a
probability of at most alpha, directions included and whatever the dependence. The m claims "alike"
are adjusted likewise.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from healing.statistics.contrasts.mean_bounds import p_mean_above, p_mean_below
from healing.statistics.intervals import (
    MAX_UNDEFINED_FRACTION,
    FloatArray,
    UndefinedDataWarning,
    as_vector,
    drop_undefined,
)
from healing.statistics.paired_tests import (
    ALPHA,
    EQUIVALENCE_MARGIN,
    PRIMARY_ENDPOINTS,
    EquivalenceTest,
    PairedTest,
    holm_adjust,
    paired_t_test,
    tost_paired,
)

Statement = Literal["superior", "inferior", "equivalent", "inconclusive"]


@dataclass(frozen=True)
class EndpointComparison:
    """One endpoint of a contrast: its tests and what they say.

    Attributes:
        endpoint: Name.
        superiority: Two-sided t test; its interval is of the mean difference, unadjusted.
        equivalence: TOST, unadjusted.
        p_difference: Of the smaller of the claims "more" and "less", times two: by t and by count.
        p_adjusted: Of the same, one-sided, after Holm's adjustment over the family's claims.
        p_alike: Of equivalence, by TOST and by count.
        p_alike_adjusted: The same after Holm's adjustment.
        n_undefined: Pairs without a difference.
        n_more: Pairs in which the treatment recovers more.
        n_less: Pairs in which it recovers less.
        statement: By the adjusted p values.
        differences: Treatment minus control of every pair, points; NaN where undefined.
    """

    endpoint: str
    superiority: PairedTest
    equivalence: EquivalenceTest
    p_difference: float
    p_adjusted: float
    p_alike: float
    p_alike_adjusted: float
    n_undefined: int
    n_more: int
    n_less: int
    statement: Statement
    differences: tuple[float, ...] = ()

    @property
    def sd(self) -> float:
        """Standard deviation of the differences, points; NaN under two."""
        kept = [d for d in self.differences if math.isfinite(d)]
        return float(np.std(kept, ddof=1)) if len(kept) > 1 else math.nan


@dataclass(frozen=True)
class ArmComparison:
    """What all endpoints say together, and each of them.

    Attributes:
        statement: ``equivalent`` where every endpoint is; ``superior`` where at least one is and
            none is inferior, and conversely; else ``inconclusive``.
        endpoints: In the family's order.
        n_family: Endpoints over all contrasts that were adjusted together.
    """

    statement: Statement
    endpoints: tuple[EndpointComparison, ...]
    n_family: int


@dataclass(frozen=True, eq=False)
class Evidence:
    """P values of the three claims of one endpoint, unadjusted."""

    endpoint: str
    differences: FloatArray
    superiority: PairedTest
    equivalence: EquivalenceTest
    more: float
    less: float
    alike: float


def claim_p_values(
    values: FloatArray, margin: float, t_more: ArrayLike, tost: ArrayLike
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """P values of "more", "less" and "alike" by t and count together, for many groups at once.

    Args:
        values: differences in points, all defined, shape ``(..., n)``.
        margin: of equivalence, points.
        t_more: one-sided p of the t test of "more", shape ``(...)``.
        tost: p of TOST, the same shape.

    Returns:
        Three arrays of shape ``(...)``; NaN where the t test is undetermined.
    """
    t_more, tost = np.asarray(t_more), np.asarray(tost)
    more = np.maximum(t_more, p_mean_above(values, 0.0))
    less = np.maximum(1.0 - t_more, p_mean_below(values, 0.0))
    counts = np.maximum(p_mean_below(values, margin), p_mean_above(values, -margin))
    return more, less, np.maximum(tost, counts)


def _usable(endpoint: str, differences: FloatArray) -> FloatArray:
    """Defined differences, or none of them where most are undefined."""
    defined = drop_undefined(differences)
    n_undefined = len(differences) - len(defined)
    if n_undefined <= MAX_UNDEFINED_FRACTION * len(differences):
        return defined
    message = f"{endpoint}: {n_undefined} of {len(differences)} pairs undefined; left undecided"
    warnings.warn(message, UndefinedDataWarning, stacklevel=3)
    return defined[:0]


def evidence_of(
    differences: Mapping[str, ArrayLike],
    margin: float = EQUIVALENCE_MARGIN,
    alpha: float = ALPHA,
    endpoints: tuple[str, ...] = PRIMARY_ENDPOINTS,
) -> list[Evidence]:
    """The unadjusted p values of one contrast, one entry per endpoint.

    Args:
        differences: endpoint name to treatment minus control, points, shape ``(pairs,)`` each; an
            endpoint with more than half of its pairs undefined (NaN) is left undecided.
        margin: half-width of the equivalence region, points.
        alpha: sets the level of the intervals.
        endpoints: fixed in advance; all of them must be passed.

    Raises:
        ValueError: other endpoints, and as ``tost_paired``.

    Warns:
        DegenerateDataWarning: an endpoint is undetermined (its subclass says why).
    """
    if not endpoints or set(differences) != set(endpoints):
        got = sorted(differences)
        raise ValueError(f"differences are of {got}; pass every endpoint of {sorted(endpoints)}")
    found = []
    for name in endpoints:
        vector = as_vector(name, differences[name])
        values = _usable(name, vector)
        test = paired_t_test(values, "two-sided", 1.0 - alpha)
        tost = tost_paired(values, margin, alpha)
        half = test.p_value / 2.0
        t_more = half if test.statistic > 0.0 else 1.0 - half  # NaN stays NaN
        claims = claim_p_values(values, margin, t_more, tost.p_value)
        found.append(Evidence(name, vector, test, tost, *(float(p) for p in claims)))
    return found


def adjusted(more: ArrayLike, less: ArrayLike, alike: ArrayLike) -> tuple[FloatArray, FloatArray]:
    """Holm-adjusted p values of a family: of the likelier direction, and of "alike".

    Args:
        more: one-sided p of every endpoint of every contrast, shape ``(m,)``.
        less: the same.
        alike: the same.

    Returns:
        Two arrays of shape ``(m,)``. The first comes from Holm over all 2m one-sided claims.
    """
    more, less = np.asarray(more, dtype=np.float64), np.asarray(less, dtype=np.float64)
    both = holm_adjust(np.concatenate([more, less])).reshape(2, -1)
    return np.where(more < less, both[0], both[1]), holm_adjust(alike)


def _statement(evidence: Evidence, p_adjusted: float, p_alike: float, alpha: float) -> Statement:
    if p_alike <= alpha:  # NaN is not a rejection
        return "equivalent"
    if not p_adjusted <= alpha:
        return "inconclusive"
    return "superior" if evidence.more < evidence.less else "inferior"


def _joint_statement(statements: Sequence[Statement]) -> Statement:
    if all(statement == "equivalent" for statement in statements):
        return "equivalent"
    directions = {s for s in statements if s in ("superior", "inferior")}
    return directions.pop() if len(directions) == 1 else "inconclusive"


def compare_family(
    contrasts: Sequence[Sequence[Evidence]], alpha: float = ALPHA
) -> list[ArmComparison]:
    """State how treatments recover against controls, adjusted over all contrasts together.

    Per endpoint: "equivalent" where that claim holds, else "superior" (recovers more) or
    "inferior", else "inconclusive". A difference that is both significant and inside the
    margin is thus called equivalent; its adjusted p-value remains in the record. An
    endpoint that is undetermined counts in the adjustment all the same.

    Args:
        contrasts: of every contrast what :func:`evidence_of` gives.
        alpha: overall probability of a false statement of each kind, over all contrasts.

    Returns:
        One comparison per contrast, in their order.
    """
    every = [found for contrast in contrasts for found in contrast]
    if not every:
        return []
    ps = adjusted([e.more for e in every], [e.less for e in every], [e.alike for e in every])
    compared = iter(
        [
            _endpoint(found, float(p), float(p_alike), alpha)
            for found, p, p_alike in zip(every, *ps, strict=True)
        ]
    )
    parts = [tuple(next(compared) for _ in contrast) for contrast in contrasts]
    return [
        ArmComparison(_joint_statement([e.statement for e in part]), part, len(every))
        for part in parts
    ]


def _endpoint(
    found: Evidence, p_adjusted: float, p_alike: float, alpha: float
) -> EndpointComparison:
    return EndpointComparison(
        endpoint=found.endpoint,
        superiority=found.superiority,
        equivalence=found.equivalence,
        p_difference=float(np.minimum(1.0, 2.0 * min(found.more, found.less))),
        p_adjusted=p_adjusted,
        p_alike=found.alike,
        p_alike_adjusted=p_alike,
        n_undefined=int(np.isnan(found.differences).sum()),
        n_more=int((found.differences > 0.0).sum()),
        n_less=int((found.differences < 0.0).sum()),
        statement=_statement(found, p_adjusted, p_alike, alpha),
        differences=tuple(found.differences.tolist()),
    )


def compare_arms(
    differences: Mapping[str, ArrayLike],
    margin: float = EQUIVALENCE_MARGIN,
    alpha: float = ALPHA,
    endpoints: tuple[str, ...] = PRIMARY_ENDPOINTS,
) -> ArmComparison:
    """One contrast by itself: a family of its endpoints alone; see :func:`evidence_of`."""
    (found,) = compare_family([evidence_of(differences, margin, alpha, endpoints)], alpha)
    return found
