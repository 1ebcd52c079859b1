"""Group verdicts: the count by scipy's exact binomial test, the rule by hand and by simulation."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from scipy import stats

from healing.measurements.recovery import Verdict
from healing.statistics.intervals import TooFewCheckpointsWarning, recovery_interval, t_interval
from healing.statistics.power import counted_checkpoints
from healing.statistics.verdicts import (
    Open,
    checkpoints_needed,
    decided,
    group_verdict,
    others_at_most,
)
from tests.conftest import ROOT
from tests.statistics.verdict_rates import CLEAR, REGIMES, SIZES, false_rates, rates

NAN = math.nan
STAYS, HEALS, PARTIAL, FURTHER = (
    Verdict.IRREVERSIBLE, Verdict.REVERSIBLE, Verdict.PARTIAL, Verdict.FURTHER,
)  # fmt: skip


@pytest.mark.parametrize("n", [1, 3, 5, 14, 50])
def test_the_share_of_others_is_the_exact_one_sided_bound(n: int) -> None:
    for k in range(n + 1):
        theirs = stats.binomtest(n - k, n, alternative="less").proportion_ci(0.95, "exact").high
        assert float(others_at_most(k, n)) == pytest.approx(theirs, abs=1e-12)
    assert float(others_at_most(n, n)) == pytest.approx(1 - 0.05 ** (1 / n))


def test_three_of_three_leave_63_percent_open() -> None:
    found = group_verdict([1.0, 2.0, 3.0])
    assert (found.verdict, found.why_open) == (Verdict.TOO_FEW, Open.TOO_FEW)
    assert (found.side, found.n_on_side, found.counts) == (STAYS, 3, {STAYS: 3})
    assert found.others_at_most == pytest.approx(0.6316, abs=5e-5)
    # 36.84 % of 2 and 63.16 % of 100.
    assert found.worst_mean == pytest.approx(0.3684 * 2 + 63.16, abs=0.01)


@pytest.mark.parametrize(
    ("means", "verdict", "why"),
    [
        ([0.0] * 13, Verdict.TOO_FEW, Open.COUNT),
        ([0.0] * 14, STAYS, Open.NO),
        ([100.0] * 8, Verdict.TOO_FEW, Open.COUNT),
        ([100.0] * 9, HEALS, Open.NO),
        ([45.0] * 4, Verdict.TOO_FEW, Open.TOO_FEW),
        ([45.0] * 8, PARTIAL, Open.NO),
        ([-90.0] * 5, Verdict.TOO_FEW, Open.COUNT),
        ([-90.0] * 9, FURTHER, Open.NO),
        ([-15.0] * 14, STAYS, Open.NO),
        ([2.0] * 19 + [95.0], Verdict.INCONCLUSIVE, Open.SPLIT),
        ([18.0, 20.0, 23.0, 17.0, 22.0, 19.0], Verdict.INCONCLUSIVE, Open.INTERVAL),
        ([5.0, 85.0] * 8, Verdict.INCONCLUSIVE, Open.SPLIT),
        ([5.0, 85.0] * 3, Verdict.INCONCLUSIVE, Open.INTERVAL),
        ([NAN], Verdict.UNDEFINED, Open.MOST_UNDEFINED),
        ([2.0], Verdict.TOO_FEW, Open.TOO_FEW),
    ],
)
def test_the_rule(means: list[float], verdict: Verdict, why: Open) -> None:
    found = group_verdict(means)
    assert (found.verdict, found.why_open) == (verdict, why)


def test_many_groups_at_once_get_what_each_gets_alone() -> None:
    rng = np.random.default_rng(1)
    for n in (5, 14, 25):
        values = rng.choice([-60.0, 3.0, 45.0, 92.0], (300, 1)) + rng.normal(0, 8, (300, n))
        values[:100] = rng.choice([0.0, 50.0, 100.0], (100, n))
        together = decided(values)
        for row, each in enumerate(values):
            given = [v for v, those in together.items() if those[row]]
            found = group_verdict(each)
            assert given == ([found.verdict] if found.why_open == Open.NO else [])


@pytest.mark.parametrize("mean", [0.0, 5.0, 15.0])
def test_needed_checkpoints_are_the_fewest_that_carry_the_verdict(mean: float) -> None:
    for verdict, value in ((STAYS, mean), (HEALS, 100 - mean), (PARTIAL, 40 + mean)):
        n = checkpoints_needed(value, verdict)
        assert n is not None
        assert group_verdict([value] * n).verdict == verdict
        assert group_verdict([value] * (n - 1)).verdict == Verdict.TOO_FEW
        assert group_verdict([value] * (n - 1)).n_needed == n
    assert checkpoints_needed(20.0, STAYS) is None


def test_no_verdict_turns_on_rounding() -> None:
    for n in (3, 14, 30):
        equal, nearly = [5.0] * n, [5.0] * (n - 1) + [5.0000001]
        first, second = group_verdict(equal), group_verdict(nearly)
        assert (first.verdict, first.why_open) == (second.verdict, second.why_open)
        assert first.interval.low == pytest.approx(second.interval.low, abs=1e-6)
        # As if they lay half a point apart.
        assert first.interval.high - 5.0 == pytest.approx(
            0.5 * stats.t.ppf(0.975, n - 1) / math.sqrt(n)
        )


def test_the_interval_is_students_where_the_spread_is_not_rounding() -> None:
    values = [3.0, 9.0, 4.0, 12.0]
    ours, plain = recovery_interval(values), t_interval(values)
    assert (ours.low, ours.high) == pytest.approx((plain.low, plain.high), rel=1e-12)
    with pytest.warns(TooFewCheckpointsWarning, match="2 checkpoints, at least 3 needed"):
        assert not recovery_interval([1.0, 2.0]).defined
    with pytest.raises(ValueError, match="error is -1; pass a standard error in points"):
        recovery_interval(values, error=-1)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_an_error_common_to_all_checkpoints_is_covered(n: int) -> None:
    """Spread 5 beside a common error of 5: Student's t alone covers 84, 68 and 49 %."""
    rng, groups = np.random.default_rng(n), 4000
    values = 50.0 + rng.normal(0, 5, (groups, 1)) + rng.normal(0, 5, (groups, n))
    covers = {
        error: np.mean(
            [(i := recovery_interval(v, error=error)).low <= 50 <= i.high for v in values]
        )
        for error in (0.0, 5.0)
    }
    assert covers[0.0] < 0.87
    assert 0.94 < covers[5.0] < 0.985  # binomial error 0.35 %; in quadrature is a little too wide


