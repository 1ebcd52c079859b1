"""Variance components against a published table, exact expectations and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from healing.statistics.intervals import (
    DegenerateDataWarning,
    TooFewCheckpointsWarning,
    UndefinedDataWarning,
    ZeroVarianceWarning,
)
from healing.statistics.variance_components import variance_components

# Shrout & Fleiss (1979), table 2: six targets, four ratings each.
SHROUT_FLEISS = [
    [9, 2, 5, 8],
    [6, 1, 3, 2],
    [8, 4, 6, 8],
    [7, 1, 2, 6],
    [10, 5, 6, 9],
    [6, 2, 4, 7],
]


def test_components_reproduce_shrout_and_fleiss() -> None:
    values = np.array(SHROUT_FLEISS, dtype=float)
    components = variance_components(values.ravel(), np.repeat(range(6), 4).tolist())
    # Their table 3 gives BMS 11.24 and WMS 6.26, table 4 ICC(1,1) = .17; two digits each.
    assert components.within == pytest.approx(6.26, abs=0.005)
    assert components.between == pytest.approx((11.24 - 6.26) / 4, abs=0.0025)
    assert components.icc == pytest.approx(0.17, abs=0.005)
    assert (components.n_checkpoints, components.n_replicates) == (6, 24)


def test_components_are_unbiased_for_unbalanced_data_exactly() -> None:
    """E[y'Ay] = trace(A V): read A off the quadratic form, put in V = between·ZZ' + within·I."""
    clusters = [0, 0, 0, 0, 1, 1, 2, 3, 3, 3]
    n = len(clusters)

    def estimate(y: np.ndarray) -> np.ndarray:
        components = variance_components(y, clusters)
        return np.array([components.between, components.within])

    unit = np.eye(n)
    diagonal = [estimate(unit[i]) for i in range(n)]
    quadratic = np.empty((2, n, n))
    for i in range(n):
        for j in range(n):
            if i == j:
                quadratic[:, i, j] = diagonal[i]
            else:
                # Halved: unit[i] + unit[j] can be constant on a whole cluster, never overall.
                cross = estimate(unit[i] + unit[j]) - diagonal[i] - diagonal[j]
                quadratic[:, i, j] = cross / 2.0
    z = np.equal.outer(clusters, clusters).astype(float)
    expected = [np.trace(form @ (7.0 * z + 2.0 * unit)) for form in quadratic]
    assert expected == pytest.approx([7.0, 2.0], rel=1e-10)  # rounding of 10 × 10 sums


def test_between_is_unclamped_so_that_it_averages_to_zero_without_a_checkpoint_effect() -> None:
    rng, clusters = np.random.default_rng(0), np.repeat(range(3), 3).tolist()
    draws = [variance_components(rng.normal(size=9), clusters).between for _ in range(2000)]
    # sd of one estimate: √(2·1²/9·(1/2 + 1/6)) = 0.385, so 0.0086 on the mean of 2000; 4 of them.
    # Clamped at zero the mean would be 0.13.
    assert np.mean(draws) == pytest.approx(0.0, abs=0.035)
    assert min(draws) < -0.1


def test_icc_is_found_by_simulation() -> None:
    rng, clusters = np.random.default_rng(1), np.repeat(range(400), 3)
    effects = rng.normal(scale=math.sqrt(0.7), size=400)
    values = 50.0 + effects[clusters] + rng.normal(scale=math.sqrt(0.3), size=1200)
    # Fisher (1925): se ≈ (1 − ρ)(1 + 2ρ)√(2/(3·2·400)) = 0.021; 3 of them.
    assert variance_components(values, clusters.tolist()).icc == pytest.approx(0.7, abs=0.063)


def test_identical_replicates_leave_all_variance_between() -> None:
    components = variance_components([1.0, 1.0, 4.0, 4.0, 7.0, 7.0], [0, 0, 1, 1, 2, 2])
    assert (components.between, components.within, components.icc) == (9.0, 0.0, 1.0)


def test_undefined_replicates_are_left_out() -> None:
    nan = math.nan
    full = variance_components([1.0, 2.0, 4.0, 5.0, 7.0], [0, 0, 1, 1, 2])
    assert variance_components([1.0, nan, 2.0, 4, 5, 7, nan], [0, 0, 0, 1, 1, 2, 3]) == full


@pytest.mark.parametrize(
    ("values", "clusters", "category"),
    [
        ([1.0, 2.0, 3.0, 4.0], [0, 0, 1, 1], TooFewCheckpointsWarning),
        ([1.0, 2.0, 3.0], [0, 1, 2], TooFewCheckpointsWarning),
        ([5.0] * 6, [0, 0, 1, 1, 2, 2], ZeroVarianceWarning),
    ],
)
def test_degenerate_data_give_nan(
    values: list[float], clusters: list[int], category: type[DegenerateDataWarning]
) -> None:
    with pytest.warns(category, match="determine no variance"):
        components = variance_components(values, clusters)
    assert all(math.isnan(v) for v in (components.between, components.within, components.icc))


def test_no_defined_value_gives_nan() -> None:
    with (
        pytest.warns(UndefinedDataWarning, match="no replicate is defined"),
        pytest.warns(TooFewCheckpointsWarning, match="0 values of 0 checkpoints"),
    ):
        components = variance_components([math.nan] * 2, [0, 1])
    assert math.isnan(components.icc)


def test_bad_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="2 values but 3 clusters"):
        variance_components([1.0, 2.0], [0, 1, 2])
