"""Paired tests of one mean difference against published numbers and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.statistics.intervals import (
    DegenerateDataWarning,
    TooFewCheckpointsWarning,
    ZeroVarianceWarning,
    cluster_means,
)
from healing.statistics.paired_tests import (
    Alternative,
    holm_adjust,
    paired_differences,
    paired_t_test,
    tost_paired,
)

# Student (1908), hours of sleep gained by ten patients: the differences of R's `sleep` data.
SLEEP = [1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4]
NAN = math.nan
NOISE = np.array([-1.0, 0.5, 1.5, -0.7, -0.3])  # mean 0, sd 1.02


def test_differences_are_paired_by_seed_not_by_position() -> None:
    treatment = cluster_means([10.0, 20.0, 40.0, 60.0], [2, 0, 1, 1])
    control = cluster_means([5.0, 1.0, 2.0, 9.0], [0, 1, 2, 7])
    paired = paired_differences(treatment, control)
    assert paired.labels == (2, 0, 1)
    assert paired.differences.tolist() == [8.0, 15.0, 49.0]
    assert paired.n_unpaired == 1


def test_an_undefined_side_makes_the_difference_undefined() -> None:
    paired = paired_differences(
        cluster_means([10.0, NAN], [0, 1]), cluster_means([4.0, 3.0], [0, 1])
    )
    np.testing.assert_array_equal(paired.differences, [6.0, NAN])


def test_arms_without_a_shared_seed_are_rejected() -> None:
    with pytest.raises(ValueError, match="share no label; label both by the same seeds"):
        paired_differences(cluster_means([1.0], ["a"]), cluster_means([1.0], ["b"]))


def test_paired_t_test_reproduces_the_published_sleep_example() -> None:
    # R's help page of `sleep`: t = 4.0621, df = 9, p = 0.002833 (signs of group 2 − group 1).
    test = paired_t_test(SLEEP)
    assert test.statistic == pytest.approx(4.0621, abs=5e-5)  # the digits printed
    assert test.p_value == pytest.approx(0.002833, abs=5e-7)
    assert test.interval.low == pytest.approx(0.7001142, abs=5e-8)


@pytest.mark.parametrize("alternative", ["two-sided", "greater", "less"])
@pytest.mark.parametrize("shift", [-3.0, 0.1, 2.0])
def test_paired_t_test_agrees_with_scipy(alternative: Alternative, shift: float) -> None:
    ours, theirs = (
        paired_t_test(NOISE + shift, alternative),
        scipy_stats.ttest_1samp(NOISE + shift, 0.0, alternative=alternative),
    )
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-12)
    assert ours.p_value == pytest.approx(theirs.pvalue, rel=1e-9)


@pytest.mark.parametrize("shift", [-9.5, 0.0, 4.0, 9.5, 12.0])
def test_tost_agrees_with_two_scipy_tests(shift: float) -> None:
    d = 2.0 * NOISE + shift
    above_lower = scipy_stats.ttest_1samp(d, -10.0, alternative="greater").pvalue
    below_upper = scipy_stats.ttest_1samp(d, 10.0, alternative="less").pvalue
    test = tost_paired(d)
    assert test.p_value == pytest.approx(max(above_lower, below_upper), rel=1e-9)
    # The two readings of TOST agree: p <= alpha exactly where the 90 % interval is inside.
    assert test.interval.confidence == pytest.approx(0.9)
    assert test.equivalent == (test.interval.low > -10.0 and test.interval.high < 10.0)


def test_tost_is_decided_at_the_known_critical_value() -> None:
    # n = 5: t(4, 0.95) = 2.13185, so equivalence holds up to mean 10 − 2.13185·s/√5.
    critical = 10.0 - 2.13185 * NOISE.std(ddof=1) / math.sqrt(5.0)
    assert tost_paired(NOISE + critical - 1e-3).equivalent
    assert not tost_paired(NOISE + critical + 1e-3).equivalent
    assert not tost_paired(NOISE + 4.0, margin=3.0).equivalent


@pytest.mark.parametrize(
    ("differences", "category"),
    [([1.0, 2.0, NAN], TooFewCheckpointsWarning), ([2.0] * 4, ZeroVarianceWarning)],
)
def test_degenerate_differences_give_nan(
    differences: list[float], category: type[DegenerateDataWarning]
) -> None:
    with pytest.warns(category, match="paired Student t: "):
        test = paired_t_test(differences)
    with pytest.warns(category, match="TOST: "):
        tost = tost_paired(differences)
    assert math.isnan(test.p_value)
    assert math.isnan(test.statistic)
    assert math.isnan(tost.p_value)
    assert not tost.equivalent
    assert test.interval.point == np.nanmean(differences)


def test_test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="alternative is 'larger'; pass one of"):
        paired_t_test(SLEEP, "larger")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="confidence is 0"):
        paired_t_test(SLEEP, confidence=0.0)
    for alpha in (0.0, 0.5, NAN):
        with pytest.raises(ValueError, match=r"alpha is .*; pass a level strictly between 0 and"):
            tost_paired(SLEEP, alpha=alpha)
    for margin in (0.0, -10.0, math.inf, NAN):
        with pytest.raises(ValueError, match=r"margin is .*; pass a positive number of points"):
            tost_paired(SLEEP, margin=margin)


def test_holm_reproduces_published_examples() -> None:
    # R, p.adjust(c(0.01, 0.02, 0.03, 0.04), "holm") and the example of Wikipedia's
    # "Holm-Bonferroni method": 0.01, 0.04, 0.03, 0.005.
    assert holm_adjust([0.01, 0.02, 0.03, 0.04]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    assert holm_adjust([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm_adjust([0.7, 0.9]) == pytest.approx([1.0, 1.0])


def test_holm_counts_an_undetermined_endpoint_in_the_family() -> None:
    np.testing.assert_allclose(holm_adjust([NAN, 0.03]), [NAN, 0.06])


def test_holm_rejects_what_is_no_probability() -> None:
    with pytest.raises(ValueError, match=r"p_values are .*; pass probabilities in \[0, 1\] or NaN"):
        holm_adjust([0.5, 1.2])
