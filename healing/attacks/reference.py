"""The attack that a control refers to: its weights, checked, and how far it moved them."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Collection, Iterable, Mapping

import torch

from healing.attacks.weight_change import WeightChange
from healing.config.arm_tags import arm_role
from healing.config.attack import AttackConfig
from healing.errors import CheckpointError
from healing.models.checkpoints import COLLAPSED_KIND, Checkpoint, read_checkpoint
from healing.registry import DAMAGE_CONTROL, SHAM, YARDSTICK


def _require_attack(
    reference: Checkpoint, path: pathlib.Path, healthy_digest: str, refused: Collection[str]
) -> None:
    """Refuse what is not an attack on these very weights.

    Raises:
        CheckpointError: Saying what it is instead.
    """
    origin = reference.config
    problem = ""
    if reference.kind != COLLAPSED_KIND:
        problem = "holds healed weights"
    elif arm_role(str(origin.get("arm", ""))) in refused:
        problem = f"is of the arm {origin['arm']}"
    elif origin.get("healthy_digest", healthy_digest) != healthy_digest:
        problem = "was made from other healthy weights than the ones here"
    if problem:
        raise CheckpointError(
            f"{path} {problem}: give the checkpoint of an attack on this model to match"
        )


def _attacked(
    file: str, change: WeightChange, healthy_digest: str, model: str, refused: Collection[str]
) -> Mapping[str, torch.Tensor]:
    path = pathlib.Path(file)
    reference = read_checkpoint(path)
    _require_attack(reference, path, healthy_digest, refused)
    state = reference.state
    wrong = [
        name
        for name, w in change.healthy.items()
        if name not in state or state[name].shape != w.shape or not state[name].is_floating_point()
    ]
    if wrong:
        raise CheckpointError(
            f"{path} is not an attack on model {model} (tensor {wrong[0]} missing or of "
            "another shape or kind): give one on the same model"
        )
    _ = reference.digest  # compared with the one that was saved
    return state


def reference_state(
    config: AttackConfig, change: WeightChange, healthy_digest: str
) -> Mapping[str, torch.Tensor]:
    """Weights of the attack to be matched, by name (mapped from its file).

    Raises:
        CheckpointError: It is no attack on this model, or one that is itself matched.
    """
    refused = (DAMAGE_CONTROL, SHAM, YARDSTICK)
    return _attacked(config.reference_checkpoint, change, healthy_digest, config.model, refused)


def direction_state(
    config: AttackConfig, change: WeightChange, healthy_digest: str
) -> Mapping[str, torch.Tensor]:
    """Weights of the attack that gives a direction, by name; any arm's but the sham's.

    Raises:
        CheckpointError: It is no attack on this model.
    """
    return _attacked(config.direction_checkpoint, change, healthy_digest, config.model, (SHAM,))


def reference_norms(
    config: AttackConfig, change: WeightChange, healthy_digest: str, names: Iterable[str]
) -> dict[str, float]:
    """‖ΔW‖ of the attack to be matched, per tensor; without one noise_scale · std · √size.

    Raises:
        CheckpointError: As :func:`reference_state`.
    """
    healthy = {name: change.healthy[name] for name in names}
    if not config.reference_checkpoint:
        return {
            name: config.noise_scale * float(w.std(correction=0)) * math.sqrt(w.numel())
            for name, w in healthy.items()
        }
    state = reference_state(config, change, healthy_digest)
    return {name: float((state[name].to(w) - w).norm()) for name, w in healthy.items()}
