"""As haep, but each gradient is projected onto the subspace: what the theory alone does."""

from __future__ import annotations

from healing.attacks.arms.haep import find_catalyst
from healing.attacks.context import AttackContext
from healing.attacks.objective import ObjectiveArm

LABEL = "HAEP oracle"
SHORT = "oracle"
ROLE = "mechanism"
FORMER_ROLES = ("positive_control",)
COLOUR = "#CC79A7"
MARKER = "v"


def make(context: AttackContext) -> ObjectiveArm:
    """The loss of haep's own sequence (the same draws): the two differ in the projection alone."""
    catalyst = find_catalyst(context)
    return context.sequence_arm(catalyst.tokens, projected=True, catalyst=catalyst)
