"""Is it the attack, or how far it went? What the regression on distance and loss says, in words."""

from __future__ import annotations

from healing.reporting.phrases import count_text, interval_text, listed
from healing.statistics.damage_regression import NAMES, DamageRegression
from healing.statistics.summary import Summary

TITLE = "Is it the attack, or how far it went?"
LIMITS = (
    "Limits: this is an observation, with one slope for all arms, linear in the logarithms; the "
    "distance and the loss are themselves outcomes of the attack, so that holding them equal can "
    "hide a difference or make one."
)


def damage_sentence(model: str, found: DamageRegression) -> str:
    """How much of the difference between arms remains at equal distance and loss."""
    arms, seeds = len(found.arms), count_text(found.n_seeds, "attack seed")
    parts = [_slopes(found), *(_difference(found, label) for label in found.arms[1:])]
    if not found.unadjusted:
        parts.append(f"nothing can be said of arms at equal damage: {'; '.join(found.left_out)}")
    elif not found.adjusted:
        disjoint = found.apart and len(found.apart) == arms - 1
        why = "the arms do not overlap in distance or loss: " if disjoint else ""
        parts.append(f"{why}nothing can be said of arms at equal damage")
    if found.left_out and found.unadjusted:
        parts.append(f"left out: {'; '.join(found.left_out)}")
    if found.others:
        were = "was" if found.others == 1 else "were"
        parts.append(f"not in it: {count_text(found.others, 'run')} that {were} healed otherwise")
    said = [f"{part[0].upper()}{part[1:]}." for part in parts if part]
    head = f"{model}, {count_text(len(found.points), 'checkpoint')} of {arms} arms, {seeds}:"
    return " ".join([head, *said])


def _slopes(found: DamageRegression) -> str:
    if not found.slopes:
        return ""
    said = [
        f"by {interval_text(slope)} points per doubling of the {NAMES[name]}"
        for name, slope in found.slopes.items()
    ]
    return f"within arms rank recovery changes {listed(said)}"


def _difference(found: DamageRegression, label: str) -> str:
    """One arm beside the reference, as it is and at equal damage."""
    as_it_is, equal = found.unadjusted.get(label), found.adjusted.get(label)
    if as_it_is is None:
        return ""
    first = f"“{label}” minus “{found.reference}”: {interval_text(as_it_is)} points as it is"
    if label in found.apart:
        where = listed([NAMES[name] for name in found.apart[label]])
        return f"{first}; they do not overlap in {where}: nothing can be said at equal damage"
    if equal is None:  # with no covariate nothing is held equal either
        return first
    held = listed([NAMES[name] for name in found.covariates])
    return f"{first}, {interval_text(equal)} at equal {held}"


def damage_sentences(summary: Summary) -> list[str]:
    """One paragraph per model, and the limits once; empty where no two arms have distances."""
    said = [damage_sentence(model, found) for model, found in summary.damage.items()]
    return [*said, LIMITS] if said else []
