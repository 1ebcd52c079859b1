"""What stands beside a verdict: knowledge, budget, other measures, other healers, learning anew."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from healing.measurements.recovery import Verdict
from healing.reporting.markdown import markdown
from healing.reporting.tables import budget_table, damage_table, panel_table
from healing.reporting.verdict_context import (
    budget_sentence,
    knowledge_sentence,
    lead_sentence,
    multiplicity_sentence,
    panel_sentence,
    persistence_sentence,
    scratch_sentence,
    unjudged_note,
)
from healing.reporting.verdict_sentences import heals, run_outcome, verdict_cell, verdict_claim
from tests.statistics.test_budgets import persistent
from tests.statistics.test_summary import make_run, pool


def group_of(rank: float, loss: float, n: int = 20, **changes):
    """Checkpoints with about these recoveries of rank and loss."""
    runs = [
        make_run(
            rank + 0.01 * i, seed=i,
            **({"final": {"rank_recovery_pct": rank + i / 100, "loss_recovery_pct": loss + i / 100},
                "tokens_per_step": 1024} | changes),
        )
        for i in range(n)
    ]  # fmt: skip
    return pool(runs).groups[0]


@pytest.mark.parametrize(
    ("rank", "loss", "said", "claim"),
    [
        (90.0, 92.0, "Both are back: it heals", "healed within 20 steps (20,480 tokens), rank and"),
        (90.0, 45.0, "The rank came back without the knowledge: this is no healing",
         "rank recovered within 20 steps (20,480 tokens), knowledge not shown to be"),
        (5.0, 92.0, "What the model knows came back further than the rank", "not recovered within"),
        (5.0, 10.0, "Neither is back", "not recovered within 20 steps (20,480 tokens) by this"),
        (40.0, 45.0, "Neither is back", "rank recovered in part within 20 steps"),
    ],
)  # fmt: skip
def test_healing_takes_rank_and_knowledge(rank, loss, said, claim) -> None:
    group = group_of(rank, loss)
    assert said in knowledge_sentence(group)
    assert claim in verdict_claim(group)
    assert heals(group) == (min(rank, loss) > 80)


def test_three_checkpoints_do_not_show_that_it_heals() -> None:
    few = group_of(90.0, 92.0, n=3)
    assert not heals(few)
    assert "That it heals is not shown" in knowledge_sentence(few)


def test_the_sham_is_the_reference_where_there_is_one() -> None:
    sham = {"rank_recovery_pct": 90.0, "loss_recovery_pct": 92.0, "rank_recovery_sham_pct": 95.0}
    low, high = ({**sham, "loss_recovery_sham_pct": v} for v in (60.0, 96.0))
    for final, answer in ((low, False), (high, True)):
        group = group_of(90.0, 92.0, final=final)
        assert heals(group) == answer
        said = knowledge_sentence(group)
        assert said.startswith("Recovered against the healthy model after the same training (sham)")
        assert f"loss {final['loss_recovery_sham_pct']:.1f} %" in said


def test_accuracy_counts_where_it_was_measured() -> None:
    assert heals(group_of(90.0, 92.0, panel={"accuracy_top1": 91.0}))
    blind = group_of(90.0, 92.0, panel={"accuracy_top1": 30.0})
    assert not heals(blind)
    assert "next-token accuracy 30.0 %" in knowledge_sentence(blind)
    assert "without the knowledge" in knowledge_sentence(blind)


def test_the_verdict_is_told_as_a_function_of_the_budget() -> None:
    rank = (0.0, 5.0, 30.0, 75.0, 92.0, 95.0)
    runs = [
        persistent(i, trajectory={"rank_recovery_pct": rank, "loss_recovery_pct": rank})
        for i in range(20)
    ]
    said = budget_sentence(pool(runs).groups[0])
    assert said == (
        "By budget, in steps (mean rank recovery): recovered in part at 120 (30.0 %), "
        "over 70 % recovered at 240 (75.0 %, in all 20, too few for a verdict)."
    )
    steps = (0, 15, 30, 60, 120, 480)
    low = (0.0, 1.0, 2.0, 5.0, 12.0, 45.0)
    runs = [
        persistent(i, steps=steps, trajectory={"rank_recovery_pct": low, "loss_recovery_pct": low})
        for i in range(30)
    ]
    assert budget_sentence(pool(runs).groups[0]) == (
        "By budget, in steps (mean rank recovery): not recovered within 120 (12.0 %, in all "
        "30, too few for a verdict), recovered in part at 480 (45.0 %)."
    )


def test_measures_that_disagree_stand_in_the_first_sentence() -> None:
    panel = {"last_block": 48.0, "participation_ratio": 3.0, "stable_rank": 40.0}
    group = group_of(5.0, 10.0, panel=panel)
    assert panel_sentence(group) == (
        "under 20 % by the effective rank's mean over blocks (5.1 %), but between 20 and 70 % by "
        "last block (48.0 %) and stable rank (40.0 %)"
    )
    summary = pool([make_run(5.0, seed=i, panel=panel) for i in range(20)])
    first = markdown(summary).splitlines()[2]
    assert first.startswith("What recovers depends on the measure: nano, HAEP is under 20 % by")
    assert "over 70 % by loss" in first
    agreed = pool([persistent(i) for i in range(20)])
    assert lead_sentence(agreed).startswith("By every measure that was taken")
    assert lead_sentence(pool([])) == ""


def test_irreversible_is_said_only_where_nothing_speaks_against_it() -> None:
    (group,) = pool([persistent(i) for i in range(20)]).groups
    assert (
        verdict_claim(group) == "irreversible as far as it was tested, 960 steps (983,040 tokens)"
    )
    assert verdict_cell(group) == "irreversible as far as tested in 960 steps"
    assert "16 times the default budget, by the strongest of 10 healers" in persistence_sentence(
        group
    )
    short = pool([persistent(i, tokens_per_step=512, healers_tried=0, healer="AdamW at 0.001",
                             panel={"last_block": 55.0}) for i in range(20)]).groups[0]  # fmt: skip
    assert verdict_claim(short) == "not recovered within 960 steps (491,520 tokens) by this healer"
    assert persistence_sentence(short) == (
        "It is not called irreversible, which would take 16 times the default tokens (here 8 "
        "times), the strongest of several healers (here one, AdamW at 0.001) and every measure "
        "under 20 % (not last block)."
    )
    rising = {"rank_recovery_pct": (0.0, 1.0, 2.0, 3.0, 4.0, 12.0), "loss_recovery_pct": (0.0,) * 6}
    late = pool([persistent(i, trajectory=rising, panel={}) for i in range(20)]).groups[0]
    assert "a last doubling of the budget that gains under 5 points (here 8.0)" in (
        persistence_sentence(late)
    )
    assert persistence_sentence(group_of(90.0, 92.0)) == ""


def test_no_text_calls_one_budget_irreversible() -> None:
    summary = pool([make_run(2.0 + 0.01 * i, seed=i) for i in range(20)])
    assert summary.groups[0].verdict == Verdict.IRREVERSIBLE
    text = markdown(summary).replace("is not called irreversible", "")
    assert "irreversible" not in text.lower()
    assert "pathology" not in text.lower()


def test_learning_from_scratch_is_the_yardstick_from_below() -> None:
    def summary(loss: float):
        runs = [make_run(5.0, seed=i, final_loss=loss, tokens_per_step=9) for i in range(3)]
        scratch = [
            make_run(5.0, seed=i, arm="untrained", role="yardstick", final_loss=4.66,
                     tokens_per_step=9, checkpoint=f"u{i}")
            for i in range(3)
        ]  # fmt: skip
        return {g.arm: g for g in pool([*runs, *scratch]).groups}["haep"]

    assert scratch_sentence(summary(3.6)) == (
        "After equal tokens its loss is 3.60 nats, that of learning from scratch 4.66; it is lower "
        "in 3 of 3 pairs of equal seed."
    )
    lost = scratch_sentence(summary(4.7))
    assert "0 of 3 pairs" in lost
    assert lost.endswith("does not beat learning from scratch has lost everything.")
    assert scratch_sentence(group_of(5.0, 9.0)) == ""


@pytest.mark.parametrize(
    ("scratch_losses", "answer"),
    [((4.7,) * 20, True), ((3.4,) * 20, False), ((3.4, *(4.7,) * 19), False)],
)
def test_healing_takes_a_loss_under_that_of_learning_from_scratch(scratch_losses, answer) -> None:
    """On average and in every pair: twenty checkpoints over 80 % of rank and loss end at 3.6."""
    runs = [make_run(90.0, seed=i, final_loss=3.6, tokens_per_step=9) for i in range(20)]
    scratch = [
        make_run(90.0, seed=i, arm="untrained", role="yardstick", final_loss=loss,
                 tokens_per_step=9, checkpoint=f"u{i}")
        for i, loss in enumerate(scratch_losses)
    ]  # fmt: skip
    groups = {g.arm: g for g in pool([*runs, *scratch]).groups}
    assert heals(groups["haep"]) is answer
    assert heals(pool(runs).groups[0])
    assert not heals(groups["untrained"])
    said = knowledge_sentence(groups["haep"])
    if answer:
        assert (
            "Both are back: it heals (healing takes rank and knowledge, both over 70 %, and a"
            in (said)
        )
    else:
        assert "the same tokens teach an untrained model as much: this is no healing" in said
        assert verdict_claim(groups["haep"]).endswith("knowledge not shown to be")


def test_what_is_not_judged_against_from_scratch_is_said_once_per_model() -> None:
    runs = [make_run(90.0, seed=i, final_loss=3.6, tokens_per_step=9, model=m, checkpoint=f"{m}{i}")
            for i in range(5) for m in ("nano", "micro", "70m")]  # fmt: skip
    scratch = [
        make_run(90.0, seed=i, model=model, arm="untrained", role="yardstick", final_loss=4.0,
                 tokens_per_step=tokens, checkpoint=f"{model}u{i}")
        for i in range(2) for model, tokens in (("nano", 9), ("micro", 18))
    ]  # fmt: skip
    summary = pool([*runs, *scratch])
    text = unjudged_note(summary)
    assert text == (
        "70m: not compared with learning from scratch (no run of the arm reinitialised). micro: "
        "not compared with learning from scratch (the arm reinitialised was healed for other steps "
        "or tokens)."
    )
    assert markdown(summary).count("not compared with learning from scratch") == 2
    assert unjudged_note(pool([])) == ""


def test_the_number_of_verdicts_and_what_they_are_about_is_said() -> None:
    summary = pool([make_run(2.0 + 0.01 * i, seed=i) for i in range(20)])
    said = multiplicity_sentence(summary)
    assert said.startswith("1 verdict is given here, each with a chance of at most 5 %")
    assert "not of other models, texts or attacks" in said
    assert multiplicity_sentence(pool([make_run(2.0)])) == ""


def test_tables_hold_every_budget_measure_and_damage() -> None:
    runs = [
        replace(persistent(i), start_loss=20.0, weight_change=1.25, rank_reduction_pct=38.5)
        for i in range(3)
    ]
    summary = pool(runs)
    assert [row[3] for row in budget_table(summary).rows if row[2] == "rank"] == [
        "120", "240", "480", "960",
    ]  # fmt: skip
    names = [row[2] for row in panel_table(summary).rows]
    assert names == [
        "effective rank's mean over blocks", "loss", "last block", "participation ratio",
        "entropy of σ²",
    ]  # fmt: skip
    (damage,) = damage_table(summary).rows
    assert damage == ("nano", "HAEP", "38.5", "20.00", "–", "1.25")
    nothing = pool([make_run(math.nan, seed=i) for i in range(3)])
    assert damage_table(nothing).rows == ()


def test_one_run_in_words() -> None:
    assert run_outcome(Verdict.IRREVERSIBLE, 60) == "not recovered within 60 steps"
    assert run_outcome(Verdict.UNDEFINED, 60) == "rank recovery undefined"
