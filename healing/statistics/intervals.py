"""Recovery statistics whose unit is the checkpoint: cluster means and intervals.

A *checkpoint* is one collapsed state, a *replicate* is one healing run started from it. Replicates
of one checkpoint share its weights and are not independent, so they are averaged first and every
interval is computed from the averages. Values are recovery percentages unless stated otherwise.

Degenerate data give NaN and a subclass of ``DegenerateDataWarning``; bad arguments raise
``ValueError``. Undefined values enter as NaN, are left out and are counted.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special, stats

FloatArray = NDArray[np.float64]

MAX_UNDEFINED_FRACTION = 0.5
"""A group is "undefined" where more than this fraction of its runs is."""
MIN_CHECKPOINTS = 3
"""Fewest checkpoints that get an interval."""
MIN_BOOTSTRAP_CHECKPOINTS = 10
"""Fewest checkpoints that get a bootstrap interval."""
SPREAD_FLOOR = 0.5
"""Points: recoveries are not measured better than this, so that equal ones are taken for that far
apart. Without a floor, equal recoveries would have no interval and nearly equal ones the shortest.
"""
RELATIVE_SPREAD_FLOOR = 1e-12
"""A spread below this fraction of the largest magnitude is rounding, not variance."""


class DegenerateDataWarning(RuntimeWarning):
    """The data do not determine the quantity; NaN is returned."""


class TooFewCheckpointsWarning(DegenerateDataWarning):
    """Fewer independent units than the method needs."""


class ZeroVarianceWarning(DegenerateDataWarning):
    """The values do not vary, so that their variance says nothing about the error."""


class UndefinedDataWarning(DegenerateDataWarning):
    """No value, or not enough of them, is defined."""


@dataclass(frozen=True)
class Interval:
    """A confidence interval around a point estimate, in the unit of the estimate.

    ``n`` counts the independent units behind it and ``confidence`` is the nominal coverage. Bounds
    are NaN where the data do not determine them and infinite where they bound one side only.
    """

    low: float
    point: float
    high: float
    n: int
    method: str
    confidence: float = 0.95

    @property
    def defined(self) -> bool:
        """Whether both bounds are numbers (an infinite bound is one)."""
        return not (math.isnan(self.low) or math.isnan(self.high))


@dataclass(frozen=True, eq=False)
class ClusterMeans:
    """Means of the defined replicates of each checkpoint, labels in order of first appearance."""

    labels: tuple[Hashable, ...]
    means: FloatArray
    """Shape ``(checkpoints,)``; NaN where no replicate is defined."""
    counts: NDArray[np.int64]
    """Defined replicates, shape ``(checkpoints,)``."""
    n_replicates: int
    n_undefined: int

    @property
    def undefined_fraction(self) -> float:
        """Fraction of all replicates that are undefined."""
        return self.n_undefined / self.n_replicates


def as_vector(name: str, values: ArrayLike) -> FloatArray:
    """Return ``values`` as a float64 vector that holds finite numbers and NaN.

    Raises:
        ValueError: not one-dimensional, or infinite entries.
    """
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise ValueError(f"{name} has shape {vector.shape}; pass a one-dimensional sequence")
    if np.isinf(vector).any():
        n = int(np.isinf(vector).sum())
        raise ValueError(f"{name} holds {n} infinite entries; pass an undefined value as NaN")
    return vector


def require_open_unit(name: str, value: float) -> None:
    """Reject a probability outside (0, 1).

    Raises:
        ValueError: outside (0, 1) or NaN.
    """
    if not 0.0 < value < 1.0:
        raise ValueError(f"{name} is {value}; pass a number strictly between 0 and 1")


def require_same_length(**vectors: FloatArray) -> None:
    """Reject vectors of different lengths, naming them.

    Raises:
        ValueError: the lengths differ.
    """
    lengths = {name: len(vector) for name, vector in vectors.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"lengths differ: {lengths}; pass one entry per observation in each")


def has_no_spread(values: FloatArray) -> bool:
    """Whether the values are equal up to rounding."""
    return bool(np.ptp(values) <= RELATIVE_SPREAD_FLOOR * np.abs(values).max())


def drop_undefined(values: FloatArray) -> FloatArray:
    """Return the entries that are not NaN."""
    return values[~np.isnan(values)]


def degeneracy(values: FloatArray, minimum: int) -> tuple[type[DegenerateDataWarning], str] | None:
    """Why these independent values determine no standard error: warning and reason, or None."""
    if len(values) < minimum:
        reason = f"{len(values)} checkpoints, at least {minimum} needed"
        return TooFewCheckpointsWarning, reason
    if has_no_spread(values):
        return ZeroVarianceWarning, f"all {len(values)} values are equal"
    return None


def _mean_without_bounds(means: FloatArray, method: str, confidence: float) -> Interval:
    point = float(means.mean()) if len(means) else math.nan
    return Interval(math.nan, point, math.nan, len(means), method, confidence)


def undetermined(
    estimate: Interval, category: type[DegenerateDataWarning], reason: str
) -> Interval:
    """Warn with ``category`` that ``estimate`` has no bounds, and hand it back."""
    warnings.warn(f"{estimate.method}: {reason}; the bounds are NaN", category, stacklevel=3)
    return estimate


def with_t_bounds(estimate: Interval, standard_error: float, df: float) -> Interval:
    """Set the bounds point ± t(df, (1 + confidence)/2) · standard error."""
    half_width = float(special.stdtrit(df, (1.0 + estimate.confidence) / 2.0)) * standard_error
    return replace(estimate, low=estimate.point - half_width, high=estimate.point + half_width)


def exp_interval(log_interval: Interval) -> Interval:
    """Carry an interval on the log scale back; bounds too large for a float become infinite."""
    with np.errstate(over="ignore"):
        low, point, high = np.exp([log_interval.low, log_interval.point, log_interval.high])
    return replace(log_interval, low=float(low), point=float(point), high=float(high))


def scale_interval(interval: Interval, factor: float) -> Interval:
    """An interval in another unit: steps times tokens per step are tokens. NaN and ∞ stay."""
    low, point, high = (factor * x for x in (interval.low, interval.point, interval.high))
    return replace(interval, low=low, point=point, high=high)


def cluster_means(values: ArrayLike, clusters: Iterable[Hashable]) -> ClusterMeans:
    """Average the replicates of each checkpoint, leaving out and counting undefined (NaN) ones.

    Args:
        values: one per replicate, shape ``(replicates,)``.
        clusters: the checkpoint of each replicate (a seed, a run id), same length.

    Raises:
        ValueError: no values, different lengths, infinite values, or NaN as a label.

    Warns:
        UndefinedDataWarning: every replicate is undefined.
    """
    vector, memberships = as_vector("values", values), list(clusters)
    if len(vector) == 0:
        raise ValueError("values is empty; pass at least one replicate")
    if len(vector) != len(memberships):
        lengths = f"{len(vector)} values but {len(memberships)} clusters"
        raise ValueError(f"{lengths}; pass one checkpoint label per replicate")
    if any(isinstance(label, float) and math.isnan(label) for label in memberships):
        raise ValueError("clusters holds NaN; pass a seed or a run id for every replicate")

    position = {label: i for i, label in enumerate(dict.fromkeys(memberships))}
    index = np.array([position[label] for label in memberships])
    defined = ~np.isnan(vector)
    if not defined.any():
        warnings.warn("cluster_means: no replicate is defined", UndefinedDataWarning, stacklevel=2)
    counts = np.bincount(index[defined], minlength=len(position))
    sums = np.bincount(index[defined], vector[defined], minlength=len(position))
    means = np.divide(sums, counts, out=np.full(len(position), math.nan), where=counts > 0)
    n_undefined = int(len(vector) - defined.sum())
    return ClusterMeans(tuple(position), means, counts, len(vector), n_undefined)


def t_interval(cluster_means: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student t interval of the mean over checkpoints.

    mean ± t(n − 1, (1 + confidence)/2) · s/√n, s the standard deviation with n − 1 (Student 1908).

    Args:
        cluster_means: one mean per checkpoint, shape ``(checkpoints,)``; NaN is left out.
        confidence: nominal coverage.

    Raises:
        ValueError: bad shape, infinite entries, or confidence outside (0, 1).

    Warns:
        TooFewCheckpointsWarning: n < 3; the bounds are NaN, the point is still the mean.
        ZeroVarianceWarning: equal means; the bounds are NaN.
    """
    require_open_unit("confidence", confidence)
    means = drop_undefined(as_vector("cluster_means", cluster_means))
    estimate = _mean_without_bounds(means, "Student t", confidence)
    problem = degeneracy(means, MIN_CHECKPOINTS)
    if problem is not None:
        return undetermined(estimate, *problem)
    standard_error = float(means.std(ddof=1)) / math.sqrt(len(means))
    return with_t_bounds(estimate, standard_error, df=len(means) - 1)


