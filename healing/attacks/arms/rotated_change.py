"""A given attack's weight change, turned to random directions in every matrix of the blocks."""

from __future__ import annotations

from healing.attacks.context import AttackContext
from healing.attacks.noise import noise_draws, rotated
from healing.attacks.reference import reference_state
from healing.attacks.strength import NoiseArm
from healing.models.blocks import block_matrices

LABEL = "rotated change"
SHORT = "rotated"
ROLE = "damage_control"
COLOUR = "#882255"
MARKER = "d"
MATCHES = ("norm", "rank", "rank+loss", "loss")
OPTIONS = ("noise_draw",)
NEEDS = ("reference",)


def make(context: AttackContext) -> NoiseArm:
    """E with the singular values of the reference's ΔW in every matrix of the blocks, directions
    drawn anew; all other weights stay.
    """
    config, change = context.config, context.change
    state, draws = reference_state(config, change, context.loaded.digest), noise_draws(config)
    noise = {}
    for name in sorted(block_matrices(context.model)):
        healthy = change.healthy[name]
        noise[name] = rotated(state[name].to(healthy) - healthy, draws).to(healthy)
    return NoiseArm(context.model, noise, context.measured_baselines(), change)
