"""When a limit is said: known curves, closed forms, and how often it holds the truth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.statistics.checkpoint_estimates import CheckpointTrajectory
from healing.statistics.fits import asymptotes as rule
from healing.statistics.fits.asymptotes import fit_asymptotes
from tests.statistics.limit_rates import LAWS, rate

STEPS = tuple(range(0, 241, 10))
LIMITS, TAUS = [46.0, 50.0, 51.0], [10.0, 14.0, 20.0]


def exponential(asymptote: float, tau: float, steps=STEPS) -> tuple[float, ...]:
    return tuple(asymptote * -math.expm1(-t / tau) for t in steps)


def group(limits=LIMITS, taus=TAUS, steps=STEPS) -> list[CheckpointTrajectory]:
    return [
        CheckpointTrajectory(steps, (exponential(a, tau, steps),))
        for a, tau in zip(limits, taus, strict=True)
    ]


def test_levelled_checkpoints_give_the_t_intervals_of_their_parameters() -> None:
    found = fit_asymptotes(group(), 0.9)
    assert found.converged
    assert found.laws == ("exponential",) * 3
    assert found.asymptote.point == pytest.approx(49.0, rel=1e-6)
    low, high = scipy_stats.t.interval(0.9, 2, np.mean(LIMITS), scipy_stats.sem(LIMITS))
    # At 12 to 24 time constants almost nothing is left to come (51·e^−6 = 0.1 at half the window).
    assert (found.asymptote.low, found.asymptote.high) == pytest.approx((low, high), abs=0.3)
    logs = np.log(np.log(2.0) * np.array(TAUS))
    low, high = np.exp(scipy_stats.t.interval(0.9, 2, logs.mean(), scipy_stats.sem(logs)))
    assert (found.half_life.low, found.half_life.high) == pytest.approx((low, high), rel=1e-6)
    assert found.half_life.point == pytest.approx(math.log(2) * np.prod(TAUS) ** (1 / 3), rel=1e-6)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_the_far_end_is_the_limit_of_the_slowest_tail(sign: float) -> None:
    """Power laws a − c·t^−½ seen in their last doubling: the far end is a, in closed form."""
    limits = np.array([60.0, 64.0, 71.0])
    t = np.linspace(10.0, 240.0, 24)
    tails = [sign * (a - 8.0 * (t / t[-1]) ** -rule.SLOWEST_TAIL) for a in limits]
    measured = [(t, tail) for tail in tails]
    fits = [rule.fit_trajectory(t, r, autocorrelated=False) for t, r in
            ((t, sign * a * (1 - np.exp(-t / 5.0))) for a in limits - 8.0)]  # fmt: skip
    limit = rule._limit(measured, fits, 0.95)
    far, near = (limit.high, limit.low) if sign > 0 else (limit.low, limit.high)
    half = scipy_stats.t.ppf(0.975, 2) * scipy_stats.sem(limits)
    # A line through a curve that bends in log t ends a little above it: 0.3 points of 8.
    assert sign * far - (limits.mean() + half) == pytest.approx(0.3, abs=0.35)
    # Near end: the last quarter's mean, a little below the end.
    quarter = np.mean((t[t >= 180.0] / t[-1]) ** -rule.SLOWEST_TAIL)
    assert sign * near == pytest.approx(limits.mean() - 8.0 * quarter - half, abs=1e-9)


def test_six_points_carry_no_limit() -> None:
    found = fit_asymptotes(group(steps=tuple(range(0, 61, 10))), 0.95)
    assert found.reasons == ("6 measurements, at least 12 needed",)
    assert not found.converged
    assert math.isnan(found.asymptote.point)
    assert math.isnan(found.half_life.point)
    assert fit_asymptotes(group(steps=tuple(range(0, 481, 40))), 0.95).converged


@pytest.mark.parametrize(
    ("per_step", "flat"),
    [(0.0, True), (0.015, True), (0.025, False), (-0.025, False), (0.04, False), (0.3, False)],
)
def test_a_last_quarter_that_still_moves_carries_none(per_step: float, flat: bool) -> None:
    """The gain is the slope times 60 steps: 0.9 ± 0.8 points pass, 1.5 ± 0.8 do not."""
    curves = [
        tuple(
            v + per_step * max(0, t - 120) for v, t in zip(exponential(a, 8.0), STEPS, strict=True)
        )
        for a in LIMITS
    ]
    found = fit_asymptotes([CheckpointTrajectory(STEPS, (c,)) for c in curves], 0.95)
    assert found.last_quarter_gain.point == pytest.approx(60.0 * per_step, abs=0.01)
    half = scipy_stats.t.ppf(0.95, 2) * 0.5 / math.sqrt(3)  # equal gains count as 0.5 apart
    gain = found.last_quarter_gain
    assert gain.high - gain.point == pytest.approx(half, abs=0.01)
    blocked = any("the last quarter is not shown to be flat" in r for r in found.reasons)
    assert blocked is not flat


def test_a_last_quarter_that_scatters_is_not_shown_to_be_flat() -> None:
    """No gain on average, but +5, 0 and −5 points: the interval decides, not the mean."""
    curves = [
        tuple(
            v + g / 60.0 * max(0, t - 180)
            for v, t in zip(exponential(50.0, 8.0), STEPS, strict=True)
        )
        for g in (5.0, 0.0, -5.0)
    ]
    found = fit_asymptotes([CheckpointTrajectory(STEPS, (c,)) for c in curves], 0.95)
    assert found.last_quarter_gain.point == pytest.approx(0.0, abs=0.1)
    assert "not shown to be flat" in found.reasons[0]


def test_replicates_are_averaged_before_the_fit() -> None:
    pairs = tuple(exponential(a, 12.0) for a in (30.0, 50.0))
    others = [CheckpointTrajectory(STEPS, (exponential(a, 12.0),)) for a in (44.0, 36.0)]
    found = fit_asymptotes([CheckpointTrajectory(STEPS, pairs), *others], 0.95)
    assert found.asymptote.point == pytest.approx(40.0, rel=1e-6)
    assert (found.n_checkpoints, found.converged) == (3, True)


def test_two_checkpoints_have_no_spread_to_judge_by() -> None:
    found = fit_asymptotes(group()[:2], 0.95)
    assert found.reasons == ("2 checkpoints, at least 3 needed",)
    assert math.isnan(found.asymptote.point)


def test_one_fit_that_does_not_converge_leaves_the_group_undetermined() -> None:
    stays = tuple(0.001 * (-1) ** (t // 10) for t in STEPS)
    curves = [exponential(40.0, 10.0), exponential(45.0, 12.0), stays]
    found = fit_asymptotes([CheckpointTrajectory(STEPS, (c,)) for c in curves], 0.95)
    assert not found.converged
    assert math.isnan(found.asymptote.point)
    assert math.isnan(found.half_life.point)
    assert (len(found.laws), found.n_checkpoints) == (2, 3)
    assert found.reasons[0].endswith("in 1 of 3 fits")


def test_limits_far_apart_are_not_one_limit() -> None:
    found = fit_asymptotes(group(limits=[10.0, 50.0, 90.0]), 0.95)
    (reason,) = found.reasons  # 4.3·40/√3 = 99, and a little of the tail
    assert reason in {f"the limit's interval reaches {n} points from it" for n in (99, 100)}


def test_undefined_checkpoints_are_left_out_and_all_undefined_is_nothing() -> None:
    undefined = CheckpointTrajectory(STEPS, ((math.nan,) * len(STEPS),))
    assert (
        fit_asymptotes([undefined, *group()], 0.95).asymptote
        == fit_asymptotes(group(), 0.95).asymptote
    )
    nothing = fit_asymptotes([undefined], 0.95)
    assert (nothing.n_checkpoints, nothing.converged, nothing.reasons) == (0, False, ())


def test_an_undefined_replicate_does_not_take_its_checkpoint_out_of_the_fits() -> None:
    nowhere = (0.0, *(math.nan for _ in STEPS[1:]))
    values = exponential(40.0, 10.0)
    now_and_then = tuple(math.nan if t == 30 else v for t, v in zip(STEPS, values, strict=True))
    with_both = CheckpointTrajectory(STEPS, (exponential(46.0, 10.0), nowhere))
    found, expected = (
        fit_asymptotes([c, *group()], 0.95) for c in (with_both, group([46.0], [10.0])[0])
    )
    assert (found.n_checkpoints, found.converged) == (4, True)
    assert found.asymptote == expected.asymptote
    assert found.half_life == expected.half_life
    # A step at which a defined replicate is undefined is left out: a mean would jump there.
    gap = CheckpointTrajectory(STEPS, (exponential(80.0, 10.0), now_and_then))
    assert np.isnan(gap.mean()).tolist() == [t == 30 for t in STEPS]


@pytest.mark.slow
@pytest.mark.parametrize("phi", [0.0, 0.8])
@pytest.mark.parametrize("law", ["exponential, 10 τ", "power law t^-1.5, 30 τ"])
def test_a_limit_that_is_given_holds_the_truth(law: str, phi: float) -> None:
    found = rate(law, 80.0, phi, 10, 24, 60)
    assert found.given > 30
    assert found.covered / found.given >= 0.88  # 95 % nominal, Monte-Carlo error 3 %


@pytest.mark.parametrize("law", [name for name in LAWS if "2 τ" in name or "-0.25" in name])
@pytest.mark.parametrize("phi", [0.0, 0.8])
def test_what_has_not_levelled_off_is_refused(law: str, phi: float) -> None:
    for points in (6, 12, 48):
        assert rate(law, 60.0, phi, 5, points, 30).given <= 3