def test_who_is_missing_counts() -> None:
    """Six of ten at 80 % and four that could not be trained: not "heals"."""
    healed = [80.0 + 0.1 * i for i in range(26)]
    means = [*healed, *[NAN] * 4]
    cases = [*healed, *[0.0] * 4], [*healed, *[100.0] * 4]
    found = group_verdict(means, 4 / 30, cases)
    assert (found.verdict, found.why_open, found.n_missing) == (
        Verdict.INCONCLUSIVE, Open.MISSING, 4,
    )  # fmt: skip
    assert group_verdict(healed).verdict == HEALS
    # They would not speak against "irreversible" by not healing, but might have healed.
    stays = [1.0 + 0.1 * i for i in range(20)]
    few = group_verdict([*stays, NAN], 1 / 21, ([*stays, 0.0], [*stays, 100.0]))
    assert (few.verdict, few.why_open) == (Verdict.INCONCLUSIVE, Open.MISSING)
    # One of a hundred overturns nothing.
    stays = [1.0 + 0.01 * i for i in range(99)]
    assert group_verdict([*stays, NAN], 0.01, ([*stays, 0.0], [*stays, 100.0])).verdict == STAYS
    # What the attack did not damage is missing in neither case.
    assert group_verdict([*stays, NAN], 0.01, ([*stays, NAN], [*stays, NAN])).n_missing == 0


