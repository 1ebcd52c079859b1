"""Do the intervals cover and the tests err as often as they say? By simulation; -s prints a table.

With N simulations a proportion p has a Monte-Carlo error √(p(1 − p)/N): at p = 5 % it is 0.34 % for
N = 4000 intervals. Contrasts of arms: ``test_contrast_rule.py``. Bounds are two-sided where theory
gives the value, at least 3 errors away from it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from scipy import stats

from healing.statistics.fits.size_trend import scaling_slope
from healing.statistics.intervals import Interval, bca_interval, cluster_means, t_interval
from healing.statistics.survival import (
    CensoredDataWarning,
    kaplan_meier,
    log_time_interval,
    logrank_test,
)
from tests.statistics.interval_rates import coverage

N = 4000
Record = Callable[[str, float], None]


@pytest.fixture(scope="module")
def record() -> Iterator[Record]:
    """Collect rows of the coverage table and print them at the end of the module."""
    rows: list[tuple[str, float]] = []
    yield lambda what, share: rows.append((what, share))
    print("\n\nmeasured by simulation" + " " * 55 + "share")
    for what, share in rows:
        print(f"{what:<74} {100 * share:6.2f} %")


def _coverage(intervals: list[Interval], truth: float) -> float:
    return float(np.mean([interval.low <= truth <= interval.high for interval in intervals]))


def _nested(rng: np.random.Generator, icc: float = 0.7, mean: float = 50.0) -> np.ndarray:
    """Draws of 3 checkpoints × 3 replicates with unit variance, shape (N, 3, 3)."""
    checkpoints = rng.normal(scale=icc**0.5, size=(N, 3, 1))
    return mean + checkpoints + rng.normal(scale=(1.0 - icc) ** 0.5, size=(N, 3, 3))


@pytest.mark.parametrize("n", [3, 5, 10])
def test_t_interval_covers_normal_means(n: int, record: Record) -> None:
    samples = np.random.default_rng(n).normal(50.0, 12.0, size=(N, n))
    covered = _coverage([t_interval(sample) for sample in samples], 50.0)
    record(f"t interval, {n} checkpoints, nominal 95 %", covered)
    assert 0.93 <= covered <= 0.97  # exact theory 95 %; 2 % is 5.8 Monte-Carlo errors


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_t_interval_covers_at_other_levels(confidence: float, record: Record) -> None:
    samples = np.random.default_rng(7).normal(size=(N, 3))
    covered = _coverage([t_interval(sample, confidence) for sample in samples], 0.0)
    record(f"t interval, 3 checkpoints, nominal {100 * confidence:.0f} %", covered)
    error = (confidence * (1.0 - confidence) / N) ** 0.5
    assert covered == pytest.approx(confidence, abs=4.0 * error)


def test_t_interval_covers_with_replicates_nested_in_checkpoints(record: Record) -> None:
    labels = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    draws = _nested(np.random.default_rng(0)).reshape(N, 9)
    covered = _coverage([t_interval(cluster_means(d, labels).means) for d in draws], 50.0)
    record("t interval of cluster means, 3 × 3, ICC 0.7, nominal 95 %", covered)
    assert 0.93 <= covered <= 0.97  # exact theory 95 %


def test_pooled_replicates_do_not_cover(record: Record) -> None:
    """Kept failing example: the interval that takes nine replicates for independent runs."""
    draws = _nested(np.random.default_rng(0)).reshape(N, 9)
    covered = _coverage([t_interval(draw) for draw in draws], 50.0)
    record("naive: the same data pooled, n = 9, nominal 95 %", covered)
    assert 0.65 < covered < 0.85  # about 75 %; this is why the checkpoint is the unit


def test_bca_interval_is_short_of_its_level_at_ten(record: Record) -> None:
    samples = np.random.default_rng(1).normal(size=(500, 10))
    rng = np.random.default_rng(2)
    covered = _coverage([bca_interval(s, rng, n_resamples=999) for s in samples], 0.0)
    record("BCa bootstrap, 10 checkpoints, normal, nominal 95 %", covered)
    # Normal data at n = 10: ±1.96·s√(9/10)/√10 alone would cover 90.4 %. Error 1.3 %; 3 of them.
    assert 0.86 <= covered <= 0.95


def test_slope_interval_covers(record: Record) -> None:
    rng, sizes = np.random.default_rng(3), np.repeat([6.1, 7.1, 7.8, 8.2], 2)
    noise = rng.normal(scale=8.0, size=(N, 8))
    slopes = [scaling_slope(sizes, 90.0 - 5.0 * sizes + e).slope for e in noise]
    covered = _coverage(slopes, -5.0)
    record("scaling slope, 4 sizes × 2 checkpoints, nominal 95 %", covered)
    assert covered == pytest.approx(0.95, abs=0.0125)  # 3.6 Monte-Carlo errors


def test_t_interval_falls_short_on_skewed_means(record: Record) -> None:
    """Known limit: five checkpoint means from an exponential distribution."""
    samples = np.random.default_rng(8).exponential(size=(N, 5))
    covered = _coverage([t_interval(sample) for sample in samples], 1.0)
    record("t interval, 5 checkpoints, exponential (skewed), nominal 95 %", covered)
    assert 0.85 <= covered <= 0.91  # 88 %, the same as in other studies of Student's t


@pytest.mark.parametrize("n", [3, 5, 10])
def test_an_error_common_to_all_is_not_in_the_interval(n: int, record: Record) -> None:
    """Known limit: SD 5 beside SD 5. (mean − truth)/(s/√n) = √(1 + n·5²/5²)·T(n − 1), so that the
    coverage is 2F(t/√(1 + n)) − 1: 84, 68 and 49 %. Told of the error the interval covers.
    """
    df = n - 1
    exact = 2.0 * stats.t.cdf(stats.t.ppf(0.975, df) / math.sqrt(1.0 + n), df) - 1.0
    covered, below, above = coverage("the same, common error of SD 5", n, 20_000)
    record(f"{n} checkpoints, SD 5 common beside SD 5, nominal 95 %", covered)
    assert covered == pytest.approx(exact, abs=0.0143)  # 4 Monte-Carlo errors
    assert below == pytest.approx(above, abs=0.02)
    told, *_ = coverage("the same, common error of SD 5 that is known", n, 20_000)
    record("    the same, the error known", told)
    assert 0.945 <= told <= 0.985  # added in quadrature: conservative where t is large


@pytest.mark.parametrize(("name", "low", "high"), [("log-normal, σ = 1", 0.81, 0.88)])
def test_skewed_recoveries_lie_above_too_many_intervals(
    name: str, low: float, high: float, record: Record
) -> None:
    """Known limit: nearly all of the misses are intervals that lie too low."""
    for n in (3, 5, 10):
        covered, below, _ = coverage(name, n, 20_000)
        record(f"{n} checkpoints, {name}, nominal 95 %", covered)
        assert low <= covered <= high
        assert below > 0.9 * (1.0 - covered)


def test_slope_interval_needs_size_means_where_sizes_deviate(record: Record) -> None:
    """Known limit: sizes that miss the line on their own make their checkpoints dependent."""
    rng, sizes, n = np.random.default_rng(9), np.array([6.1, 7.1, 7.8, 8.2]), 2000
    size_means = 90.0 - 5.0 * sizes + rng.normal(scale=8.0, size=(n, 4))
    recovery = size_means[:, :, None] + rng.normal(scale=4.0, size=(n, 4, 5))
    per_checkpoint = [scaling_slope(np.repeat(sizes, 5), r.ravel()).slope for r in recovery]
    per_size = [scaling_slope(sizes, r.mean(axis=1)).slope for r in recovery]
    record("slope over checkpoints, sizes deviate, nominal 95 %", _coverage(per_checkpoint, -5.0))
    record("slope over size means, the same data, nominal 95 %", _coverage(per_size, -5.0))
    assert _coverage(per_checkpoint, -5.0) < 0.85
    assert _coverage(per_size, -5.0) == pytest.approx(0.95, abs=0.017)  # 3.5 errors of 0.49 %


def test_log_time_interval_covers(record: Record) -> None:
    times = np.random.default_rng(4).lognormal(5.0, 0.8, size=(N, 5))
    covered = _coverage([log_time_interval(t, [False] * 5) for t in times], np.exp(5.0))
    record("log-scale t interval of half-recovery, n = 5, nominal 95 %", covered)
    assert covered == pytest.approx(0.95, abs=0.0125)


@pytest.mark.parametrize(("n", "floor"), [(5, 0.90), (10, 0.90), (20, 0.92)])
def test_kaplan_meier_median_covers_under_censoring(n: int, floor: float, record: Record) -> None:
    # Log-normal times with median e⁵ and random ends of log-median 5.2: P(end < time) = 43 %.
    # Ends on both sides of the median matter: one common budget beyond it would change nothing.
    rng = np.random.default_rng(5)
    times = rng.lognormal(5.0, 0.8, size=(1000, n))
    ends = rng.lognormal(5.2, 0.8, size=(1000, n))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CensoredDataWarning)
        medians = [
            kaplan_meier(np.minimum(t, end), t > end).median
            for t, end in zip(times, ends, strict=True)
        ]
    determined = [median for median in medians if median.defined]
    covered = _coverage(determined, np.exp(5.0))
    unbounded = np.mean([np.isinf(median.high) for median in determined])
    record(f"Kaplan-Meier median, n = {n}, 43 % censored, nominal 95 %", covered)
    record("    of these without an upper bound", float(unbounded))
    # The median's interval is discrete and conservative; Monte-Carlo error 0.7 %.
    assert floor <= covered <= 0.995


@pytest.mark.parametrize(("n", "limit"), [(3, 0.0), (5, 0.05 + 0.022)])
def test_exact_logrank_keeps_its_level(n: int, limit: float, record: Record) -> None:
    times = np.random.default_rng(6).exponential(size=(1000, 2, n))
    budget = 1.5  # censors 22 %
    tests = [
        logrank_test(*(part for t in pair for part in (np.minimum(t, budget), t > budget)))
        for pair in times
    ]
    exact = float(np.mean([test.p_value <= 0.05 for test in tests]))
    asymptotic = float(np.mean([test.p_asymptotic <= 0.05 for test in tests]))
    record(f"false alarm of the exact log-rank test, {n} + {n}, nominal 5 %", exact)
    record(f"false alarm of the asymptotic log-rank test, {n} + {n}", asymptotic)
    assert exact <= limit  # Monte-Carlo error 0.69 %, 3.2 of them; 3 + 3 can't reach 5 % at all
    if n == 3:
        assert asymptotic > 0.06  # kept failing example: 9 % at a nominal 5 %
