"""Cluster means, intervals and verdicts against published numbers and other implementations."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from healing.statistics.intervals import (
    ClusterMeans,
    DegenerateDataWarning,
    Interval,
    TooFewCheckpointsWarning,
    UndefinedDataWarning,
    ZeroVarianceWarning,
    bca_interval,
    cluster_means,
    exp_interval,
    t_interval,
)

# Student (1908), hours of sleep gained by ten patients: the differences of R's `sleep` data.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
NAN = math.nan


def test_cluster_means_average_replicates_in_order_of_first_appearance() -> None:
    means = cluster_means([10.0, 30.0, -20.0, 150.0], ["seed-2", "seed-2", "seed-1", "seed-0"])
    assert means.labels == ("seed-2", "seed-1", "seed-0")
    assert means.means.tolist() == [20.0, -20.0, 150.0]  # outside [0, 100] on purpose: no clamp
    assert means.counts.tolist() == [2, 1, 1]
    assert means.undefined_fraction == 0.0


def test_cluster_means_leave_out_and_count_undefined_replicates() -> None:
    means = cluster_means([10.0, NAN, NAN, NAN, 8.0], [0, 0, 1, 1, 2])
    np.testing.assert_array_equal(means.means, [10.0, NAN, 8.0])
    assert means.counts.tolist() == [1, 0, 1]
    assert (means.n_replicates, means.n_undefined) == (5, 3)
    assert means.undefined_fraction == 0.6


@given(
    st.lists(
        st.tuples(st.integers(0, 4), st.one_of(st.just(NAN), st.floats(-1e6, 1e6))),
        min_size=1,
        max_size=30,
    ).filter(lambda rows: any(not math.isnan(value) for _, value in rows))
)
@settings(max_examples=60, deadline=None)
def test_cluster_means_agree_with_pandas(rows: list[tuple[int, float]]) -> None:
    clusters, values = [c for c, _ in rows], [v for _, v in rows]
    expected = pd.Series(values).groupby(clusters, sort=False).mean()
    means = cluster_means(values, clusters)
    assert list(means.labels) == expected.index.tolist()
    # Two orders of summation of up to 30 values of 1e6 differ by less than 30·1e6·2⁻⁵².
    np.testing.assert_allclose(means.means, expected.to_numpy(), rtol=1e-12, atol=1e-8)


def test_cluster_means_without_a_defined_replicate_warn() -> None:
    with pytest.warns(UndefinedDataWarning, match="no replicate is defined"):
        means = cluster_means([NAN, NAN], [0, 1])
    assert np.isnan(means.means).all()
    assert means.undefined_fraction == 1.0


@pytest.mark.parametrize(
    ("values", "clusters", "message"),
    [
        ([], [], "values is empty; pass at least one replicate"),
        ([1.0, 2.0], [0], "2 values but 1 clusters; pass one checkpoint label per replicate"),
        ([1.0, 2.0], [0, NAN], "clusters holds NaN; pass a seed or a run id"),
        ([[1.0], [2.0]], [0, 1], r"values has shape \(2, 1\); pass a one-dimensional sequence"),
        ([1.0, -math.inf], [0, 1], "values holds 1 infinite entries; pass an undefined value"),
    ],
)
def test_cluster_means_reject(values: list[float], clusters: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cluster_means(values, clusters)


def test_t_interval_reproduces_the_published_sleep_example() -> None:
    # R's help page of `sleep`: t.test(extra ~ group, paired = TRUE), 95 % 0.7001142 to 2.4598858.
    interval = t_interval(SLEEP)
    assert interval.point == pytest.approx(1.58, abs=1e-12)
    assert interval.low == pytest.approx(0.7001142, abs=5e-8)  # the digits printed
    assert interval.high == pytest.approx(2.4598858, abs=5e-8)
    assert (interval.n, interval.confidence, interval.defined) == (10, 0.95, True)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.99])
def test_t_interval_agrees_with_scipy_at_three_checkpoints(confidence: float) -> None:
    means = [61.0, 74.5, -3.0]
    theirs = scipy_stats.ttest_1samp(means, 0.0).confidence_interval(confidence)
    ours = t_interval(means, confidence)
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), rel=1e-12)


@given(
    st.lists(st.floats(-100, 100), min_size=3, max_size=8).filter(lambda x: np.ptp(x) > 1e-3),
    st.floats(-1e3, 1e3),
    st.floats(0.1, 10.0),
)
@settings(max_examples=60, deadline=None)
def test_t_interval_follows_shift_and_scale(x: list[float], shift: float, scale: float) -> None:
    before, after = t_interval(x), t_interval(scale * np.array(x) + shift)
    expected = [scale * value + shift for value in (before.low, before.point, before.high)]
    # Shifting by 1e3 costs 1e3·2⁻⁵² of a spread >= 1e-4, and t at n = 3 multiplies it by 4.3.
    assert [after.low, after.point, after.high] == pytest.approx(expected, rel=1e-7, abs=1e-7)


def test_t_interval_leaves_out_undefined_checkpoints() -> None:
    assert t_interval([*SLEEP, NAN]) == t_interval(SLEEP)


@pytest.mark.parametrize(
    ("means", "point", "n", "category", "reason"),
    [
        ([], NAN, 0, TooFewCheckpointsWarning, "0 checkpoints, at least 3 needed"),
        ([40.0, 60.0], 50.0, 2, TooFewCheckpointsWarning, "2 checkpoints, at least 3 needed"),
        ([40.0, 60.0, NAN], 50.0, 2, TooFewCheckpointsWarning, "2 checkpoints"),
        ([0.0, 0.0, 0.0], 0.0, 3, ZeroVarianceWarning, "all 3 values are equal"),
        ([0.3, 0.1 + 0.2, 0.3], 0.3, 3, ZeroVarianceWarning, "all 3 values are equal"),
    ],
)
def test_t_interval_without_bounds(
    means: list[float], point: float, n: int, category: type[DegenerateDataWarning], reason: str
) -> None:
    with pytest.warns(category, match=reason):
        interval = t_interval(means)
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)
    assert interval.point == pytest.approx(point, nan_ok=True)
    assert (interval.n, interval.defined) == (n, False)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0, NAN])
def test_t_interval_rejects_confidence(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"confidence is .*; pass a number strictly between"):
        t_interval(SLEEP, confidence)


def test_t_interval_rejects_a_matrix_and_infinity() -> None:
    with pytest.raises(ValueError, match=r"cluster_means has shape \(3, 3\)"):
        t_interval(np.eye(3))
    with pytest.raises(ValueError, match="cluster_means holds 2 infinite entries"):
        t_interval([1.0, math.inf, -math.inf])


def _bca_by_hand(data: np.ndarray, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    """Efron & Tibshirani (1993), eqs. 14.9 to 14.15."""
    n, normal = len(data), scipy_stats.norm
    replications = data[rng.integers(0, n, (resamples, n))].mean(axis=1)
    z0 = normal.ppf((replications < data.mean()).mean())
    influence = np.array([data.mean() - np.delete(data, i).mean() for i in range(n)])
    a = (influence**3).sum() / (6.0 * (influence**2).sum() ** 1.5)
    z = normal.ppf([0.025, 0.975])
    levels = normal.cdf(z0 + (z0 + z) / (1.0 - a * (z0 + z)))
    low, high = np.quantile(replications, levels)
    return float(low), float(high)


def test_bca_interval_agrees_with_a_hand_written_one() -> None:
    data = np.array([0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0, 9.0, 30.0])
    ours = bca_interval(data, np.random.default_rng(1), n_resamples=40_000)
    low, high = _bca_by_hand(data, 40_000, np.random.default_rng(2))
    # A 2.5 % quantile of 40,000 draws has rank error 0.08 %; times a slope of at most 100 points
    # per unit of probability at the long upper end that is 0.3, and 0.02 at the short lower one.
    assert ours.low == pytest.approx(low, abs=0.06)
    assert ours.high == pytest.approx(high, abs=0.9)
    assert ours.high - ours.point > 1.5 * (ours.point - ours.low)  # skewed, unlike Student's


def test_bca_interval_repeats_with_its_seed_and_not_with_another() -> None:
    intervals = [bca_interval(SLEEP, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert intervals[0] == intervals[1] != intervals[2]


@pytest.mark.parametrize(
    ("means", "category"),
    [(SLEEP[:9], TooFewCheckpointsWarning), ([50.0] * 10, ZeroVarianceWarning)],
)
def test_bca_interval_without_bounds(
    means: list[float], category: type[DegenerateDataWarning]
) -> None:
    with pytest.warns(category, match="BCa bootstrap: .* the bounds are NaN"):
        interval = bca_interval(means, np.random.default_rng(0))
    assert not interval.defined
    assert interval.point == pytest.approx(np.mean(means), rel=1e-12)


def test_bca_interval_rejects_a_missing_generator_and_no_resamples() -> None:
    with pytest.raises(
        ValueError, match=r"bootstrap_rng is a int; pass numpy\.random\.default_rng"
    ):
        bca_interval(SLEEP, 0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="n_resamples is 0; pass at least 1"):
        bca_interval(SLEEP, np.random.default_rng(0), n_resamples=0)
    with pytest.raises(ValueError, match="confidence is 2"):
        bca_interval(SLEEP, np.random.default_rng(0), confidence=2.0)


def test_exp_interval_overflows_to_infinity_in_silence() -> None:
    interval = exp_interval(Interval(0.0, 1.0, 1e4, 3, "log"))
    assert (interval.low, interval.point, interval.high) == (1.0, math.e, math.inf)


def test_results_are_frozen() -> None:
    interval = t_interval(SLEEP)
    with pytest.raises(AttributeError):
        interval.low = 0.0  # type: ignore[misc]
    assert isinstance(cluster_means([1.0], [0]), ClusterMeans)
