"""Is the catalyst special? What the first primary contrasts of a treatment say together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from healing.registry import CONTROL
from healing.statistics.contrasts.plan import Contrast, Gap, Pair


class Special(StrEnum):
    """Whether what a treatment damaged heals otherwise than what the same fine-tuning did."""

    LESS = "heals less than all"
    MORE = "heals more than all"
    NOT = "not special"
    UNDECIDED = "undecided"
    NOT_COMPARED = "not compared"


@dataclass(frozen=True)
class CatalystAnswer:
    """The answer for one treatment of one model.

    Attributes:
        pair: Of one of its contrasts (or gaps), for the names.
        contrasts: With controls: the same fine-tuning without the treatment's idea.
        gaps: Controls that were run and cannot be compared.
        healing: ``LESS`` and ``MORE`` take a difference from *every* control in one direction;
            ``NOT`` takes one that is equivalent, or differences in both directions.
    """

    pair: Pair
    contrasts: tuple[Contrast, ...]
    gaps: tuple[Gap, ...]
    healing: Special

    @property
    def reached(self) -> tuple[Contrast, ...]:
        """The controls whose attacks lower the rank as far as the treatment's."""
        return tuple(c for c in self.contrasts if c.reach.reached)


def catalyst_answers(contrasts: Sequence[Contrast], gaps: Sequence[Gap]) -> list[CatalystAnswer]:
    """One answer per model and treatment of which there is any contrast or gap."""
    pairs: dict[tuple[str, str], Pair] = {}
    for pair in [*(c.pair for c in contrasts), *(g.pair for g in gaps)]:
        pairs.setdefault(_key(pair), pair)
    answers = []
    for key, pair in pairs.items():
        own = tuple(c for c in contrasts if _key(c.pair) == key and c.pair.kind.role == CONTROL)
        missing = tuple(g for g in gaps if _key(g.pair) == key and g.pair.kind.role == CONTROL)
        answers.append(CatalystAnswer(pair, own, missing, _special(own, missing)))
    return answers


def _key(pair: Pair) -> tuple[str, str]:
    return pair.model, pair.treatment.arm


def _special(contrasts: Sequence[Contrast], gaps: Sequence[Gap]) -> Special:
    said = {c.comparison.statement for c in contrasts}
    if not said:
        return Special.NOT_COMPARED
    if "equivalent" in said or {"superior", "inferior"} <= said:
        return Special.NOT
    if gaps:  # "every control" is not known
        return Special.UNDECIDED
    if said == {"inferior"}:
        return Special.LESS
    return Special.MORE if said == {"superior"} else Special.UNDECIDED
