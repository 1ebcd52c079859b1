"""What the data do not determine, in plain words: one row per cause, with its groups."""

from __future__ import annotations

import re
from collections.abc import Sequence

from healing.reporting.phrases import shown_label
from healing.reporting.tables import Table, endpoint_name
from healing.statistics.heal_runs import ENDPOINTS
from healing.statistics.summary import Summary

TITLE = "What the data do not determine"
CAUSES = {
    "TooFewCheckpointsWarning": "Too few checkpoints: what takes several is not stated.",
    "ZeroVarianceWarning": "All values are equal: nothing says how far others would lie.",
    "UndefinedDataWarning": "Values are undefined (no measurable damage, or a model that cannot "
    "compute): they are left out.",
    "AllCensoredWarning": "No checkpoint got half of the damage back within the budget: there is "
    "no time to state.",
    "MedianNotReachedWarning": "Fewer than half of the checkpoints got half of the damage back "
    "within the budget: the median time is later than that.",
    "CensoredDataWarning": "Too few checkpoints got half of the damage back within the budget.",
    "TooFewMeasurementsWarning": "Too few measured steps for a curve: where recovery would end is "
    "not stated.",
    "NotConvergedWarning": "No curve fits: where recovery would end is not stated.",
    "TooFewSizesWarning": "Fewer model sizes than a trend takes.",
}
"""Class of a warning of the statistics → what it means for a reader."""
_ENDPOINTS = re.compile(rf"\b(?:{'|'.join(sorted(ENDPOINTS, key=len, reverse=True))})\b")


def all_notes(summary: Summary) -> list[tuple[str, str]]:
    """Of what the data do not determine something, and the named warning that says so."""
    own = [
        (f"{g.model} {shown_label(g, summary.groups)}", note)
        for g in summary.groups
        for note in g.notes
    ]
    return [*own, *summary.notes]


def cause_of(note: str) -> str:
    """A warning in plain words; one that is not known here by its own text."""
    name, _, text = note.partition(": ")
    return CAUSES.get(name) or (text or note)


def _about(notes: Sequence[str]) -> str:
    """The endpoints that some warnings name: ``rank, loss``."""
    found = [name for note in notes for name in _ENDPOINTS.findall(note)]
    return ", ".join(dict.fromkeys(map(endpoint_name, found))) or "–"


def caution_table(summary: Summary) -> Table:
    """One row per cause: what it is, of which numbers, in which groups."""
    by_cause: dict[str, list[tuple[str, str]]] = {}
    for where, note in all_notes(summary):
        by_cause.setdefault(cause_of(note), []).append((where, note))
    rows = tuple(
        (
            cause,
            _about([note for _, note in found]),
            "; ".join(dict.fromkeys(where for where, _ in found)),
        )
        for cause, found in by_cause.items()
    )
    note = "The warnings themselves, word by word, are in summary.json (notes)."
    return Table(TITLE, ("why", "of which numbers", "where"), rows, note)
