"""Trajectory fits against certified regressions, synthetic laws and data that never bend."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest

from healing.statistics.fits import curve_fits
from healing.statistics.fits.curve_fits import (
    NotConvergedWarning,
    TooFewMeasurementsWarning,
    TrajectoryFit,
    fit_trajectory,
)
from healing.statistics.intervals import DegenerateDataWarning, ZeroVarianceWarning

STEPS = np.array([0.0, 10, 20, 30, 50, 75, 100, 150, 200, 250, 300])
EXPONENTIAL = 60.0 * (1.0 - np.exp(-STEPS / 50.0))
POWER_LAW = 70.0 * (1.0 - (1.0 + STEPS / 20.0) ** -1.5)
POWER_LAW_HALF_LIFE = 20.0 * (2.0 ** (1.0 / 1.5) - 1.0)
# NIST StRD, BoxBOD and Misra1a; both certify y = b1(1 − exp(−b2·x)).
BOXBOD = ([1.0, 2, 3, 5, 7, 10], [109.0, 149, 149, 191, 213, 224])
MISRA1A = (
    [77.6, 114.9, 141.1, 190.8, 239.9, 289.0, 332.8, 378.4, 434.8, 477.3, 536.8, 593.1, 689.1, 760],
    [
        10.07,
        14.73,
        17.94,
        23.93,
        29.61,
        35.18,
        40.02,
        44.82,
        50.76,
        55.05,
        61.01,
        66.4,
        75.47,
        81.78,
    ],
)


def _noisy(curve: np.ndarray, sd: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(scale=sd, size=curve.size)
    return curve + noise * (STEPS > 0.0)


def _fit_quietly(curve: np.ndarray, sd: float, seed: int) -> TrajectoryFit:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConvergedWarning)
        # Independent errors, as they are simulated here; test_autocorrelation.py has the others.
        return fit_trajectory(STEPS, _noisy(curve, sd, seed), autocorrelated=False)


def test_exponential_reproduces_nist_boxbod() -> None:
    # Certified: b1 = 213.80940889 (sd 12.354515176), b2 = 0.54723748542 (sd 0.10455993237), RSS
    # 1168.0088766 on 4 degrees of freedom, t(4) = 2.7764451. Differences of order √eps.
    fit = fit_trajectory(*BOXBOD, max_asymptote_half_width=50.0, autocorrelated=False)
    assert fit.law == "exponential"
    assert fit.converged
    assert fit.parameters == pytest.approx((213.80940889, 1.0 / 0.54723748542), rel=1e-6)
    half_width = 2.7764451 * 12.354515176
    assert fit.asymptote.high - fit.asymptote.point == pytest.approx(half_width, rel=1e-5)
    assert fit.asymptote.point - fit.asymptote.low == pytest.approx(half_width, rel=1e-5)
    # Delta method on the log scale: sd(ln b2) = sd(b2)/b2.
    factor = math.exp(2.7764451 * 0.10455993237 / 0.54723748542)
    half_life = math.log(2.0) / 0.54723748542
    assert fit.half_life.point == pytest.approx(half_life, rel=1e-6)
    assert fit.half_life.high == pytest.approx(half_life * factor, rel=1e-4)
    assert fit.half_life.low == pytest.approx(half_life / factor, rel=1e-4)
    # AICc with k = 3 and n = 6 from the certified RSS.
    expected = 6.0 * math.log(1168.0088766 / 6.0) + 2 * 3 + 2 * 3 * 4 / (6 - 3 - 1)
    assert fit.aicc["exponential"] == pytest.approx(expected, rel=1e-8)


def test_nist_misra1a_bends_too_little_for_an_asymptote() -> None:
    # Its certified half-life, ln 2/5.5015643181e-4 = 1260, lies beyond the last x, 760; and a
    # power law fits better (RSS 0.023 instead of 0.125) with any asymptote.
    with pytest.warns(NotConvergedWarning, match="fit not converged: "):
        fit = fit_trajectory(*MISRA1A, autocorrelated=False)
    assert not fit.converged
    assert math.isnan(fit.asymptote.point)
    k3 = 14 * math.log(0.12455138894 / 14) + 6 + 24 / 10
    assert fit.aicc["exponential"] == pytest.approx(k3, rel=1e-8)
    assert fit.aicc["power law"] < k3


@pytest.mark.parametrize(
    ("curve", "law", "parameters", "half_life"),
    [
        (EXPONENTIAL, "exponential", (60.0, 50.0), 50.0 * math.log(2.0)),
        (POWER_LAW, "power law", (70.0, 20.0, 1.5), POWER_LAW_HALF_LIFE),
        (-EXPONENTIAL, "exponential", (-60.0, 50.0), 50.0 * math.log(2.0)),  # it got worse
        (2.0 * EXPONENTIAL, "exponential", (120.0, 50.0), 50.0 * math.log(2.0)),  # beyond healthy
    ],
)
def test_noiseless_laws_are_recovered(
    curve: np.ndarray, law: str, parameters: tuple[float, ...], half_life: float
) -> None:
    fit = fit_trajectory(STEPS, curve)
    assert fit.law == law
    assert fit.converged
    assert fit.parameters == pytest.approx(parameters, rel=1e-5)  # ftol 1e-12: √1e-12 on θ, ×10
    assert fit.asymptote.point == pytest.approx(parameters[0], rel=1e-5)
    assert fit.half_life.point == pytest.approx(half_life, rel=1e-5)
    np.testing.assert_allclose(fit.predict(STEPS), curve, rtol=0, atol=1e-3)
    assert fit.n == 10  # the collapsed state at 0 informs nobody


def test_half_life_is_when_half_of_the_asymptote_is_reached() -> None:
    for curve in (EXPONENTIAL, POWER_LAW):
        fit = fit_trajectory(STEPS, curve)
        reached = fit.predict([fit.half_life.point])
        assert reached == pytest.approx([fit.asymptote.point / 2.0], rel=1e-9)


def test_the_unit_of_time_does_not_matter() -> None:
    r = _noisy(EXPONENTIAL, 1.0, seed=3)
    in_steps, in_tokens = fit_trajectory(STEPS, r), fit_trajectory(1024.0 * STEPS, r)
    assert in_tokens.asymptote.high == pytest.approx(in_steps.asymptote.high, rel=1e-5)
    assert in_tokens.half_life.high == pytest.approx(1024.0 * in_steps.half_life.high, rel=1e-5)


@pytest.mark.parametrize(
    ("curve", "law", "truth"),
    [
        (EXPONENTIAL, "exponential", (60.0, 50.0 * math.log(2.0))),
        (POWER_LAW, "power law", (70.0, POWER_LAW_HALF_LIFE)),
    ],
)
def test_intervals_cover_and_the_law_is_found(
    curve: np.ndarray, law: str, truth: tuple[float, float]
) -> None:
    fits = [_fit_quietly(curve, 1.0, seed) for seed in range(120)]
    found = [fit for fit in fits if fit.law == law and fit.converged]
    assert len(found) > 108
    intervals = [(fit.asymptote, fit.half_life) for fit in found]
    for which, value in enumerate(truth):
        covered = np.mean([pair[which].low <= value <= pair[which].high for pair in intervals])
        print(f"{law:<12} {('asymptote', 'half-life')[which]} covers {100 * covered:.1f} %")
        # Nominal 95 %; Monte-Carlo error 2 %, three of them, and 1 % for the linearisation.
        assert 0.88 <= covered < 1.0


def test_an_asymptote_is_an_extrapolation() -> None:
    """Kept failing example: with its tail under the noise a power law passes for an exponential."""
    fits = [_fit_quietly(POWER_LAW, 3.0, seed) for seed in range(80)]
    found = [fit for fit in fits if fit.converged]
    covered = np.mean([fit.asymptote.low <= 70.0 <= fit.asymptote.high for fit in found])
    print(f"power law under 3 points of noise: asymptote covers {100 * covered:.1f} % of converged")
    assert covered < 0.85  # 69 % over 500 seeds, so 5.5 % Monte-Carlo error on these 80


@pytest.mark.parametrize("sd", [0.3, 3.0])
def test_a_trajectory_that_never_bends_has_no_asymptote(sd: float) -> None:
    fits = [_fit_quietly(0.1 * STEPS, sd, seed) for seed in range(8)]
    # Over 150 seeds 0.7 % converge at sd 3 and none at less; more than 1 of 8 is a fault.
    assert sum(fit.converged for fit in fits) <= 1
    for fit in fits:
        if not fit.converged:
            assert fit.reason
            assert math.isnan(fit.asymptote.point)
            assert math.isnan(fit.half_life.high)


def test_a_trajectory_that_never_leaves_zero_has_no_half_life() -> None:
    fits = [_fit_quietly(0.0 * STEPS, 1.0, seed) for seed in range(8)]
    assert not any(fit.converged for fit in fits)


def test_each_reason_is_given() -> None:
    beyond, bound = "half-life beyond the observed window", "a parameter is at its bound"
    slow = 60.0 * (1.0 - np.exp(-STEPS / 500.0))
    assert _fit_quietly(slow, 0.01, seed=0).reason == beyond
    straight = {_fit_quietly(0.1 * STEPS, 3.0, seed).reason for seed in range(6)}
    assert straight == {beyond, bound, "asymptote interval too wide"}
    flat = {_fit_quietly(0.0 * STEPS, 1.0, seed).reason for seed in range(4)}
    assert flat == {bound, "singular Jacobian", "half-life interval too wide"}


def test_proportional_jacobian_columns_determine_no_covariance() -> None:
    column = np.linspace(0.1, 1.0, 10)
    jacobian = np.column_stack([column, 30.0 * column])
    fit = curve_fits._LeastSquares(
        "exponential", np.array([60.0, 4.0]), jacobian, column, 0.0, 1.0, 0.0, True, False
    )
    times = np.arange(1.0, 11.0)
    assert curve_fits._covariance(fit, times, True) is None
    asymptote, half_life = curve_fits._delta_intervals(fit, times, 0.95, True)
    assert not asymptote.defined
    assert not half_life.defined


def test_the_width_that_counts_as_undetermined_can_be_set() -> None:
    r = _noisy(EXPONENTIAL, 3.0, seed=0)
    assert fit_trajectory(STEPS, r).converged
    with pytest.warns(NotConvergedWarning, match="asymptote interval too wide"):
        fit_trajectory(STEPS, r, max_asymptote_half_width=0.1)


def test_an_optimiser_that_runs_out_of_evaluations_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(curve_fits, "MAX_EVALUATIONS", 2)
    with pytest.warns(NotConvergedWarning, match="the optimiser did not converge"):
        fit = fit_trajectory(STEPS, _noisy(EXPONENTIAL, 3.0, seed=0))
    assert math.isnan(fit.asymptote.point)
    assert len(fit.parameters) == 2


def test_undefined_measurements_are_left_out() -> None:
    r = _noisy(EXPONENTIAL, 1.0, seed=0)
    holes = np.insert(r, 4, math.nan)
    with_holes = fit_trajectory(np.insert(STEPS, 4, 40.0), holes)
    assert with_holes.asymptote == fit_trajectory(STEPS, r).asymptote


@pytest.mark.parametrize(
    ("times", "recovery", "category"),
    [
        ([0, 1, 2, 3, 4], [0.0, 10, 20, 25, 27], TooFewMeasurementsWarning),
        ([], [], TooFewMeasurementsWarning),
        (STEPS, 0.0 * STEPS, ZeroVarianceWarning),
    ],
)
def test_degenerate_trajectories_have_no_law(
    times: list[float], recovery: list[float], category: type[DegenerateDataWarning]
) -> None:
    with pytest.warns(category, match="no trajectory fit: "):
        fit = fit_trajectory(times, recovery)
    assert fit.law is None
    assert not fit.converged
    assert math.isnan(fit.asymptote.point)
    assert np.isnan(fit.predict([1.0, 2.0])).all()


def test_five_measurements_allow_the_exponential_only() -> None:
    fit = fit_trajectory(STEPS[:6], EXPONENTIAL[:6], autocorrelated=False)
    assert list(fit.aicc) == ["exponential"]
    with pytest.warns(TooFewMeasurementsWarning, match="too few measurements"):  # one more unknown
        assert fit_trajectory(STEPS[:6], EXPONENTIAL[:6]).law is None


def test_bad_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="times are not ascending from 0 or later; sort them"):
        fit_trajectory([0, 2, 1], [0.0, 1, 2])
    with pytest.raises(ValueError, match="times are not ascending"):
        fit_trajectory([-1, 2, 3], [0.0, 1, 2])
    with pytest.raises(ValueError, match=r"lengths differ: \{'times': 2, 'recovery_pct': 3\}"):
        fit_trajectory([1, 2], [0.0, 1, 2])
    with pytest.raises(ValueError, match=r"max_asymptote_half_width is 0\.0; pass a positive"):
        fit_trajectory(STEPS, EXPONENTIAL, max_asymptote_half_width=0.0)
    with pytest.raises(ValueError, match="confidence is 95"):
        fit_trajectory(STEPS, EXPONENTIAL, confidence=95)
