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
    """The loss of one sequence, uniform over the tokenizer's vocabulary."""
    length, vocabulary = context.config.catalyst_length, context.loaded.vocabulary
    tokens = random_sequences(1, length, vocabulary, context.draws())[0]
    return context.sequence_arm(tokens.to(context.loaded.device))
