"""Every matrix of the blocks with its singular values raised to a power, its norm kept."""

from __future__ import annotations

import torch

from healing.attacks.context import AttackContext
from healing.attacks.strength import StrengthArm
from healing.models.blocks import block_matrices

LABEL = "sharpened spectrum"
SHORT = "sharpened"
ROLE = "damage_control"
COLOUR = "#999933"
MARKER = "h"
MATCHES = ("rank", "rank+loss", "loss")


class Sharpened(StrengthArm):
    """W(s) = U diag(σ(s)) Vᵀ with σᵢ(s) = σᵢ^(1+s)·‖σ‖/‖σ^(1+s)‖ and W₀ = U diag(σ) Vᵀ.

    Singular vectors, the order of the values and the Frobenius norm stay; with s → ∞ every matrix
    becomes its leading singular direction.
    """

    def __init__(self, context: AttackContext) -> None:
        change = context.change
        super().__init__(
            context.model,
            context.measured_baselines(),
            change,
            full=float(context.config.noise_scale),
        )
        self.parts = {}
        for name in block_matrices(context.model):
            left, values, right = torch.linalg.svd(change.healthy[name].double(), False)
            # The directions are kept in float32: a strength above 0 is no last-digit matter.
            self.parts[name] = left.float(), values, right.float()

    def weight(self, name: str, healthy: torch.Tensor, strength: float) -> torch.Tensor:
        """The matrix with its values sharpened; other parameters as they are."""
        if name not in self.parts:
            return healthy
        left, values, right = self.parts[name]
        return ((left * sharpened(values, strength).float()) @ right).to(healthy)


def sharpened(values: torch.Tensor, strength: float) -> torch.Tensor:
    """σᵢ^(1+s)·‖σ‖/‖σ^(1+s)‖; zeros where all values are.

    Args:
        values: σ, (r,), float64.
        strength: s from 0.
    """
    largest = values.max()
    if not largest:
        return values
    powers = (values / largest) ** (1.0 + strength)  # of numbers up to 1: nothing overflows
    return powers * (values.norm() / powers.norm())


def make(context: AttackContext) -> Sharpened:
    """Up to s = ``noise_scale``, or to the s that does a reference's damage."""
    return Sharpened(context)
