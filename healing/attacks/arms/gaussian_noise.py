"""Gaussian noise as large as a given attack's weight change, or as harmful."""

from __future__ import annotations

from healing.attacks.context import AttackContext
from healing.attacks.noise import gaussian_noise, noise_draws
from healing.attacks.reference import reference_norms
from healing.attacks.strength import NoiseArm

LABEL = "Gaussian noise"
SHORT = "noise"
ROLE = "damage_control"
COLOUR = "#56B4E9"
MARKER = "P"
MATCHES = ("loss", "norm", "rank", "rank+loss")
OPTIONS = ("noise_draw",)


def make(context: AttackContext) -> NoiseArm:
    """Noise of the reference's norm per tensor, or of ``noise_scale`` standard deviations."""
    config, change = context.config, context.change
    norms = reference_norms(config, change, context.loaded.digest, change.healthy)
    noise = gaussian_noise(change.healthy, norms, noise_draws(config))
    return NoiseArm(context.model, noise, context.measured_baselines(), change)
