"""Noise in the place of an attack: one fixed perturbation, and how large it is."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import AlignmentBaselines
from healing.attacks.base import StepOutcome
from healing.attacks.loop import LoopArm
from healing.attacks.weight_change import WeightChange
from healing.config.arm_tags import arm_role
from healing.config.attack import AttackConfig
from healing.errors import CheckpointError
from healing.models.checkpoints import COLLAPSED_KIND, Checkpoint, read_checkpoint
from healing.registry import DAMAGE_CONTROL, SHAM


class NoiseArm(LoopArm):
    """Adds a fixed weight perturbation in equal parts over the budget: W₀ + (step/total)·E.

    Args:
        model: The model under attack.
        noise: E by parameter name.
        baselines: What ρ of the weight change is compared with; ``None`` = it is not measured.
        change: Snapshot of the healthy weights.
    """

    # Stopping early would leave the noise smaller than what it is matched to.
    stops_early = False

    def __init__(
        self,
        model: PreTrainedModel,
        noise: Mapping[str, torch.Tensor],
        baselines: AlignmentBaselines | None,
        change: WeightChange,
    ) -> None:
        self.model, self.noise = model, noise
        self.baselines, self.change = baselines, change

    @torch.no_grad()
    def place(self, scale: float) -> None:
        """Put the weights at W₀ + scale·E."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.change.healthy[name] + scale * self.noise[name])

    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """Move every parameter to its place at this step."""
        self.place(step / total)
        return StepOutcome()

    def give_gradients(self) -> None:
        """There are none."""

    def diagnostics(self) -> dict[str, float]:
        """ρ of the weight change; there is no objective gradient."""
        if self.baselines is None:
            return {}
        return self.baselines.of_change(self.change.delta(self.model))

    def baselines_now(self) -> dict[str, float]:
        """ρ of other gradients."""
        return {} if self.baselines is None else self.baselines.metrics(self.model)


def gaussian_noise(
    healthy: Mapping[str, torch.Tensor], norms: Mapping[str, float], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Per-tensor Gaussian noise of the given Frobenius norms, drawn on the CPU in name order."""
    noise = {}
    for name in sorted(healthy):
        draw = torch.randn(healthy[name].shape, generator=generator)
        noise[name] = (draw * (norms[name] / float(draw.norm()))).to(healthy[name])
    return noise


def _require_attack(reference: Checkpoint, path: pathlib.Path, healthy_digest: str) -> None:
    """Refuse as a reference what is not an attack on these very weights.

    Raises:
        CheckpointError: Saying what it is instead.
    """
    origin = reference.config
    problem = ""
    if reference.kind != COLLAPSED_KIND:
        problem = "holds healed weights"
    elif arm_role(str(origin.get("arm", ""))) in (DAMAGE_CONTROL, SHAM):
        problem = f"is of the arm {origin['arm']}"
    elif origin.get("healthy_digest", healthy_digest) != healthy_digest:
        problem = "was made from other healthy weights than the ones here"
    if problem:
        raise CheckpointError(
            f"{path} {problem}: give noise the checkpoint of an attack on this model to match"
        )


def reference_norms(
    config: AttackConfig, change: WeightChange, healthy_digest: str
) -> dict[str, float]:
    """‖ΔW‖ per tensor of the referenced attack, or noise_scale · std · √size.

    Raises:
        CheckpointError: The reference is no attack on this model.
    """
    if not config.reference_checkpoint:
        return {
            name: config.noise_scale * float(w.std(correction=0)) * math.sqrt(w.numel())
            for name, w in change.healthy.items()
        }
    path = pathlib.Path(config.reference_checkpoint)
    reference = read_checkpoint(path)
    _require_attack(reference, path, healthy_digest)
    state = reference.state
    wrong = [k for k, w in change.healthy.items() if k not in state or state[k].shape != w.shape]
    if wrong:
        raise CheckpointError(
            f"{path} is not an attack on model {config.model} (tensor {wrong[0]} missing or of "
            "another shape): give --reference-checkpoint an attack on the same model"
        )
    return {k: float((state[k].to(w) - w).norm()) for k, w in change.healthy.items()}
