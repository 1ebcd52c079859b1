"""The same fine-tuning on one sequence of random tokens."""

from __future__ import annotations

from healing.attacks.alignment import random_sequences
from healing.attacks.context import AttackContext
from healing.attacks.objective import ObjectiveArm

LABEL = "random tokens"
SHORT = "tokens"
ROLE = "control"
COLOUR = "#E69F00"
MARKER = "^"


def make(context: AttackContext) -> ObjectiveArm:
    """The loss of one sequence, uniform over the tokenizer's vocabulary behind what begins every
    window.
    """
    length, loaded = context.config.catalyst_length, context.loaded
    drawn = random_sequences(1, length, loaded.vocabulary, context.draws(), loaded.opening)
    return context.sequence_arm(drawn[0].to(loaded.device))
