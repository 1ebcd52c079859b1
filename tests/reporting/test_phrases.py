"""Sentences: each verdict says what its interval says, and nothing that was not measured."""

from __future__ import annotations

import math

import numpy as np
import pytest

from healing.reporting.contrasts import p_text
from healing.reporting.html import render
from healing.reporting.markdown import markdown
from healing.reporting.phrases import (
    asymptote_texts,
    count_text,
    estimate_text,
    half_sentence,
    headline_groups,
    listed,
    median_text,
    minimum_text,
    percent_text,
    steps_text,
    time_text,
)
from healing.reporting.tables import asymptote_table, plan_table
from healing.reporting.verdict_context import context_sentences, plan_sentence, verdict_text
from healing.reporting.verdict_sentences import verdict_heading, verdict_reason
from healing.statistics.checkpoint_estimates import CheckpointTrajectory
from healing.statistics.fits.asymptotes import fit_asymptotes
from healing.statistics.intervals import Interval
from tests.summaries import STEPS, degenerate, pool, realistic, simulated_run


def group_of(finals: list[float], loss: float = 90.0):
    """One HAEP group with these final rank recoveries."""
    rng, runs = np.random.default_rng(0), []
    for seed, final in enumerate(finals):
        run = simulated_run(rng, "nano", "haep", seed, final, loss)
        runs.append(
            run.__class__(**{**run.__dict__, "final": {**run.final, "rank_recovery_pct": final}})
        )
    return pool(runs).groups[0]


@pytest.mark.parametrize(
    ("finals", "heading", "reason"),
    [
        ([1.0, 2.0, 3.0] * 7, "not recovered within 60 steps by this healer",
         "21 of 21 checkpoints under 20 %: up to 13 % of others may do otherwise (one-sided 95 %, "
         "Clopper–Pearson); were these to do the opposite, the mean would still be 15.0 %"),
        ([90.0, 91.0, 92.0] * 7, "healed within 60 steps, rank and knowledge", "still be 78.9 %"),
        ([40.0, 41.0, 42.0] * 3, "rank recovered in part within 60 steps", "still be 57.7 %"),
        ([-80.0, -90.0] * 7, "collapsed further within 60 steps", "14 checkpoints under -20 %"),
        ([1.0, 2.0, 3.0], "3 of 3 checkpoints under 20 % after 60 steps, too few for a verdict",
         "3 of 3 checkpoints under 20 %: up to 63 % of others may do otherwise (one-sided 95 %, "
         "Clopper–Pearson); no verdict is given under 5 checkpoints; “not recovered” takes at "
         "least 15 that agree"),
        ([2.0, 5.0, 2.0] * 3, "9 of 9 checkpoints under 20 % after 60 steps, too few for a verdict",
         "were these to do the opposite, the mean would be 30.5 %, no longer under 20 %; “not "),
        ([5.0, 45.0, 85.0], "too few checkpoints for a verdict after 60 steps",
         "of 3 checkpoints 1 under 20 %, 1 between 20 and 70 %, 1 over 70 %; no verdict is given"),
        ([40.0, 41.0], "2 of 2 checkpoints between 20 and 70 % after 60 steps, too few", ""),
        ([40.0], "1 of 1 checkpoint between 20 and 70 % after 60 steps, too few", ""),
        ([18.0, 20.0, 23.0] * 2, "undecided after 60 steps", "holds the threshold 20 %"),
        ([64.0, 70.0, 75.0] * 2, "undecided after 60 steps", "holds the threshold 70 %"),
        ([5.0, 45.0, 85.0] * 2, "undecided", "holds the thresholds 20 % and 70 %"),
        ([2.0] * 19 + [95.0], "undecided",
         "the checkpoints split: 19 of 20 are under 20 %, and with as many others as that allows"),
        ([40.0, 40.0, 40.0] * 3, "rank recovered in part within 60 steps", ""),
        ([math.nan, math.nan, 40.0], "rank recovery undefined", "2 of 3 runs have no defined rank"),
        ([math.nan], "rank recovery undefined", "1 of 1 run has no defined rank recovery"),
    ],
)  # fmt: skip
def test_verdict_and_reason(finals, heading, reason) -> None:
    group = group_of(finals)
    assert verdict_heading(group, [group]).startswith(f"nano, HAEP: {heading}")
    assert reason in verdict_reason(group)
    full = verdict_heading(group, [group])
    assert verdict_text(group, [group]).startswith(f"{full}: {verdict_reason(group)}.")


def test_the_budget_is_named() -> None:
    assert f"after {STEPS[-1]} healing steps" in verdict_reason(group_of([1.0, 2.0, 3.0]))


def test_half_recovery_in_words() -> None:
    rng = np.random.default_rng(0)
    slow, fast = (
        pool([simulated_run(rng, "nano", "haep", s, rank, 90.0) for s in range(4)]).groups[0]
        for rank in (20.0, 90.0)
    )
    assert half_sentence(slow).startswith(
        "Half of the damage to the rank was repaired in 0 of 4 checkpoints, so"
    )
    assert half_sentence(fast).startswith(
        "Half of the damage to the rank was repaired in 4 of 4 checkpoints; the median"
    )
    assert half_sentence(group_of([math.nan])) == ""


