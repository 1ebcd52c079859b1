"""The same fine-tuning on one sequence of clean text."""

from __future__ import annotations

from healing.attacks.context import AttackContext
from healing.attacks.objective import ObjectiveArm

LABEL = "clean text"
SHORT = "text"
ROLE = "control"
COLOUR = "#009E73"
MARKER = "D"


def make(context: AttackContext) -> ObjectiveArm:
    """The loss of one window of the attack split; another one than the baseline's."""
    return context.sequence_arm(context.text(1))