def recovery_bounds(
    values: FloatArray, confidence: float = 0.95, error: ArrayLike = 0.0
) -> tuple[FloatArray, FloatArray]:
    """Bounds of the mean recovery of many groups of checkpoints at once.

    mean ± √((t(n − 1)·s/√n)² + (z·e)²): the spread s between checkpoints, at least
    :data:`SPREAD_FLOOR`, and the standard error e of measurement, which all checkpoints share
    since they are measured on one probe, so that more of them do not average it out. The two
    half-widths are added in quadrature (Zou & Donner 2008).

    Args:
        values: recoveries in per cent, shape ``(..., n)``, all defined, n at least 2.
        confidence: nominal coverage.
        error: e in points, broadcast over the groups.

    Returns:
        Lower and upper bounds, shape ``(...)``.
    """
    n = values.shape[-1]
    spread = np.maximum(values.std(axis=-1, ddof=1), SPREAD_FLOOR)
    between = special.stdtrit(n - 1, (1.0 + confidence) / 2.0) * spread / math.sqrt(n)
    shared = special.ndtri((1.0 + confidence) / 2.0) * np.asarray(error, dtype=np.float64)
    mean, half_width = values.mean(axis=-1), np.hypot(between, shared)
    return mean - half_width, mean + half_width


def recovery_interval(
    cluster_means: ArrayLike, confidence: float = 0.95, error: float = 0.0
) -> Interval:
    """Interval of the mean recovery over checkpoints: Student t with the error of measurement.

    As :func:`t_interval` where the checkpoints differ by more than :data:`SPREAD_FLOOR` and the
    error is unknown (0); see :func:`recovery_bounds`.

    Args:
        cluster_means: one mean per checkpoint in per cent, shape ``(checkpoints,)``; NaN is left
            out.
        confidence: nominal coverage.
        error: standard error of measurement that the checkpoints share, points.

    Raises:
        ValueError: bad shape, infinite entries, confidence outside (0, 1), error negative or NaN.

    Warns:
        TooFewCheckpointsWarning: n < 3; the bounds are NaN, the point is still the mean.
    """
    require_open_unit("confidence", confidence)
    if not error >= 0.0:
        raise ValueError(f"error is {error}; pass a standard error in points, 0 where unknown")
    means = drop_undefined(as_vector("cluster_means", cluster_means))
    estimate = _mean_without_bounds(means, "Student t", confidence)
    if len(means) < MIN_CHECKPOINTS:
        reason = f"{len(means)} checkpoints, at least {MIN_CHECKPOINTS} needed"
        return undetermined(estimate, TooFewCheckpointsWarning, reason)
    low, high = recovery_bounds(means, confidence, error)
    return replace(estimate, low=float(low), high=float(high))