def test_what_is_not_decided_says_what_would_decide() -> None:
    group = group_of([38.0, 40.5, 45.0])
    needed = group.plans["rank_recovery_pct"].n_checkpoints
    assert (
        f" {needed} checkpoints in all would give “recovered in part” with 80 %"
        in context_sentences(group)[-1]
    )
    assert (len(plan_table(pool([])).header), plan_table(pool([])).rows) == (6, ())
    out_of_reach = group_of([0.0, 140.001]).plans["rank_recovery_pct"]
    assert "no attainable number of checkpoints" in plan_sentence(out_of_reach)


def test_fits_in_words() -> None:
    found = group_of([math.nan]).asymptotes["rank_recovery_pct"]
    assert asymptote_texts(found) == ("undefined", "undefined")
    groups = realistic().groups
    texts = {asymptote_texts(g.asymptotes["rank_recovery_pct"]) for g in groups}
    open_ones = "not determined by this budget"
    assert (f"{open_ones} (6 measurements, at least 12 needed)", open_ones) in texts
    steps = tuple(range(0, 241, 10))
    paths = [
        CheckpointTrajectory(steps, (tuple(a * -math.expm1(-t / 20.0) for t in steps),))
        for a in (49.0, 50.0, 51.0)
    ]
    limit, half_life = asymptote_texts(fit_asymptotes(paths, 0.95))
    assert limit.startswith("50.0 [47")
    assert half_life.startswith("13.9")  # 20 ln 2
    assert all(len(row) == 6 for row in asymptote_table(realistic()).rows)


def test_headlines_are_haeps_or_all() -> None:
    assert {g.arm for g in headline_groups(realistic())} == {"haep"}
    rng = np.random.default_rng(0)
    alone = pool([simulated_run(rng, "nano", "spectral", 0, 5.0, 50.0)])
    assert [g.arm for g in headline_groups(alone)] == ["spectral"]
    assert headline_groups(degenerate()["nothing"]) == []


def test_numbers_in_words() -> None:
    assert estimate_text(Interval(1.0, 2.0, 3.0, 3, "t", 0.9)) == (
        "2.0 % (90 % interval 1.0 to 3.0 %, n\u00a0=\u00a03)"
    )
    assert estimate_text(Interval(math.nan, 2.0, math.nan, 2, "t")) == (
        "2.0 % (no interval, n\u00a0=\u00a02)"
    )
    assert estimate_text(Interval(math.nan, math.nan, math.nan, 0, "t")) == "undefined"
    assert steps_text(Interval(7.96, 8.0, math.inf, 3, "t")) == "8 [7.96, ∞] steps"
    assert steps_text(Interval(math.nan, 8.0, math.nan, 2, "t")) == "8 steps [no interval]"
    assert steps_text(Interval(math.nan, math.nan, math.nan, 0, "t")) == "undefined"
    assert time_text(Interval(8192.4, 12_800, math.inf, 9, "t"), "tokens") == (
        "12,800 [8,192, ∞] tokens"
    )
    unreached = Interval(30.0, math.nan, math.inf, 4, "t")
    assert median_text(unreached) == "not reached [30, ∞]"
    assert median_text(Interval(math.nan, math.nan, math.nan, 4, "t")) == "not reached"
    assert median_text(Interval(math.nan, math.nan, math.nan, 0, "t")) == "undefined"
    assert estimate_text(Interval(math.nan, 2.0, math.nan, 2, "t"), 1) == (
        "2.0 % (no interval, n\u00a0=\u00a02, 1 checkpoint undefined)"
    )
    assert [p_text(p) for p in (0.0004, 0.0123, 0.1, 0.456)] == [
        "p < 0.001", "p = 0.012", "p = 0.10", "p = 0.46",
    ]  # fmt: skip
    assert (count_text(1, "run"), count_text(0, "run")) == ("1 run", "0 runs")
    assert (percent_text(math.nan), percent_text(1.25)) == ("undefined", "1.2 %")
    assert [listed(list(parts)) for parts in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]


def test_verdicts_on_embedded_models_come_with_what_a_stronger_healer_did() -> None:
    rng = np.random.default_rng(5)
    ours = pool([simulated_run(rng, "nano", "haep", s, 20.0, 90.0) for s in range(3)])
    others = pool([simulated_run(rng, "70m", "haep", s, 20.0, 90.0) for s in range(3)])
    for written in (markdown, lambda summary: render(summary, {})):
        assert "87.7 %" in written(ours)
        assert "87.7 %" not in written(others)


def test_a_states_answer_comes_with_what_can_be_gained_from_there() -> None:
    numbers = {
        "least_gain": -0.00115,
        "most_gain": 0.0273,
        "best_probe_loss_drop": -0.0226,
        "best_probe_loss_drop_error": 0.0064,
    }
    assert minimum_text("healthy", numbers, "undetermined") == (
        "healthy undetermined (a step along the gradient gains -0.0011 to 0.027 nats; descent, "
        "held-out: -0.023 ± 0.006 nats)"
    )
    assert minimum_text("healed", {}, "undetermined") == (
        "healed undetermined (a step along the gradient gains undefined; descent, held-out: not "
        "tried)"
    )
