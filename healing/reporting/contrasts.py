"""What a summary says of the planned contrasts, in sentences: the treatment against controls."""

from __future__ import annotations

import math
from collections.abc import Sequence

from healing.config.arm_tags import arm_label, arms_of
from healing.registry import CONTROL, DAMAGE_CONTROL
from healing.reporting.phrases import count_text, interval_text, listed
from healing.statistics.contrasts.catalyst import CatalystAnswer, Special
from healing.statistics.contrasts.family import EndpointComparison
from healing.statistics.contrasts.plan import PLAN, Contrast, Kind, Pair
from healing.statistics.group import Damage
from healing.statistics.summary import Summary
from healing.statistics.survival import LogRankTest

TITLE = "Contrasts: is it the treatment, or any damage?"
SHORT = {"rank_recovery_pct": "rank", "loss_recovery_pct": "loss"}
EQUAL = {
    "norm": "equal weight change",
    "loss": "equal loss (damage-matched)",
    "rank": "equal effective rank (damage-matched)",
    "rank+loss": "equal effective rank and loss (damage-matched)",
    "scale": "a fixed scale (not matched)",
}
STATEMENTS = {
    "superior": "{0} damage recovers more than {1} damage (superior)",
    "inferior": "{0} damage recovers less than {1} damage (inferior)",
    "equivalent": "Both recover alike within 10 points (equivalent)",
}


def kind_title(kind: Kind, treatment: str) -> str:
    """``Primary: HAEP against the same fine-tuning without HAEP's idea``."""
    return f"{kind.rank.capitalize()}: {treatment} against {kind.about.format(treatment)}"


def _difference(endpoint: EndpointComparison) -> str:
    interval = endpoint.superiority.interval
    text = f"{SHORT[endpoint.endpoint]} recovery {interval_text(interval)}"
    if math.isnan(interval.point):
        return text
    undefined = f", {endpoint.n_undefined} undefined" if endpoint.n_undefined else ""
    return f"{text} points ({count_text(interval.n, 'pair')}{undefined})"


def comparison_sentence(found: Contrast) -> str:
    """Recovery after the last step, what it decides, and how damaged both were, in one line."""
    comparison, pair = found.comparison, found.pair
    said = STATEMENTS.get(comparison.statement, "").format(pair.treatment.label, pair.control.label)
    matched = ""
    if pair.kind.role == DAMAGE_CONTROL:
        matched = f" of {EQUAL.get(pair.control.noise_match, 'unknown match')}"
    parts = [
        f"{pair.model}, {pair.kind.rank}: {pair.treatment.label} minus {pair.control.label}"
        f"{matched}, paired by seed: {'; '.join(map(_difference, comparison.endpoints))}.",
        f"{said}{_p_values(found)}." if said else f"{undecided_text(found)}.",
        start_sentence(found),
    ]
    return " ".join(filter(None, parts))


def _p_values(found: Contrast) -> str:
    """The adjusted p values behind a statement."""
    alike = found.comparison.statement == "equivalent"
    ps = [
        f"{SHORT[e.endpoint]} {p_text(e.p_alike_adjusted if alike else e.p_adjusted)}"
        for e in found.comparison.endpoints
    ]
    return f"; adjusted {', '.join(ps)}"


def undecided_text(found: Contrast) -> str:
    """What a count of pairs says where nothing is decided, and how many pairs would decide."""
    counts = [
        f"{SHORT[e.endpoint]}: {_count(e, found)}"
        for e in found.comparison.endpoints
        if e.n_more or e.n_less
    ]
    statements = {e.statement for e in found.comparison.endpoints}
    apart = statements >= {"superior", "inferior"}
    text = "Rank and loss contradict each other" if apart else "The data do not decide"
    return "; ".join([f"{text} (inconclusive)", *counts])


def _count(endpoint: EndpointComparison, found: Contrast) -> str:
    """``HAEP recovers less in 3 of 3 pairs (at least 21 like these would decide)``."""
    n = sum(math.isfinite(d) for d in endpoint.differences)
    less = endpoint.n_less >= endpoint.n_more
    k, word = (endpoint.n_less, "less") if less else (endpoint.n_more, "more")
    text = f"{found.pair.treatment.label} recovers {word} in {k} of {count_text(n, 'pair')}"
    needed, notes = found.needed[endpoint.endpoint], []
    if needed.agreeing is not None and needed.agreeing > n:
        notes.append(f"a difference of this size takes at least {needed.agreeing}")
    if needed.alike is not None:
        notes.append(
            f"to tell within ±\u00a0{endpoint.equivalence.margin:g} points takes about "
            f"{needed.alike}, {needed.by_spread} by their spread alone"
        )
    return f"{text} ({'; '.join(notes)})" if notes else text


