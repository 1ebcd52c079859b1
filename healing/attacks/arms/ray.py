"""The weight change of a stored attack, made shorter or longer: as harmful as another attack."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from healing.attacks.context import AttackContext
from healing.attacks.reference import direction_state
from healing.attacks.strength import StrengthArm

LABEL = "ray"
ROLE = "damage_control"
COLOUR = "#44AA99"
MARKER = ">"
MATCHES = ("rank", "rank+loss", "loss")
NEEDS = ("direction",)


class Ray(StrengthArm):
    """W₀ + s·(W − W₀) of every parameter, W the stored attack's: at s = 1 that attack itself."""

    def __init__(self, context: AttackContext, state: Mapping[str, torch.Tensor]) -> None:
        scale = float(context.config.noise_scale)
        super().__init__(context.model, context.measured_baselines(), context.change, full=scale)
        self.state = state

    def weight(self, name: str, healthy: torch.Tensor, strength: float) -> torch.Tensor:
        """Its point of the ray."""
        # lerp is exact at both ends, W₀ + 1·(W − W₀) is not.
        return torch.lerp(healthy, self.state[name].to(healthy), strength)


def make(context: AttackContext) -> Ray:
    """Along the attack that ``direction_checkpoint`` names, up to s = ``noise_scale``, or to the s
    that does a reference's damage.
    """
    state = direction_state(context.config, context.change, context.loaded.digest)
    return Ray(context, state)