def test_most_undefined_is_undefined() -> None:
    assert group_verdict([5.0] * 20 + [NAN] * 20, 0.5).verdict == STAYS
    assert group_verdict([5.0] * 20 + [NAN] * 21, 0.51).verdict == Verdict.UNDEFINED


def test_bad_arguments_are_rejected() -> None:
    for fraction in (-0.1, 1.1, NAN):
        with pytest.raises(ValueError, match=r"undefined_fraction is .*; pass a share in \[0, 1\]"):
            group_verdict([1.0], fraction)
    with pytest.raises(ValueError, match="confidence is 1"):
        group_verdict([1.0], confidence=1.0)
    with pytest.raises(ValueError, match="lengths differ: "):
        group_verdict([1.0, 2.0], worst_case=([1.0], [1.0]))


def test_a_far_outlier_carries_nobody() -> None:
    """A recovery of −1e9 counts as no recovery in the mean of those that stay."""
    found = group_verdict([-1e9] * 3 + [15.0] * 12)
    assert found.verdict == Verdict.INCONCLUSIVE
    mixed = group_verdict([-1000.0, 15.0] * 12)
    assert (mixed.side, mixed.verdict) == (FURTHER, Verdict.INCONCLUSIVE)


def test_no_rule_can_decide_for_less_than_the_smallest_n() -> None:
    """Fourteen are the fewest of which all stay in under 5 % of groups where one of five heals."""
    assert 0.8**13 > 0.05 > 0.8**14
    assert checkpoints_needed(0.0, STAYS) == 14


@pytest.mark.parametrize(
    ("mean", "sd", "verdict"),
    [(5.0, 5.0, STAYS), (5.0, 12.0, STAYS), (90.0, 6.0, HEALS), (45.0, 10.0, PARTIAL),
     (-50.0, 10.0, FURTHER)],
)  # fmt: skip
def test_planned_counts_carry_the_verdict_with_the_promised_probability(mean, sd, verdict) -> None:
    n = counted_checkpoints(mean, sd, verdict)
    values = np.random.default_rng(2).normal(mean, sd, (3000, n))
    # Both conditions at their own quantiles: at least the power, at the price of a few more.
    assert decided(values)[verdict].mean() > 0.79
    assert decided(values[:, : math.ceil(0.7 * n)])[verdict].mean() < 0.85
    assert counted_checkpoints(16.0, 12.0, STAYS) is None  # a third of them heals


@pytest.mark.slow
@pytest.mark.parametrize("name", REGIMES)
def test_false_verdicts_are_rare_in_every_regime(name: str) -> None:
    for n in SIZES:
        # 20,000 groups: Monte-Carlo error 0.15 % at 5 %; three of them.
        assert max(false_rates(name, n, 20_000)) <= 0.05 + 0.0045, n


@pytest.mark.slow
def test_the_documents_table_is_what_the_rule_does() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    rows = [
        line.split("|")[1:-1]
        for line in text.splitlines()
        if re.match(r"\| .* \| [\d.]+ \| ", line)
    ]
    # Other tables of the page have numbers in their second column too.
    known = {name.strip() for name in REGIMES} | {
        f"*{name.strip()}: verdict given*" for name in CLEAR
    }
    documented = {
        (cells[0].strip(), float(cells[1])): cells[2:]
        for cells in rows
        if cells[0].strip() in known and ("→" in cells[2] or cells[0].startswith(" *"))
    }
    for name, (mean, _) in REGIMES.items():
        for n, cell in zip(SIZES, documented[name.strip(), mean], strict=True):
            said = float(cell.split("→")[1])
            assert 100 * max(false_rates(name, n, 20_000)) == pytest.approx(said, abs=0.6)
    for name, (mean, draw) in CLEAR.items():
        for n, cell in zip(
            SIZES, documented[f"*{name.strip()}: verdict given*", mean], strict=True
        ):
            given = max(rates(draw, n, 20_000).values())
            assert 100 * given == pytest.approx(float(cell), abs=1.5)
