"""Half-recovery, fits and plans per group, against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.statistics.checkpoint_estimates import (
    CheckpointTrajectory,
    half_times,
    plan_verdict,
)
from healing.statistics.intervals import (
    TooFewCheckpointsWarning,
    UndefinedDataWarning,
)
from healing.statistics.verdicts import decided, group_verdict


def test_the_geometric_mean_has_an_interval_on_the_log_scale_where_none_is_censored() -> None:
    found = half_times([CheckpointTrajectory((0, 10), ((0.0, v),)) for v in (60, 80, 90)], 0.95)
    logs = np.log([500 / v for v in (60, 80, 90)])
    low, high = np.exp(scipy_stats.t.interval(0.95, 2, logs.mean(), scipy_stats.sem(logs)))
    mean = found.geometric_mean
    assert (mean.low, mean.point, mean.high) == pytest.approx((low, np.exp(logs.mean()), high))
    censored = half_times([CheckpointTrajectory((0, 10), ((0.0, v),)) for v in (60, 80, 9)], 0.95)
    assert math.isnan(censored.geometric_mean.point)


def test_half_times_by_hand() -> None:
    rows = [(0.0, 40.0, 60.0), (0.0, 60.0, 70.0), (0.0, 10.0, 20.0)]
    found = half_times([CheckpointTrajectory((0, 10, 20), (r,)) for r in rows], 0.95)
    # 10 + 10·(50 − 40)/20, 10·50/60, and never.
    assert [h.time for h in found.times] == pytest.approx([15.0, 50 / 6, 20.0])
    assert [h.censored for h in found.times] == [False, False, True]
    assert list(found.curve.probabilities) == pytest.approx([2 / 3, 1 / 3, 1 / 3])
    assert found.curve.median.point == pytest.approx(15.0)


def test_a_checkpoint_that_was_never_trained_on_has_no_time() -> None:
    with (
        pytest.warns(TooFewCheckpointsWarning, match="no checkpoints"),
        pytest.warns(UndefinedDataWarning, match="no recovery is defined"),
    ):
        found = half_times([CheckpointTrajectory((0,), ((0.0,),))], 0.95)
    assert math.isnan(found.times[0].time)
    assert found.curve.n == 0


@pytest.mark.parametrize("means", [(4.0, 8.0, 9.0), (60.0, 40.0, 45.0), (95.0, 80.0, 85.0)])
def test_planned_checkpoints_decide_with_the_promised_probability(means) -> None:
    plan = plan_verdict(means, 0.95)
    assert plan is not None
    rng = np.random.default_rng(0)

    def power(n: int) -> float:
        samples = rng.normal(np.mean(means), np.std(means, ddof=1), (20_000, n))
        return float(decided(samples)[plan.verdict].mean())

    # Standard error 0.003. By the count a few more than the fewest are planned.
    assert power(plan.n_checkpoints) > 0.79
    assert power(plan.n_checkpoints // 2) < 0.8
    assert group_verdict(means).verdict == "too few checkpoints"


def test_a_plan_needs_a_spread_and_a_side() -> None:
    assert plan_verdict([math.nan, 30.0], 0.95) is None
    # Equal means are taken for half a point apart, and then the count decides.
    assert plan_verdict([30.0, 30.0, 30.0], 0.95).n_checkpoints == 8
    assert plan_verdict([10.0, 30.0], 0.95) is None  # the mean is the threshold
    assert plan_verdict([69.9, 70.1], 0.95) is None
    assert plan_verdict([30.0, 40.0], 0.95).verdict == "partial"


def test_an_unattainable_plan_says_so() -> None:
    plan = plan_verdict([0.0, 140.001], 0.95)
    assert plan is not None
    assert plan.n_checkpoints is None
    assert plan.verdict == "acute structural failure"


def test_bad_plans_are_rejected() -> None:
    with pytest.raises(ValueError, match="confidence is 1"):
        plan_verdict([10.0, 12.0], 1.0)
    with pytest.raises(ValueError, match="power is 2"):
        plan_verdict([10.0, 12.0], 0.95, power=2.0)
    with pytest.raises(ValueError, match="not ascending"):
        half_times([CheckpointTrajectory((5, 0), ((0.0, 1.0),))], 0.95)
