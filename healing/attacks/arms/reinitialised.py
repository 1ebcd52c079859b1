"""The untrained model: what learning from scratch makes of the same healing."""

from __future__ import annotations

import torch

from healing.attacks.context import AttackContext
from healing.attacks.strength import StrengthArm
from healing.config.attack import AttackConfig
from healing.models.loading import untrained_model

LABEL = "untrained model"
SHORT = "untrained"
ROLE = "yardstick"
COLOUR = "#888888"
MARKER = "*"


class Reinitialised(StrengthArm):
    """All parameters as before training, in one step."""

    def __init__(self, context: AttackContext) -> None:
        super().__init__(context.model, context.measured_baselines(), context.change)
        fresh = untrained_model(context.loaded, context.draws())
        self.fresh = {name: p.detach() for name, p in fresh.named_parameters()}

    def steps(self, config: AttackConfig) -> int:
        """One, whatever the budget: there is nothing between trained and untrained."""
        return 1

    def weight(self, name: str, healthy: torch.Tensor, strength: float) -> torch.Tensor:
        """The initial value."""
        return self.fresh[name]


def make(context: AttackContext) -> Reinitialised:
    """The model's own initialisation, drawn from the attack's stream."""
    return Reinitialised(context)
