"""Power of the verdicts against published sample sizes and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest

from healing.measurements.recovery import Verdict
from healing.statistics.intervals import t_interval
from healing.statistics.power import required_checkpoints, verdict_power
from healing.statistics.verdicts import ZONES

HEALS: Verdict = Verdict.REVERSIBLE
STAYS: Verdict = Verdict.IRREVERSIBLE


def test_published_one_sample_size() -> None:
    # One-sample t, d = 0.5, two-sided 5 %, power 0.8: R power.t.test gives 33.37, so 34.
    assert required_checkpoints(75.0, 10.0, HEALS) == 34
    assert required_checkpoints(15.0, 10.0, STAYS) == 34


def test_published_equivalence_power() -> None:
    # PowerTOST, sampleN.TOST(CV = 0.3) with theta0 = 0.95 and limits 0.8 to 1.25: n = 40 of a
    # 2 × 2 crossover, 38 degrees of freedom, power 0.815845. Here 39 checkpoints have as many.
    standard_error = math.sqrt(math.log(1.0 + 0.3**2) * 2.0 / 40.0)
    power = verdict_power(
        39,
        mean=math.log(0.95),
        sd=standard_error * math.sqrt(39.0),
        verdict="partial",
        confidence=0.9,
        reversible_above=math.log(1.25),
        irreversible_below=-math.log(1.25),
    )
    assert power == pytest.approx(0.815845, abs=5e-7)  # the digits printed


@pytest.mark.parametrize(
    ("mean", "sd", "verdict"),
    [
        (85.0, 10.0, HEALS),
        (5.0, 12.0, STAYS),
        (45.0, 12.0, "partial"),
        (62.0, 8.0, "partial"),
        (-40.0, 20.0, Verdict.FURTHER),
    ],
)
def test_required_checkpoints_decide_by_simulation(
    mean: float, sd: float, verdict: Verdict
) -> None:
    n, rng = required_checkpoints(mean, sd, verdict), np.random.default_rng(0)
    predicted = verdict_power(n, mean, sd, verdict)
    assert verdict_power(n - 1, mean, sd, verdict) < 0.8 <= predicted
    samples = rng.normal(mean, sd, size=(2000, n))
    intervals = [t_interval(x) for x in samples]
    bounds = np.array([[i.low, i.high] for i in intervals])
    reached = ZONES[Verdict(verdict)].holds(bounds).all(axis=1).mean()
    # Monte-Carlo error √(0.8·0.2/2000) = 0.9 %; 3.5 of them.
    assert reached == pytest.approx(predicted, abs=0.031)


def test_partial_equals_the_nearer_side_where_the_other_is_far() -> None:
    # 800 points from the lower threshold only the upper one matters.
    wide = verdict_power(5, 60.0, 8.0, "partial", irreversible_below=-800.0)
    mirrored = verdict_power(5, 80.0, 8.0, HEALS)
    assert wide == pytest.approx(mirrored, abs=1e-8)  # the accuracy of the quadrature


def test_power_is_a_probability_and_grows() -> None:
    for verdict in (HEALS, STAYS, "partial"):
        mean = {HEALS: 75.0, STAYS: 12.0, "partial": 55.0}[verdict]
        powers = [verdict_power(n, mean, 9.0, verdict) for n in (3, 5, 10, 100, 100_000)]
        assert powers == sorted(powers)
        assert powers[0] > 0.0
        assert powers[-1] <= 1.0
    assert verdict_power(3, 45.0, 1e9, "partial") == 0.0  # no interval that short


def test_a_sure_verdict_takes_three_checkpoints() -> None:
    assert required_checkpoints(95.0, 0.1, HEALS) == 3


@pytest.mark.parametrize(
    ("mean", "sd", "verdict", "power", "message"),
    [
        (70.0, 5.0, HEALS, 0.8, "mean 70.0 never gives 'acute structural failure'; pass a mean"),
        (20.0, 5.0, STAYS, 0.8, "mean 20.0 never gives 'irreversible pathology'"),
        (71.0, 5.0, "partial", 0.8, "mean 71.0 never gives 'partial'"),
        (70.001, 5.0, HEALS, 0.8, "over 100000 checkpoints needed; pass a mean further"),
        (80.0, 0.0, HEALS, 0.8, "sd is 0.0; pass a positive number of points"),
        (math.nan, 5.0, HEALS, 0.8, "mean is nan; pass an expected recovery"),
        (80.0, 5.0, "inconclusive", 0.8, "verdict is 'inconclusive'; pass one of"),
        (80.0, 5.0, HEALS, 1.0, "power is 1.0; pass a number strictly between 0 and 1"),
    ],
)
def test_bad_plans_are_rejected(
    mean: float, sd: float, verdict: Verdict, power: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        required_checkpoints(mean, sd, verdict, power)


def test_bad_power_arguments_are_rejected() -> None:
    with pytest.raises(ValueError, match="n is 2; an interval needs at least 3 checkpoints"):
        verdict_power(2, 80.0, 5.0, HEALS)
    with pytest.raises(ValueError, match="confidence is 0"):
        verdict_power(3, 80.0, 5.0, HEALS, confidence=0.0)
    with pytest.raises(ValueError, match="thresholds out of order"):
        verdict_power(3, 80.0, 5.0, HEALS, reversible_above=10.0)
