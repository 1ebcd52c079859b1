"""Half-recovery, fits and plans per group, against closed forms and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.statistics.checkpoint_estimates import (
    CheckpointTrajectory,
    fit_asymptotes,
    half_times,
    plan_verdict,
)
from healing.statistics.intervals import (
    TooFewCheckpointsWarning,
    UndefinedDataWarning,
)
from healing.statistics.verdicts import decided, group_verdict

STEPS = tuple(range(0, 101, 10))


def exponential(asymptote: float, tau: float) -> tuple[float, ...]:
    return tuple(asymptote * -math.expm1(-t / tau) for t in STEPS)


def test_noiseless_checkpoints_give_the_t_intervals_of_their_parameters() -> None:
    limits, taus = [40.0, 50.0, 54.0], [10.0, 14.0, 20.0]
    found = fit_asymptotes(
        [CheckpointTrajectory(STEPS, (exponential(*p),)) for p in zip(limits, taus, strict=True)],
        0.9,
    )
    assert found.converged
    low, high = scipy_stats.t.interval(0.9, 2, np.mean(limits), scipy_stats.sem(limits))
    assert (found.asymptote.low, found.asymptote.high) == pytest.approx((low, high), rel=1e-6)
    logs = np.log(np.log(2.0) * np.array(taus))
    low, high = np.exp(scipy_stats.t.interval(0.9, 2, logs.mean(), scipy_stats.sem(logs)))
    assert (found.half_life.low, found.half_life.high) == pytest.approx((low, high), rel=1e-6)
    assert found.half_life.point == pytest.approx(math.log(2) * np.prod(taus) ** (1 / 3), rel=1e-6)


def test_replicates_are_averaged_before_the_fit() -> None:
    pairs = tuple(exponential(a, 12.0) for a in (30.0, 50.0))
    found = fit_asymptotes([CheckpointTrajectory(STEPS, pairs)], 0.95)
    assert found.asymptote.point == pytest.approx(40.0, rel=1e-6)
    assert (found.n_checkpoints, found.asymptote.defined) == (1, False)


def test_one_fit_that_does_not_converge_leaves_the_group_undetermined() -> None:
    straight = tuple(0.3 * t for t in STEPS)
    curves = [exponential(40.0, 10.0), exponential(45.0, 12.0), straight]
    found = fit_asymptotes([CheckpointTrajectory(STEPS, (c,)) for c in curves], 0.95)
    assert not found.converged
    assert math.isnan(found.asymptote.point)
    assert math.isnan(found.half_life.point)
    assert (len(found.laws), found.n_checkpoints) == (2, 3)
    assert found.reasons


def test_undefined_checkpoints_are_left_out_and_all_undefined_is_not_converged() -> None:
    undefined = CheckpointTrajectory(STEPS, ((math.nan,) * len(STEPS),))
    defined = CheckpointTrajectory(STEPS, (exponential(40.0, 10.0),))
    assert fit_asymptotes([undefined, defined], 0.95).n_checkpoints == 1
    nothing = fit_asymptotes([undefined], 0.95)
    assert (nothing.n_checkpoints, nothing.converged, nothing.reasons) == (0, False, ())


def test_an_undefined_replicate_does_not_take_its_checkpoint_out_of_the_fits() -> None:
    nowhere = (0.0, *(math.nan for _ in STEPS[1:]))
    values = exponential(40.0, 10.0)
    now_and_then = tuple(math.nan if t == 30 else v for t, v in zip(STEPS, values, strict=True))
    with_both = CheckpointTrajectory(STEPS, (exponential(40.0, 10.0), nowhere))
    alone = CheckpointTrajectory(STEPS, (exponential(40.0, 10.0),))
    found, expected = (fit_asymptotes([c], 0.95) for c in (with_both, alone))
    assert (found.n_checkpoints, found.converged) == (1, True)
    assert found.asymptote.point == expected.asymptote.point
    assert found.half_life.point == expected.half_life.point
    # A step at which a defined replicate is undefined is left out: a mean would jump there.
    gap = CheckpointTrajectory(STEPS, (exponential(80.0, 10.0), now_and_then))
    assert np.isnan(gap.mean()).tolist() == [t == 30 for t in STEPS]
    assert fit_asymptotes([gap], 0.95).asymptote.point == pytest.approx(60.0, rel=1e-6)


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
