"""Gaussian noise of low rank in every matrix of the blocks, as large as a given attack's change."""

from __future__ import annotations

from healing.attacks.context import AttackContext
from healing.attacks.noise import low_rank_noise, noise_draws
from healing.attacks.reference import reference_norms
from healing.attacks.strength import NoiseArm
from healing.models.blocks import block_matrices

LABEL = "low-rank noise"
SHORT = "low rank"
ROLE = "damage_control"
COLOUR = "#117733"
MARKER = "X"
MATCHES = ("rank", "rank+loss", "loss", "norm")
OPTIONS = ("noise_rank", "noise_draw")


def make(context: AttackContext) -> NoiseArm:
    """E = U Vᵀ of rank ``noise_rank``, of the reference's norm (or ``noise_scale`` standard
    deviations of the matrix) in every matrix of the blocks; all other weights stay.
    """
    config, change = context.config, context.change
    matrices = {name: change.healthy[name] for name in block_matrices(context.model)}
    norms = reference_norms(config, change, context.loaded.digest, matrices)
    noise = low_rank_noise(matrices, norms, config.noise_rank, noise_draws(config))
    return NoiseArm(context.model, noise, context.measured_baselines(), change)
