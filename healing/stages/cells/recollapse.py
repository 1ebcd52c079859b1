"""An attack repeated on the healed weights: how many steps to the same rank as the first time?"""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass, fields, replace
from typing import Any

from healing.config.attack import AttackConfig
from healing.config.options import flag_name
from healing.errors import CheckpointError, ConfigError
from healing.measurements.probe import Measurement
from healing.models.checkpoints import HEALED_KIND, HEALED_NAME, Checkpoint, read_checkpoint

FIRST_STEPS, FIRST_RANK = "attack_steps_done", "attack_rank"
"""What a healed checkpoint says of the attack that it was healed from."""


@dataclass(frozen=True)
class Start:
    """Where a repeated attack begins.

    Attributes:
        checkpoint: The healed weights.
        measurement: Of them.
        target_rank: Effective rank at which it ends.
    """

    checkpoint: Checkpoint
    measurement: Measurement
    target_rank: float

    def summary(self, steps: int, rank: float) -> dict[str, float]:
        """Steps of this attack and of the first; NaN where it ended above the target rank."""
        return {
            "start_effective_rank": self.measurement.effective_rank,
            "start_loss": self.measurement.loss,
            "recollapse_rank": self.target_rank,
            "recollapse_steps": float(steps) if rank <= self.target_rank else math.nan,
            "first_attack_steps": float(self.checkpoint.config[FIRST_STEPS]),
        }


def read_healed(path: str) -> Checkpoint:
    """The healed checkpoint to attack again.

    Raises:
        CheckpointError: It is none, or does not say how the attack before it went.
    """
    healed = read_checkpoint(pathlib.Path(path))
    if healed.kind != HEALED_KIND:
        raise CheckpointError(
            f"{path} is not a healed checkpoint (type {healed.kind}): give the {HEALED_NAME} that "
            "the heal entry point stored"
        )
    lacking = [n for n in ("attack", FIRST_STEPS, FIRST_RANK) if n not in healed.config]
    if lacking or not healed.config["attack"].get("healthy_digest"):
        raise CheckpointError(
            f"{path} does not say how it was attacked ({', '.join(lacking) or 'healthy_digest'} is "
            "missing: a sham, or from an older version): heal an attack again and give that"
        )
    return healed


def resolve_from_healed(config: AttackConfig, healed: Checkpoint) -> AttackConfig:
    """The attack that a state was healed from, on its weights: seed, arm, budget and measured steps
    are those of the first time; where it runs and what is measured besides is as given.

    Raises:
        ConfigError: The user gives one of them another value.
    """
    made, plain = healed.config["attack"], AttackConfig()
    own = {"measurements"} | {f.name for f in fields(plain) if not f.metadata["determines"]}
    first: dict[str, Any] = {
        f.name: made[f.name] for f in fields(plain) if f.name in made and f.name not in own
    }
    for name, value in first.items():
        if getattr(config, name) not in (value, getattr(plain, name)):
            raise ConfigError(
                f"{flag_name(name)} is {value} as in the first attack: leave it out with "
                "--start-checkpoint"
            )
    return replace(config, **first)


def repeated(config: AttackConfig, start: Start) -> AttackConfig:
    """The configuration with which the loop stops at the target rank, seen from where it starts;
    no steps where that is below it already.
    """
    rank = start.measurement.effective_rank
    if not rank > start.target_rank:
        return replace(config, attack_steps=0)
    return replace(config, target_rank_reduction=1.0 - start.target_rank / rank)


def target_rank(config: AttackConfig, healthy: Measurement, healed: Checkpoint) -> float:
    """The rank that both attacks are to reach: the first one's target, or what it reached where it
    ran out of steps before.
    """
    wanted = healthy.effective_rank * (1.0 - config.target_rank_reduction)
    return max(wanted, float(healed.config[FIRST_RANK]))
