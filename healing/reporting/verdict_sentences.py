"""What is said of a group of runs: its verdict with the budget, the healer and the count in it.

The stored verdict is an endpoint; what people read is never the bare word. A rank that did not
come back is "not recovered within B steps by this healer", and "irreversible" only where nothing
that was tried speaks against it; a model heals only where its rank *and* what it knows come back.
"""

from __future__ import annotations

from collections.abc import Sequence

from healing.measurements.recovery import (
    DECIDED,
    FURTHER_BELOW,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.registry import YARDSTICK
from healing.reporting.phrases import (
    LOSS,
    RANK,
    budget,
    count_text,
    duration,
    estimate_text,
    group_name,
)
from healing.statistics.group import GroupSummary
from healing.statistics.heal_runs import SHAM_ENDPOINTS
from healing.statistics.verdicts import MIN_VERDICT_CHECKPOINTS, GroupVerdict, Open

BETWEEN = f"between {IRREVERSIBLE_BELOW:g} and {REVERSIBLE_ABOVE:g} %"
ZONE_NAMES = {
    Verdict.FURTHER: f"under {FURTHER_BELOW:g} %",
    Verdict.IRREVERSIBLE: f"under {IRREVERSIBLE_BELOW:g} %",
    Verdict.PARTIAL: BETWEEN,
    Verdict.REVERSIBLE: f"over {REVERSIBLE_ABOVE:g} %",
}
"""Where a recovery lies."""
OUTCOMES = {
    Verdict.FURTHER: "collapsed further",
    Verdict.IRREVERSIBLE: "not recovered",
    Verdict.PARTIAL: "recovered in part",
    Verdict.REVERSIBLE: f"over {REVERSIBLE_ABOVE:g} % recovered",
}
"""The same of what became of the rank, within a budget."""


def percent(share: float) -> str:
    """A share as ``63 %``; not rounded to nothing or everything."""
    value = 100.0 * share
    return f"{value:.0f} %" if 1.0 <= value <= 99.0 else f"{value:.2g} %"


def budget_text(group: GroupSummary, step: int | None = None) -> str:
    """``60 steps (61,440 tokens)``; without tokens where they are unknown."""
    steps = budget(group) if step is None else step
    if steps is None:
        return "this budget"
    tokens = f" ({duration(steps * group.tokens_per_step)} tokens)" if group.tokens_per_step else ""
    return count_text(steps, "step") + tokens


def count_sentence(found: GroupVerdict) -> str:
    """What the count of checkpoints carries: ``3 of 3 checkpoints under (threshold): up to 63 % of
    others may do otherwise (one-sided 95 %, Clopper–Pearson)``.
    """
    noun = "checkpoint" if found.n == 1 else "checkpoints"
    if found.side is None or found.n_on_side < found.n:
        split = ", ".join(f"{n} {ZONE_NAMES[v]}" for v, n in found.counts.items())
        return f"of {found.n} {noun} {split}"
    return (
        f"{found.n} of {found.n} {noun} {ZONE_NAMES[found.side]}: up to "
        f"{percent(found.others_at_most)} of others may do otherwise (one-sided "
        f"{100 * found.interval.confidence:g} %, Clopper–Pearson)"
    )


def open_because(found: GroupVerdict) -> str:
    """Why a group has no verdict, without a full stop."""
    needed = ""
    if found.n_needed is not None and found.side is not None:
        needed = f" “{OUTCOMES[found.side]}” takes at least {found.n_needed} that agree"
    if found.why_open == Open.TOO_FEW:
        least = f"no verdict is given under {MIN_VERDICT_CHECKPOINTS} checkpoints"
        return f"{least};{needed}" if needed else least
    assert found.side is not None, "a group without a defined recovery is undefined"
    zone = ZONE_NAMES[found.side]
    if found.why_open == Open.COUNT:
        return (
            f"were these to do the opposite, the mean would be {found.worst_mean:.1f} %, no longer "
            f"{zone};{needed}"
        )
    if found.why_open == Open.SPLIT:
        return (
            f"the checkpoints split: {found.n_on_side} of {found.n} are {zone}, and with as many "
            f"others as that allows the mean would be {found.worst_mean:.1f} %"
        )
    if found.why_open == Open.MISSING:
        was, has = ("was", "has") if found.n_missing == 1 else ("were", "have")
        return (
            f"{count_text(found.n_missing, 'checkpoint')} that {was} damaged and {has} no recovery "
            f"would overturn “{zone}” in the worst case"
        )
    interval = found.interval
    crossed = [
        f"{t:g} %"
        for t in (FURTHER_BELOW, IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE)
        if interval.low <= t <= interval.high
    ]
    return f"the interval holds the threshold{'s' * (len(crossed) > 1)} {' and '.join(crossed)}"


def verdict_heading(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """``nano, HAEP: not recovered within 60 steps (61,440 tokens) by this healer``."""
    return f"{group_name(group, groups)}: {verdict_claim(group)}"


def verdict_claim(group: GroupSummary) -> str:
    """The verdict as people read it, with what it holds for."""
    found, within = group.verdicts[RANK], budget_text(group)
    if found.verdict == Verdict.IRREVERSIBLE:
        kept = group.persistence
        if kept is not None and kept.holds:
            return f"irreversible as far as it was tested, {within}"
        return f"not recovered within {within} by this healer"
    if found.verdict == Verdict.REVERSIBLE:
        if heals(group):
            return f"healed within {within}, rank and knowledge"
        return f"rank recovered within {within}, knowledge not shown to be"
    if found.verdict == Verdict.PARTIAL:
        return f"rank recovered in part within {within}"
    if found.verdict == Verdict.FURTHER:
        return f"collapsed further within {within}"
    if found.verdict == Verdict.TOO_FEW:
        if found.side is None or found.n_on_side < found.n:
            return f"too few checkpoints for a verdict after {within}"
        counted = f"{found.n} of {count_text(found.n, 'checkpoint')} {ZONE_NAMES[found.side]}"
        return f"{counted} after {within}, too few for a verdict"
    if found.verdict == Verdict.UNDEFINED:
        return "rank recovery undefined"
    return f"undecided after {within}"


def verdict_cell(group: GroupSummary) -> str:
    """The verdict as tables say it."""
    found, steps = group.verdicts[RANK], budget(group)
    within = "" if steps is None else f" in {count_text(steps, 'step')}"
    if found.verdict == Verdict.IRREVERSIBLE and group.persistence and group.persistence.holds:
        return f"irreversible as far as tested{within}"
    if found.verdict in OUTCOMES:
        healed = found.verdict == Verdict.REVERSIBLE and heals(group)
        return f"{'healed' if healed else OUTCOMES[found.verdict]}{within}"
    if found.verdict == Verdict.TOO_FEW:
        if found.side is None or found.n_on_side < found.n:
            return "too few"
        return f"too few: {found.n} {ZONE_NAMES[found.side]}"
    return "undecided" if found.verdict == Verdict.INCONCLUSIVE else str(found.verdict)


def run_outcome(verdict: Verdict, steps: int) -> str:
    """What became of the rank in one run: ``not recovered within 60 steps``."""
    if verdict not in OUTCOMES:
        return f"rank recovery {verdict}"
    return f"{OUTCOMES[verdict]} within {count_text(steps, 'step')}"


def verdict_reason(group: GroupSummary) -> str:
    """Why the verdict on rank recovery is what it is: one sentence without its full stop."""
    found, steps = group.verdicts[RANK], budget(group)
    if found.verdict == Verdict.UNDEFINED:
        has = "has" if group.n_undefined == 1 else "have"
        return (
            f"{group.n_undefined} of {count_text(group.n_runs, 'run')} {has} no defined rank "
            "recovery"
        )
    within = "" if steps is None else f" after {count_text(steps, 'healing step')}"
    of = "collapsed states of one model, on one probe and corpus"
    estimate = estimate_text(group.intervals[RANK], group.undefined_checkpoints(RANK), of)
    reason = f"mean rank recovery{within} is {estimate}; {count_sentence(found)}"
    if found.verdict in DECIDED:
        return (
            f"{reason}; were these to do the opposite, the mean would still be "
            f"{found.worst_mean:.1f} %"
        )
    return f"{reason}; {open_because(found)}"


def references(group: GroupSummary) -> tuple[str, str]:
    """The endpoints of rank and loss that a model is judged by: against the sham where there is
    one, for fine-tuning moves a healthy model too.
    """
    judged = all(e in group.verdicts and group.verdicts[e].n for e in SHAM_ENDPOINTS)
    return (SHAM_ENDPOINTS[0], SHAM_ENDPOINTS[1]) if judged else (RANK, LOSS)


def beats_scratch(group: GroupSummary) -> bool:
    """Whether the loss is under that of learning from scratch, on average and in every pair of
    equal seed; true where that was not run.
    """
    against = group.scratch
    return against is None or (against.beaten and against.lower == against.pairs)


def heals(group: GroupSummary) -> bool:
    """Whether rank and knowledge both came back: loss, and accuracy where it was measured; and,
    where learning from scratch was run for equal tokens, a loss under that. The untrained model
    itself does not heal, it learns.
    """
    if not beats_scratch(group) or group.role == YARDSTICK:
        return False
    verdicts = [group.verdicts[e] for e in (RANK, *references(group))]
    if "accuracy_top1" in group.panel:
        verdicts.append(group.panel["accuracy_top1"])
    return all(v.verdict == Verdict.REVERSIBLE for v in verdicts)
