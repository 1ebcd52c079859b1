"""Verdicts by budget and measure, and what it takes to call a state irreversible."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from healing.measurements.recovery import Verdict
from healing.statistics.budgets import default_tokens, disagreeing, last_gain, verdicts_by_budget
from tests.statistics.test_summary import make_run, pool

STEPS = (0, 60, 120, 240, 480, 960)
DEFAULT = 60 * 8 * 128
"""Training tokens of nano's default budget."""


def persistent(seed: int, **changes):
    """A state that hardly recovers, healed for 16 times the default tokens by the strongest of ten
    healers, low by every measure.
    """
    rank = (0.0, 1.0, 1.5, 2.0, 2.2, 2.3 + 0.01 * seed)
    low = {"last_block": 3.0, "participation_ratio": 1.0, "effective_rank_energy": 2.0}
    values = {
        "steps": STEPS,
        "trajectory": {"rank_recovery_pct": rank, "loss_recovery_pct": rank},
        "final": {"rank_recovery_pct": rank[-1], "loss_recovery_pct": 0.9 * rank[-1]},
        "tokens_per_step": 1024,
        "panel": low,
        "healers_tried": 10,
    }  # fmt: skip
    return make_run(rank[-1], seed=seed, **(values | changes))


def group_of(**changes):
    return pool([persistent(seed, **changes) for seed in range(20)]).groups[0]


def test_irreversible_takes_everything_at_once() -> None:
    kept = group_of().persistence
    assert (kept.tokens, kept.default_tokens) == (16 * DEFAULT, DEFAULT)
    assert kept.holds
    assert kept.last_gain == pytest.approx(0.1 + 0.01 * 9.5)


@pytest.mark.parametrize(
    ("changes", "lacking"),
    [
        ({"tokens_per_step": 1023}, "long_enough"),
        ({"tokens_per_step": 0}, "long_enough"),
        ({"panel": {"last_block": 25.0, "participation_ratio": 1.0}}, "by_every_measure"),
        ({"healers_tried": 1}, "holds"),
        ({"healers_tried": 0}, "holds"),
        ({"trajectory": {"rank_recovery_pct": (0.0, 1.0, 2.0, 3.0, 4.0, 10.0),
                         "loss_recovery_pct": (0.0,) * 6}}, "levelled_off"),
        ({"final": {"rank_recovery_pct": 2.0, "loss_recovery_pct": 86.0}}, "by_every_measure"),
    ],
)  # fmt: skip
def test_one_thing_that_is_missing_is_enough(changes, lacking) -> None:
    kept = group_of(**changes).persistence
    assert not kept.holds
    assert not getattr(kept, lacking)


def test_the_last_doubling_begins_at_the_last_step_up_to_half() -> None:
    # With nothing measured between 40 and 960 steps the gain is from 40 on: at least as much.
    early = persistent(0, steps=(0, 10, 20, 30, 40, 960))
    assert last_gain([early], "rank_recovery_pct") == pytest.approx(0.1)
    late = persistent(0, steps=(0, 700, 720, 740, 800, 960))
    assert math.isnan(last_gain([late], "rank_recovery_pct"))


def test_only_what_did_not_recover_is_asked() -> None:
    healed = [make_run(90.0 + 0.1 * i, seed=i) for i in range(20)]
    assert pool(healed).groups[0].persistence is None


def test_budgets_are_the_measured_steps_nearest_to_fractions_of_the_window() -> None:
    """Crosses both thresholds on its way: the verdict is a function of the budget."""
    rank = (0.0, 5.0, 30.0, 65.0, 80.0, 95.0)
    runs = [
        persistent(seed, trajectory={"rank_recovery_pct": rank, "loss_recovery_pct": rank})
        for seed in range(20)
    ]
    points = verdicts_by_budget(runs, "rank_recovery_pct", 0.95)
    assert [p.step for p in points] == [120, 240, 480, 960]
    assert [p.tokens for p in points] == [1024 * p.step for p in points]
    assert [p.verdict.interval.point for p in points] == [30.0, 65.0, 80.0, 95.0]
    assert [p.verdict.verdict for p in points] == [
        Verdict.PARTIAL, Verdict.PARTIAL, Verdict.TOO_FEW, Verdict.REVERSIBLE,
    ]  # fmt: skip
    few = verdicts_by_budget(runs[:3], "rank_recovery_pct", 0.95)
    assert {p.verdict.verdict for p in few} == {Verdict.TOO_FEW}


