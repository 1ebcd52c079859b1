"""No change of the weights: the healthy model, whose healing is the sham."""

from __future__ import annotations

from healing.attacks.context import AttackContext
from healing.attacks.strength import NoiseArm
from healing.config.attack import AttackConfig

LABEL = "sham"
ROLE = "sham"
COLOUR = "#000000"
MARKER = "x"


class Unchanged(NoiseArm):
    """Takes no step, whatever the budget."""

    def steps(self, config: AttackConfig) -> int:
        """None."""
        return 0


def make(context: AttackContext) -> Unchanged:
    """Without noise: it is never put anywhere."""
    return Unchanged(context.model, {}, context.measured_baselines(), context.change)