def start_sentence(found: Contrast) -> str:
    """How damaged both were when healing began; empty where nothing of it is known."""
    own, other = found.starts
    rows = (
        ("weight change", "weight_change", 2, ""),
        ("loss", "start_loss", 1, " nats"),
        ("rank lowered by", "rank_reduction_pct", 1, " %"),
    )
    parts = [
        f"{name} {getattr(own, field):.{digits}f} and {getattr(other, field):.{digits}f}{unit}"
        for name, field, digits, unit in rows
        if _known(own, other, field)
    ]
    if not parts:
        return ""
    names = f"{found.pair.treatment.label} and {found.pair.control.label}"
    return f"When healing began ({names}): {', '.join(parts)}."


def _known(own: Damage, other: Damage, field: str) -> bool:
    return math.isfinite(getattr(own, field)) and math.isfinite(getattr(other, field))


def p_text(p: float) -> str:
    """``p = 0.10``, ``p < 0.001``."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}" if p < 0.1 else f"p = {p:.2f}"


def _half_recovery_test(endpoint: str, test: LogRankTest, pair: Pair) -> str:
    counts = f"{test.n[0]} and {test.n[1]} checkpoints"
    if math.isnan(test.p_value):
        return f"{SHORT[endpoint]} undefined ({counts} with a time)"
    sooner = f"{pair.treatment.label if test.statistic > 0.0 else pair.control.label} sooner"
    kind = "exact" if test.method == "exact permutation" else "asymptotic"
    return (
        f"{SHORT[endpoint]} z = {test.statistic:.2f}, {kind} {p_text(test.p_value)} ({sooner}; "
        f"{counts}, {test.n_events[0]} and {test.n_events[1]} of them reached half)"
    )


def half_recovery_sentence(found: Contrast) -> str:
    """Log-rank tests of the half-recovery times, in one line."""
    pair = found.pair
    said = "; ".join(
        _half_recovery_test(endpoint, test, pair)
        for endpoint, test in found.half_recovery_test.items()
    )
    return (
        f"{pair.model}: time until half of the damage is repaired (half-recovery time), "
        f"{pair.treatment.label} against {pair.control.label}, log-rank test: {said}."
    )


def family_sentence(summary: Summary) -> str:
    """What is adjusted together, in one sentence; empty without contrasts."""
    sizes = {c.pair.kind.family: c.comparison.n_family for c in summary.contrasts}
    if not sizes:
        return ""
    counts = listed([f"{n} tests of {family} contrasts" for family, n in sizes.items()])
    level = f"{100 * (1.0 - summary.confidence):.2g} %"
    return (
        "Statements take the spread of the pairs and their count (what further pairs that differ "
        "by 100 points the other way would make of the mean), and are adjusted (Holm) over all "
        f"models, arms and endpoints: over {counts}, each with a chance of at most {level} of any "
        "false “more” or “less”, and of any false “alike”. Secondary contrasts answer no primary "
        "question; intervals are of single contrasts and not adjusted."
    )


def sections(summary: Summary) -> list[tuple[str, list[str]]]:
    """Kind by kind, in the order of the plan: heading and sentences."""
    found = []
    for kind in PLAN:
        own = [c for c in summary.contrasts if c.pair.kind is kind]
        if own:
            treatments = {c.pair.treatment.label for c in own}
            title = kind_title(kind, treatments.pop() if len(treatments) == 1 else "the treatment")
            said = [s for c in own for s in (comparison_sentence(c), half_recovery_sentence(c))]
            found.append((title, said))
    return found


def lead_sentences(summary: Summary) -> list[str]:
    """First among the contrasts: whether the catalyst is special, then what is adjusted."""
    said = [catalyst_sentence(answer) for answer in summary.catalyst]
    return [*said, *filter(None, [family_sentence(summary)])]


def comparison_gaps(summary: Summary) -> list[str]:
    """Arms that were run and are not compared, and why, one line each."""
    return [
        f"{gap.pair.model}: {gap.pair.treatment.label} and {gap.pair.control.label} are not "
        f"compared ({gap.pair.kind.rank}): {gap.why}."
        for gap in summary.gaps
    ]


def catalyst_sentence(answer: CatalystAnswer) -> str:
    """Is the catalyst special, in healing and as an attack, in one or two sentences."""
    healing, attack = _healing_text(answer), _attack_text(answer)
    gaps = [f"{g.pair.control.label} ({g.why})" for g in answer.gaps]
    left_out = f" Not compared: {'; '.join(gaps)}." if gaps else ""
    return f"{answer.pair.model}: {healing}.{f' {attack}.' if attack else ''}{left_out}"


def _healing_text(answer: CatalystAnswer) -> str:
    own = answer.pair.treatment.label
    what = f"{own}'s catalyst"
    if answer.healing == Special.NOT_COMPARED:
        controls = listed([arm_label(arm) for arm in arms_of(CONTROL)])
        return (
            f"whether {what} is special is not known, since it was not compared with the same "
            f"fine-tuning without it ({controls})"
        )
    names = listed(_labels(answer.contrasts))
    if answer.healing in (Special.LESS, Special.MORE):
        word = "less" if answer.healing == Special.LESS else "more"
        both = "both " if len(answer.contrasts) == 2 else ""
        return (
            f"{what} is special in healing: {own} damage heals {word} than that of {both}{names} "
            f"({_pairs_text(answer.contrasts)})"
        )
    parts = [
        f"{_RELATIONS[statement]} {listed(_labels(having))} ({_pairs_text(having)})"
        for statement in _RELATIONS
        if (having := [c for c in answer.contrasts if c.comparison.statement == statement])
    ]
    if answer.healing == Special.NOT:
        alike = [c for c in answer.contrasts if c.comparison.statement == "equivalent"]
        if len(alike) == len(answer.contrasts):
            recover = "recover" if len(alike) > 1 else "recovers"
            return (
                f"{what} is not special in healing: {names} {recover} alike within 10 points "
                f"({_pairs_text(alike)})"
            )
        return f"{what} is not special in healing: its damage recovers {', '.join(parts)}"
    needed = [n.alike for c in answer.contrasts for n in c.needed.values() if n.alike is not None]
    takes = f"; ± 10 points need about {max(needed)}" if needed else ""
    why = f"its damage recovers {', '.join(parts)}"
    if len(parts) == 1:
        why = f"{_pairs_text(answer.contrasts)} against {names} do not decide"
    return f"{what} is not shown to be special in healing: {why}{takes}"


_RELATIONS = {
    "inferior": "less than that of",
    "superior": "more than that of",
    "equivalent": "alike within 10 points with that of",
    "inconclusive": "undecidedly against that of",
}


def _labels(contrasts: Sequence[Contrast]) -> list[str]:
    return [c.pair.control.label for c in contrasts]


def _pairs_text(contrasts: Sequence[Contrast]) -> str:
    """``10 pairs``, or ``9 and 10 pairs``; pairs of the rank, else of the loss."""
    counts = [max(e.superiority.interval.n for e in c.comparison.endpoints) for c in contrasts]
    if len(set(counts)) == 1:
        return count_text(counts[0], "pair") + (" each" if len(counts) > 1 else "")
    return f"{listed([str(n) for n in counts])} pairs"


def _attack_text(answer: CatalystAnswer) -> str:
    """Whether the attack is special, by the criterion of docs/method.md; empty where unknown."""
    known = [c for c in answer.contrasts if c.reach.pairs]
    if not known:
        return ""
    own, reached = answer.pair.treatment.label, [c for c in known if c.reach.reached]
    parts = [
        f"{c.pair.control.label} lower{'' if c.pair.control.label.endswith('s') else 's'} the rank "
        f"by {c.reach.control:.0f} % where {own} does by {c.reach.treatment:.0f} % (as far in "
        f"{c.reach.n_reached} of {count_text(c.reach.pairs, 'pair')})"
        for c in reached or known
    ]
    if reached:
        return f"As an attack it is not special: {listed(parts)}"
    return f"As an attack it goes further than the same fine-tuning without it: {listed(parts)}"


def unfinished_sentences(summary: Summary) -> list[str]:
    """How many runs are not counted, and why; nothing where all are."""
    return [
        f"{n} {'run' if n == 1 else 'runs'} {one if n == 1 else more}."
        for n, one, more in _left_out(summary)
        if n
    ]


def _left_out(summary: Summary) -> Sequence[tuple[int, str, str]]:
    return (
        (len(summary.failed), "failed and is not included", "failed and are not included"),
        (
            len(summary.running),
            "has not ended (or was killed) and is not included",
            "have not ended (or were killed) and are not included",
        ),
        (
            len(summary.repeats),
            "repeats another with the same fingerprint and is not counted",
            "repeat others with the same fingerprint and are not counted",
        ),
    )
