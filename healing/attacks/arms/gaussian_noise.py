"""Gaussian noise as large as a given attack's weight change, or as harmful."""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Iterator

import torch

from healing.attacks.base import AttackRecord
from healing.attacks.context import AttackContext
from healing.attacks.damage_matching import DamageTarget, match_damage, measure_state
from healing.attacks.noise import NoiseArm, gaussian_noise, reference_norms
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.measurements.probe import Measurement, Probe
from healing.models.checkpoints import read_checkpoint
from healing.models.loading import LoadedModel
from healing.progress import Safe, during

LABEL = "Gaussian noise"
SHORT = "noise"
ROLE = "damage_control"
COLOUR = "#56B4E9"
MARKER = "P"


class MatchedNoise(NoiseArm):
    """Noise that is scaled until it does the reference's damage, where that is asked for."""

    def run(
        self,
        loaded: LoadedModel,
        config: AttackConfig,
        probe: Probe,
        healthy: Measurement,
        change: WeightChange,
        warmup: Iterable[torch.Tensor] = (),
    ) -> Iterator[AttackRecord | Safe]:
        """The common loop, or the search of the scale with ``match`` ``loss`` or ``rank``.

        Raises:
            MatchError: The reference's damage cannot be reached.
        """
        if not config.reference_checkpoint or config.match == "norm":
            return super().run(loaded, config, probe, healthy, change, warmup)
        reference = read_checkpoint(pathlib.Path(config.reference_checkpoint)).state
        with during("measuring the reference"):
            damaged = measure_state(loaded, reference, change, probe)
        target = DamageTarget.of(config.match, damaged, healthy)
        return match_damage(loaded, self, probe, healthy, target)


def make(context: AttackContext) -> MatchedNoise:
    """Noise of the reference's norm per tensor, or of ``noise_scale`` standard deviations."""
    healthy = context.change.healthy
    norms = reference_norms(context.config, context.change, context.loaded.digest)
    noise = gaussian_noise(healthy, norms, context.draws())
    return MatchedNoise(context.model, noise, context.baselines, context.change)