def test_who_is_missing_counts_at_every_budget() -> None:
    nan = (math.nan,) * 3
    lost = [
        make_run(math.nan, seed=90 + i, status="diverged", steps=(0, 10, 20),
                 trajectory={"rank_recovery_pct": nan, "loss_recovery_pct": nan},
                 final={"rank_recovery_pct": math.nan, "loss_recovery_pct": math.nan})
        for i in range(4)
    ]  # fmt: skip
    healed = [make_run(90.0 + 0.1 * i, seed=i) for i in range(20)]
    (group,) = pool([*healed, *lost]).groups
    assert group.verdict == Verdict.INCONCLUSIVE
    assert group.verdicts["rank_recovery_pct"].n_missing == 4
    assert group.by_budget["rank_recovery_pct"][-1].verdict.n_missing == 4
    assert pool(healed).groups[0].verdict == Verdict.REVERSIBLE
    # A rank that the attack raised, or left alone, is nobody's patient.
    for state in ("inflated", "unchanged"):
        unhurt = [
            replace(r, status="ok", spectral_state=state, undefined_reason="no damage")
            for r in lost
        ]
        (group,) = pool([*healed, *unhurt]).groups
        assert group.verdicts["rank_recovery_pct"].n_missing == 0
        assert group.verdict == Verdict.REVERSIBLE
    # A rank that fell, and whose recovery is too uncertain, is.
    unsure = [replace(r, status="ok", undefined_reason="not known") for r in lost]
    assert pool([*healed, *unsure]).groups[0].verdict == Verdict.INCONCLUSIVE


def test_the_error_of_measurement_widens_the_interval() -> None:
    plain = pool([make_run(50.0 + i, seed=i) for i in range(10)]).groups[0]
    known = pool([make_run(50.0 + i, seed=i, rank_recovery_error=3.0) for i in range(10)]).groups[0]
    a, b = (g.intervals["rank_recovery_pct"] for g in (plain, known))
    assert b.high - b.point == pytest.approx(math.hypot(a.high - a.point, 1.959964 * 3.0))
    losses = (g.intervals["loss_recovery_pct"] for g in (plain, known))
    assert len({(i.low, i.high) for i in losses}) == 1


def test_measures_that_lie_elsewhere_disagree() -> None:
    group = group_of(panel={"last_block": 48.0, "participation_ratio": 12.0, "stable_rank": 80.0})
    apart = disagreeing(group.verdicts["rank_recovery_pct"], dict(group.panel))
    assert {m: v.side for m, v in apart.items()} == {
        "last_block": Verdict.PARTIAL, "stable_rank": Verdict.REVERSIBLE,
    }  # fmt: skip
    assert set(group.panel) == {"loss", "last_block", "participation_ratio", "stable_rank"}
    nothing = pool([make_run(math.nan, seed=i, spectral_state="unchanged") for i in range(3)])
    assert disagreeing(nothing.groups[0].verdicts["rank_recovery_pct"], {}) == {}


def test_the_panel_of_a_rank_that_did_not_fall_is_empty() -> None:
    raised = [make_run(50.0, seed=i, spectral_state="inflated", panel={"last_block": 9.0})
              for i in range(3)]  # fmt: skip
    assert set(pool(raised).groups[0].panel) == {"loss"}


def test_default_tokens_are_the_presets() -> None:
    assert default_tokens("nano") == DEFAULT
    assert default_tokens("70m-deduped@step1000") == default_tokens("1b") == 500 * 8 * 128
    assert default_tokens("some-folder-1a2b3c4d") == 500 * 8 * 128


def test_beside_learning_from_scratch() -> None:
    def run(arm: str, seed: int, loss: float, **changes):
        values = {"arm": arm, "final_loss": loss, "tokens_per_step": 1024}
        role = "yardstick" if arm == "untrained" else "treatment"
        return make_run(10.0, seed=seed, role=role, **(values | changes))

    attacked = [run("haep", i, 3.6 + 0.1 * i) for i in range(3)]
    scratch = [run("untrained", i, 3.75) for i in range(3)]
    groups = {g.arm: g for g in pool([*attacked, *scratch]).groups}
    found = groups["haep"].scratch
    assert (found.loss, found.scratch_loss) == (pytest.approx(3.7), pytest.approx(3.75))
    assert (found.pairs, found.lower, found.beaten) == (3, 2, True)
    assert groups["untrained"].scratch is None
    lost = pool([*(replace(r, final_loss=4.0) for r in attacked), *scratch])
    assert not {g.arm: g for g in lost.groups}["haep"].scratch.beaten
    longer = [replace(r, tokens_per_step=2048) for r in scratch]
    assert {g.arm: g for g in pool([*attacked, *longer]).groups}["haep"].scratch is None