def bca_interval(
    cluster_means: ArrayLike,
    bootstrap_rng: np.random.Generator,
    confidence: float = 0.95,
    n_resamples: int = 9999,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval of the mean (Efron 1987), for n >= 10.

    Secondary to ``t_interval``: on normal data at n = 10 it covers about 90 % instead of 95 %.

    Args:
        cluster_means: one mean per checkpoint, shape ``(checkpoints,)``; NaN is left out.
        bootstrap_rng: draws the resamples.
        confidence: nominal coverage.
        n_resamples: bootstrap samples.

    Raises:
        ValueError: bad shape, infinite entries, confidence outside (0, 1), no generator, or
            fewer than 1 resample.

    Warns:
        TooFewCheckpointsWarning: n < 10; the bounds are NaN, the point is still the mean.
        ZeroVarianceWarning: equal means; the bounds are NaN.
    """
    require_open_unit("confidence", confidence)
    if not isinstance(bootstrap_rng, np.random.Generator):
        kind = type(bootstrap_rng).__name__
        raise ValueError(f"bootstrap_rng is a {kind}; pass numpy.random.default_rng(seed)")
    if n_resamples < 1:
        raise ValueError(f"n_resamples is {n_resamples}; pass at least 1, e.g. 9999")
    means = drop_undefined(as_vector("cluster_means", cluster_means))
    estimate = _mean_without_bounds(means, "BCa bootstrap", confidence)
    problem = degeneracy(means, MIN_BOOTSTRAP_CHECKPOINTS)
    if problem is not None:
        return undetermined(estimate, *problem)
    bounds = stats.bootstrap(
        (means,),
        np.mean,
        n_resamples=n_resamples,
        confidence_level=confidence,
        method="BCa",
        rng=bootstrap_rng,
    ).confidence_interval
    return replace(estimate, low=float(bounds.low), high=float(bounds.high))


def require_ordered_thresholds(irreversible_below: float, reversible_above: float) -> None:
    """Reject verdict thresholds that leave no room between them.

    Raises:
        ValueError: irreversible_below is not under reversible_above.
    """
    if not irreversible_below < reversible_above:
        pair = f"irreversible_below {irreversible_below}, reversible_above {reversible_above}"
        raise ValueError(f"{pair}: thresholds out of order; pass the lower one first")
