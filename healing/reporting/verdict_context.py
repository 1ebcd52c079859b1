"""What belongs to a verdict: knowledge, budget, other measures, other healers, learning anew."""

from __future__ import annotations

import math
from collections.abc import Sequence

from healing.measurements.recovery import (
    DECIDED,
    IRREVERSIBLE_BELOW,
    PANEL,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.registry import SHAM, YARDSTICK
from healing.reporting.phrases import (
    RANK,
    count_text,
    duration,
    estimate_text,
    group_name,
    half_sentence,
    headline_groups,
    listed,
)
from healing.reporting.verdict_sentences import (
    OUTCOMES,
    ZONE_NAMES,
    beats_scratch,
    heals,
    references,
    verdict_heading,
    verdict_reason,
)
from healing.statistics.budgets import (
    MAX_LAST_GAIN,
    MIN_BUDGETS,
    BudgetPoint,
    Persistence,
    disagreeing,
)
from healing.statistics.checkpoint_estimates import VerdictPlan
from healing.statistics.group import GroupSummary
from healing.statistics.heal_runs import UNIGRAM
from healing.statistics.summary import Summary
from healing.statistics.verdicts import GroupVerdict

MEASURES = {"loss": "loss", **PANEL}
"""Measures of the panel, for people."""
PRIMARY_MEASURE = "the effective rank's mean over blocks"
HEALER_NOTE = (
    "A verdict holds for the healer and the budget that were used: the HAEP states of seed 0 "
    "recovered 22.6 % of their rank on nano and -0.7 % on micro with 60 steps at a learning rate "
    "of 1e-3, and 87.7 % and 65.7 % with 480 steps at 3e-3."
)
"""Measured with ``heal``; README."""


def healer_note(summary: Summary) -> str:
    """What belongs beside verdicts on the embedded models; empty where there are none."""
    embedded = {g.model for g in headline_groups(summary)} & {"nano", "micro"}
    return HEALER_NOTE if embedded else ""


def knowledge_sentence(group: GroupSummary) -> str:
    """Rank and knowledge together, against the sham where there is one; empty without either."""
    rank, loss = references(group)
    if not group.verdicts[loss].n and not group.verdicts[rank].n:
        return ""
    sham = " against the healthy model after the same training (sham)" if rank != RANK else ""
    parts = [
        f"{name} {estimate_text(group.intervals[e], group.undefined_checkpoints(e))}"
        for name, e in (("rank", rank), ("loss", loss))
    ]
    accuracy = group.panel.get("accuracy_top1")
    if accuracy is not None:
        parts.append(f"next-token accuracy {estimate_text(accuracy.interval)}")
    text = f"Recovered{sham}: {listed(parts)}. {_healing(group)}"
    unigram = group.intervals.get(UNIGRAM)
    if unigram is not None and not math.isnan(unigram.point):
        text += (
            f" For comparison, a model that knows only token frequencies scores "
            f"{unigram.point:.1f} % of the loss."
        )
    return text


def _healing(group: GroupSummary) -> str:
    """Whether rank and knowledge came back."""
    rank, loss = (group.verdicts[e] for e in references(group))
    both = f"healing takes rank and knowledge, both over {REVERSIBLE_ABOVE:g} %"
    if group.scratch is not None:
        both += ", and a loss under that of learning from scratch"
    if heals(group):
        return f"Both are back: it heals ({both})."
    back = Verdict.REVERSIBLE
    accuracy = group.panel.get("accuracy_top1")
    knows = [v for v in (loss, accuracy) if v is not None]
    if rank.side == back and all(v.side == back for v in knows) and not beats_scratch(group):
        return (
            "Both came back by their per cents, but the same tokens teach an untrained model as "
            f"much: this is no healing ({both})."
        )
    if rank.side == back and any(v.side not in (back, None) for v in knows):
        return f"The rank came back without the knowledge: this is no healing ({both})."
    if rank.side not in (back, None) and all(v.side == back for v in knows):
        return (
            "What the model knows came back further than the rank: they disagree, and the verdict "
            "is about the rank."
        )
    if rank.side not in (back, None) and any(v.side not in (back, None) for v in knows):
        return f"Neither is back ({both})."
    return f"That it heals is not shown: {both}."


def budget_sentence(group: GroupSummary) -> str:
    """The verdict as a function of the budget; empty where less than two budgets were measured."""
    points = group.by_budget.get(RANK, ())
    points = tuple(p for p in points if p.verdict.n)
    if len(points) < 2:
        return ""
    runs: list[list[BudgetPoint]] = []
    for point in points:
        if runs and _outcome(runs[-1][-1].verdict) == _outcome(point.verdict):
            runs[-1].append(point)
        else:
            runs.append([point])
    parts = []
    for run in runs:
        outcome = _outcome(run[0].verdict)
        low = run[0].verdict.side in (Verdict.IRREVERSIBLE, Verdict.FURTHER)
        shown = run[-1] if low else run[0]
        at = "within" if low and outcome != "undecided" else "at"
        few = shown.verdict.verdict == Verdict.TOO_FEW
        counted = f", in all {shown.verdict.n}, too few for a verdict" if few else ""
        parts.append(f"{outcome} {at} {shown.step} ({shown.verdict.interval.point:.1f} %{counted})")
    return f"By budget, in steps (mean rank recovery): {', '.join(parts)}."


def _outcome(found: GroupVerdict) -> str:
    agree = found.verdict == Verdict.TOO_FEW and found.n_on_side == found.n
    if (found.verdict in OUTCOMES or agree) and found.side is not None:
        return OUTCOMES[found.side]
    return "undecided"


def panel_sentence(group: GroupSummary, besides: Sequence[str] = ()) -> str:
    """By which measures the recovery lies elsewhere than by the primary one; empty without any.

    Args:
        group: With its panel.
        besides: Measures that are spoken of elsewhere.
    """
    primary = group.verdicts[RANK]
    others: dict[Verdict, list[str]] = {}
    for measure, found in disagreeing(primary, dict(group.panel)).items():
        if measure in besides:
            continue
        assert found.side is not None
        point = f"{MEASURES[measure]} ({found.interval.point:.1f} %)"
        others.setdefault(found.side, []).append(point)
    if not others or primary.side is None:
        return ""
    said = "; ".join(f"{ZONE_NAMES[side]} by {listed(names)}" for side, names in others.items())
    return (
        f"{ZONE_NAMES[primary.side]} by {PRIMARY_MEASURE} ({primary.interval.point:.1f} %), but "
        f"{said}"
    )


def lead_sentence(summary: Summary) -> str:
    """First sentence of a report: whether the verdicts depend on the measure; empty where no other
    one was measured.
    """
    shown = [g for g in headline_groups(summary) if g.verdicts[RANK].side is not None and g.panel]
    if not shown:
        return ""
    apart = [(g, said) for g in shown if (said := panel_sentence(g))]
    if not apart:
        return (
            "By every measure that was taken the recoveries lie on the same side of the thresholds."
        )
    groups = "; ".join(f"{group_name(g, summary.groups)} is {said}" for g, said in apart)
    return f"What recovers depends on the measure: {groups}."


def persistence_sentence(group: GroupSummary) -> str:
    """Why a state that did not recover is, or is not, called irreversible; empty for others."""
    kept, found = group.persistence, group.verdicts[RANK]
    if kept is None or found.verdict != Verdict.IRREVERSIBLE:
        return ""
    if kept.holds:
        return (
            f"It is called irreversible because {duration(kept.tokens)} tokens, "
            f"{kept.tokens / kept.default_tokens:.0f} times the default budget, by the strongest "
            f"of {kept.healers_tried} healers leave every measure under {IRREVERSIBLE_BELOW:g} %, "
            f"and the last doubling gained {kept.last_gain:.1f} points."
        )
    return f"It is not called irreversible, which would take {listed(_lacking(kept, group))}."


def _lacking(kept: Persistence, group: GroupSummary) -> list[str]:
    """What is missing for "irreversible"."""
    lacking = []
    if not kept.long_enough:
        times = f"{kept.tokens / kept.default_tokens:.2g} times" if kept.tokens else "unknown"
        lacking.append(f"{MIN_BUDGETS} times the default tokens (here {times})")
    if kept.healers_tried < 2:
        own = f" (here one, {group.healer})" if group.healer else " (here one)"
        lacking.append(f"the strongest of several healers{own}")
    if not kept.measures and not kept.other_measures:
        lacking.append("other measures of the same states (none was taken)")
    elif kept.other_measures:
        names = listed([MEASURES[m] for m in kept.other_measures])
        lacking.append(f"every measure under {IRREVERSIBLE_BELOW:g} % (not {names})")
    if not kept.levelled_off:
        gained = "unknown" if math.isnan(kept.last_gain) else f"here {kept.last_gain:.1f}"
        lacking.append(
            f"a last doubling of the budget that gains under {MAX_LAST_GAIN:g} points ({gained})"
        )
    return lacking


def scratch_sentence(group: GroupSummary) -> str:
    """The loss beside that of learning from scratch at equal tokens; empty without a yardstick."""
    against = group.scratch
    if against is None:
        return ""
    pair = f"{against.lower} of {count_text(against.pairs, 'pair')}"
    text = (
        f"After equal tokens its loss is {against.loss:.2f} nats, that of learning from scratch "
        f"{against.scratch_loss:.2f}; it is lower in {pair} of equal seed"
        if against.pairs
        else f"After equal tokens its loss is {against.loss:.2f} nats, that of learning from "
        f"scratch {against.scratch_loss:.2f}"
    )
    if against.beaten:
        return f"{text}."
    return (
        f"{text}: a collapsed model that does not beat learning from scratch has lost everything."
    )


def unjudged_note(summary: Summary) -> str:
    """Which models are not judged against learning from scratch, and why; empty for none."""
    scratch = {g.model for g in summary.groups if g.role == YARDSTICK}
    shown = [g for g in headline_groups(summary) if g.role not in (YARDSTICK, SHAM)]
    judged = {g.model for g in shown if g.scratch is not None}
    open_ones = [m for m in dict.fromkeys(g.model for g in shown) if m not in judged]
    reasons = {
        "no run of the arm reinitialised": [m for m in open_ones if m not in scratch],
        "the arm reinitialised was healed for other steps or tokens": [
            m for m in open_ones if m in scratch
        ],
    }
    said = [
        f"{listed(models)}: not compared with learning from scratch ({why})."
        for why, models in reasons.items()
        if models
    ]
    return " ".join(said)


def plan_sentence(plan: VerdictPlan) -> str:
    """How many checkpoints would decide an inconclusive verdict."""
    said = OUTCOMES[plan.verdict]
    guess = (
        f"If the observed mean ({plan.mean:.1f} %) and spread (SD {plan.sd:.1f}) were the true "
        "ones,"
    )
    if plan.n_checkpoints is None:
        return f"{guess} no attainable number of checkpoints would give “{said}”."
    return (
        f"{guess} {plan.n_checkpoints} checkpoints in all would give “{said}” with "
        f"{100 * plan.power:g} % probability."
    )


def context_sentences(group: GroupSummary) -> list[str]:
    """What belongs to a verdict: rank and knowledge, budget, measures, and what would decide."""
    plan = group.plans.get(RANK)
    apart = panel_sentence(group, besides=("loss", "accuracy_top1"))
    sentences = [
        knowledge_sentence(group),
        budget_sentence(group),
        f"Measures differ: {apart}." if apart else "",
        persistence_sentence(group),
        scratch_sentence(group),
        half_sentence(group),
        plan_sentence(plan) if plan else "",
    ]
    return [s for s in sentences if s]


def verdict_text(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """Verdict with its reason and what belongs to it; plain text."""
    first = f"{verdict_heading(group, groups)}: {verdict_reason(group)}."
    return " ".join([first, *context_sentences(group)])


def multiplicity_sentence(summary: Summary) -> str:
    """How many verdicts a report gives, and at which level each; empty where it gives none."""
    n = sum(g.verdicts[RANK].verdict in DECIDED for g in summary.groups)
    level = f"{100 * (1.0 - summary.confidence):.2g} %"
    if n == 0:
        return ""
    return (
        f"{count_text(n, 'verdict')} {'is' if n == 1 else 'are'} given here, each with a chance of "
        f"at most {level} to be wrong in either direction on its own; this is not adjusted for "
        f"their number. They speak of further attacks of the same kind on one model, measured on "
        "one probe of one corpus: not of other models, texts or attacks."
    )
