"""Half-recovery times against published survival data and by hand."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from healing.statistics.intervals import (
    DegenerateDataWarning,
    Interval,
    TooFewCheckpointsWarning,
    UndefinedDataWarning,
    ZeroVarianceWarning,
)
from healing.statistics.survival import (
    AllCensoredWarning,
    CensoredDataWarning,
    HalfRecovery,
    MedianNotReachedWarning,
    half_recovery_time,
    kaplan_meier,
    log_time_interval,
    logrank_test,
)

NAN = math.nan
# Freireich et al. (1963): weeks of remission under 6-mercaptopurine and under placebo.
MERCAPTOPURINE = [6, 6, 6, 7, 10, 13, 16, 22, 23, 6, 9, 10, 11, 17, 19, 20, 25, 32, 32, 34, 35]
STILL_IN_REMISSION = [False] * 9 + [True] * 12
PLACEBO = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23]
ALL_RELAPSED = [False] * 21


def test_half_recovery_is_interpolated_between_measurements() -> None:
    steps = [0, 100, 200, 300]
    assert half_recovery_time(steps, [0, 20, 70, 90]) == HalfRecovery(160.0, False)
    assert half_recovery_time(steps, [0, 50, 40, 90]) == HalfRecovery(100.0, False)
    assert half_recovery_time(steps, [0, -30, 10, 90], threshold=20.0) == HalfRecovery(212.5, False)


def test_half_recovery_is_the_first_passage() -> None:
    assert half_recovery_time([0, 1, 2, 3], [0, 60, 30, 80]).time == pytest.approx(5 / 6)


def test_a_run_that_never_gets_there_is_censored_where_it_was_last_seen() -> None:
    assert half_recovery_time([0, 100, 200], [0, 30, 49.9]) == HalfRecovery(200.0, True)
    assert half_recovery_time([0, 100, 200], [0, 30, NAN]) == HalfRecovery(100.0, True)


def test_undefined_measurements_are_bridged() -> None:
    assert half_recovery_time([0, 100, 200], [0, NAN, 80]) == HalfRecovery(125.0, False)


def test_replicates_are_averaged_before_the_passage() -> None:
    rows = [[0.0, 20.0, 60.0], [0.0, 40.0, 100.0], [NAN, NAN, NAN]]
    # The mean trajectory 0, 30, 80 passes 50 at 140; the two runs do at 175 and 116.7.
    assert half_recovery_time([0, 100, 200], rows) == HalfRecovery(140.0, False)
    # A replicate that stops leaves the later steps to nobody, not to the survivor alone.
    rows[0][2] = NAN
    assert half_recovery_time([0, 100, 200], rows) == HalfRecovery(100.0, True)


@pytest.mark.parametrize("recovery", [[NAN, NAN], [[NAN, NAN], [NAN, NAN]]])
def test_nothing_defined_gives_nan(recovery: list[float]) -> None:
    with pytest.warns(UndefinedDataWarning, match="no recovery is defined"):
        # The collapsed state is 0 % by definition: without a later value nothing was observed.
        assert math.isnan(half_recovery_time([0, 100], [0.0, NAN]).time)
    with pytest.warns(UndefinedDataWarning, match="no recovery is defined"):
        assert math.isnan(half_recovery_time([0], [0.0]).time)
    with pytest.warns(UndefinedDataWarning, match="no recovery is defined"):
        half = half_recovery_time([0, 100], recovery)
    assert math.isnan(half.time)
    assert not half.censored


@pytest.mark.parametrize(
    ("steps", "recovery", "threshold", "message"),
    [
        ([0, 100], [60, 90], 50.0, r"starts at 60 %, not under 50 %; start the trajectory at the"),
        ([0, 100, 100], [0, 1, 2], 50.0, "steps are not ascending from 0 or later; sort them"),
        ([-5, 100], [0, 1], 50.0, "steps are not ascending"),
        ([NAN, 100], [0, 1], 50.0, "steps are not ascending"),
        ([], [], 50.0, "steps are not ascending"),
        ([0, 100], [0, 1, 2], 50.0, r"lengths differ: \{'steps': 2, 'recovery_pct': 3\}"),
        ([0, 100], [0, math.inf], 50.0, "recovery_pct holds 1 infinite entries"),
        ([0, 1], np.zeros((1, 1, 2)), 50.0, r"recovery_pct has shape \(1, 1, 2\); pass \(steps,\)"),
        ([0, 100], [0, 1], 0.0, "threshold is 0.0; pass a positive percentage"),
    ],
)
def test_bad_trajectories_are_rejected(
    steps: list[float], recovery: list[float], threshold: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        half_recovery_time(steps, recovery, threshold)


def test_kaplan_meier_reproduces_the_leukaemia_remissions() -> None:
    # Kleinbaum & Klein (2012), Survival Analysis, table 2.2: S(6) .8571, S(7) .8067, S(10) .7529,
    # S(13) .6902, S(16) .6275, S(22) .5378, S(23) .4482; median 23. Four digits are printed.
    curve = kaplan_meier(MERCAPTOPURINE, STILL_IN_REMISSION)
    at = [curve.times.tolist().index(t) for t in (6, 7, 10, 13, 16, 22, 23)]
    published = [0.8571, 0.8067, 0.7529, 0.6902, 0.6275, 0.5378, 0.4482]
    assert curve.probabilities[at] == pytest.approx(published, abs=6e-5)
    assert curve.median.point == 23.0
    assert (curve.n, curve.n_censored) == (21, 12)


def test_median_bounds_by_hand() -> None:
    # Log-log Greenwood limits by hand: the lower one of 6-MP first reaches 1/2 at 13 weeks
    # (S = .690, se of ln(−ln S) = .1069/(.690·.371) = .418, lower .690^exp(1.96·.418) = .432; at
    # 10 weeks still .503), the upper one never does: S(23) = .448, upper .680.
    treated = kaplan_meier(MERCAPTOPURINE, STILL_IN_REMISSION).median
    assert (treated.low, treated.high) == (13.0, math.inf)
    # Placebo: lower .425 at 4 (.519 at 3), upper .482 at 11 (.578 at 8).
    control = kaplan_meier(PLACEBO, ALL_RELAPSED).median
    assert control == Interval(4.0, 8.0, 11.0, 21, "Kaplan-Meier, log-log")
    # Seven events: S(1) = 6/7, se of ln(−ln S) = √(1/42)/.154 = 1.00, lower .857^7.11 = .334, so
    # that the first event already bounds the median. Untransformed limits would start at 2.
    seven = kaplan_meier(np.arange(1.0, 8.0), [False] * 7).median
    assert (seven.low, seven.point, seven.high) == (1.0, 4.0, 6.0)


def test_censored_runs_are_kept_at_risk() -> None:
    # 10, 20+, 30: S = 2/3, then the last one at risk falls. Dropping the censored run would give
    # a median of 10, counting it as an event 20.
    assert kaplan_meier([10.0, 20.0, 30.0], [False, True, False]).median.point == 30.0


def test_median_of_tied_times_is_bounded_below_by_them() -> None:
    median = kaplan_meier([5.0, 5.0, 5.0], [False] * 3).median
    assert (median.low, median.point, median.high) == (5.0, 5.0, math.inf)


def test_undefined_times_are_left_out() -> None:
    assert kaplan_meier([10.0, NAN, 20.0, 30.0], [False] * 4).n == 3


def test_degenerate_survival_data_give_nan() -> None:
    with pytest.warns(TooFewCheckpointsWarning, match="2 checkpoints, at least 3 needed"):
        two = kaplan_meier([10.0, 20.0], [False, False]).median
    assert two.point == 10.0
    assert not two.defined
    with pytest.warns(TooFewCheckpointsWarning, match="no checkpoints"):
        assert math.isnan(kaplan_meier([], []).median.point)
    with pytest.warns(AllCensoredWarning, match="all 3 checkpoints are censored"):
        never = kaplan_meier([300.0] * 3, [True] * 3).median
    assert math.isnan(never.point)
    assert not never.defined
    with pytest.warns(MedianNotReachedWarning, match="2 of 3 checkpoints are censored"):
        late = kaplan_meier([10.0, 300.0, 300.0], [False, True, True]).median
    assert math.isnan(late.point)
    assert (late.low, late.high) == (10.0, math.inf)


@pytest.mark.parametrize(
    ("times", "censored", "message"),
    [
        ([1.0, 2.0], [False], r"censored is bool of shape \(1,\); pass one bool per entry of"),
        ([1.0, 2.0], [0, 1], r"censored is int64 of shape \(2,\); pass one bool"),
        ([0.0, 2.0], [False, False], "times holds 0; pass positive times, counted from the"),
        ([math.inf, 2.0], [False, False], "times holds 1 infinite entries"),
    ],
)
def test_bad_times_are_rejected(times: list[float], censored: list[bool], message: str) -> None:
    for function in (kaplan_meier, log_time_interval):
        with pytest.raises(ValueError, match=message):
            function(times, censored)
    with pytest.raises(ValueError, match=message.removeprefix("times ")):
        logrank_test([1.0], [False], times, censored)


def test_log_interval_of_a_geometric_mean() -> None:
    # ln 100 ± ln 10: mean of logs 2·ln 10, sd ln 10, t(2) = 4.302653.
    interval = log_time_interval([10.0, 100.0, 1000.0], [False] * 3)
    factor = 10.0 ** (4.302653 / math.sqrt(3.0))
    assert interval.point == pytest.approx(100.0, rel=1e-12)
    assert interval.high == pytest.approx(100.0 * factor, rel=1e-5)  # the digits of t(2)
    assert interval.low == pytest.approx(100.0 / factor, rel=1e-5)


def test_a_censored_time_has_no_place_in_a_mean() -> None:
    times, censored = [10.0, 20.0, 40.0], [False, False, True]
    with pytest.warns(CensoredDataWarning, match="1 of 3 times are censored, use kaplan_meier"):
        interval = log_time_interval(times, censored)
    assert math.isnan(interval.point)


@pytest.mark.parametrize(
    ("times", "category"),
    [([10.0, 20.0], TooFewCheckpointsWarning), ([10.0] * 3, ZeroVarianceWarning)],
)
def test_log_interval_of_degenerate_times(
    times: list[float], category: type[DegenerateDataWarning]
) -> None:
    with pytest.warns(category):
        assert not log_time_interval(times, [False] * len(times)).defined


def test_confidence_is_checked() -> None:
    for function in (kaplan_meier, log_time_interval):
        with pytest.raises(ValueError, match="confidence is 95"):
            function([1.0, 2.0, 3.0], [False] * 3, 95)


def test_logrank_reproduces_the_leukaemia_remissions() -> None:
    # Kleinbaum & Klein (2012), p. 70: log-rank 16.79 on 1 df; R survdiff prints p = 4.17e-05.
    test = logrank_test(MERCAPTOPURINE, STILL_IN_REMISSION, PLACEBO, ALL_RELAPSED)
    assert test.statistic**2 == pytest.approx(16.79, abs=0.005)
    assert test.p_value == pytest.approx(4.17e-5, abs=5e-8)
    assert test.statistic < 0.0  # the treated relapse later
    assert test.method == "asymptotic"  # C(42, 21) splits are too many
    assert (test.n, test.n_events) == ((21, 21), (9, 21))


def test_exact_logrank_of_separated_groups_is_a_count_of_splits() -> None:
    # Complete separation is the most extreme of C(8, 4) = 70 splits, on either side: 2/70.
    test = logrank_test([1, 2, 3, 4], [False] * 4, [5, 6, 7, 8], [False] * 4)
    assert test.method == "exact permutation"
    assert test.p_value == pytest.approx(2 / 70, rel=1e-12)
    assert test.p_asymptotic == pytest.approx(0.0067, abs=5e-5)  # scipy: too optimistic
    assert test.statistic > 0.0
    # 3 + 3 have 20 splits: nothing can be shown at 5 %.
    least = logrank_test([1, 2, 3], [False] * 3, [4, 5, 6], [False] * 3)
    assert least.p_value == pytest.approx(2 / 20, rel=1e-12)


def test_exact_logrank_by_hand_with_censoring_and_a_tie() -> None:
    # Times 1, 2, 2+, 3+ against 2, 3+, 3+: hazards 1/7 at 1 and 2/6 at 2, so that the scores are
    # 1 − 1/7, then 1 − 1/7 − 1/3 for an event at 2 and −1/7 − 1/3 for a censored unit. Observed −
    # expected of the first group: 2 − (4·1/7 + 3·2/6) = 3/7.
    test = logrank_test([1, 2, 2, 3], [False, False, True, True], [2, 3, 3], [False, True, True])
    scores = np.array([18, 11, -10, -10, 11, -10, -10]) / 21
    sums = np.array([scores[list(split)].sum() for split in combinations(range(7), 4)])
    assert scores[:4].sum() == pytest.approx(3 / 7)
    assert test.p_value == pytest.approx(np.mean(np.abs(sums) >= 3 / 7 - 1e-12), rel=1e-12)


def test_logrank_is_antisymmetric() -> None:
    one = logrank_test([3, 9, 40], [False, False, True], [5, 6, 7, 8], [False] * 4)
    other = logrank_test([5, 6, 7, 8], [False] * 4, [3, 9, 40], [False, False, True])
    assert one.statistic == pytest.approx(-other.statistic, rel=1e-9)
    assert one.p_value == pytest.approx(other.p_value, rel=1e-12)


NEVER, ALWAYS = [True] * 3, [False] * 3


@pytest.mark.parametrize(
    ("treatment", "control", "category", "reason"),
    [
        (([1, 2], ALWAYS[:2]), ([1, 2, 3], ALWAYS), TooFewCheckpointsWarning, "groups of 2 and 3"),
        (([9] * 3, NEVER), ([9] * 3, NEVER), AllCensoredWarning, "every time is censored"),
        (([9] * 3, ALWAYS), ([9] * 3, ALWAYS), ZeroVarianceWarning, "no event has units of both"),
        (([1] * 3, NEVER), ([2, 3, 4], ALWAYS), ZeroVarianceWarning, "no event has units of both"),
    ],
)
def test_degenerate_logrank_gives_nan(
    treatment: tuple[list[float], list[bool]],
    control: tuple[list[float], list[bool]],
    category: type[DegenerateDataWarning],
    reason: str,
) -> None:
    with pytest.warns(category, match=reason):
        test = logrank_test(*treatment, *control)
    assert math.isnan(test.p_value)
    assert math.isnan(test.statistic)
