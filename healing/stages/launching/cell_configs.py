"""What a sweep asks of each of its runs: the resolved configurations of a cell."""

from __future__ import annotations

from typing import Any

from healing.config.arm_tags import arm_takes
from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.heal import HealConfig
from healing.config.healer import Healer
from healing.config.options import AUTO
from healing.config.presets import preset_for
from healing.config.shared import SAVING
from healing.config.sweep import SweepConfig
from healing.registry import SHAM
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.cells.sweep_plan import SweepCell


def _shared(config: SweepConfig) -> dict[str, Any]:
    names = (
        "revision",
        "deduped",
        "corpus",
        "tokenizer",
        "text_column",
        "split_rule",
        "batch_size",
        "sequence_length",
        "measurement_interval",
        "device",
        "output_dir",
        "cache_dir",
        "log_layers",
        "log_images",
        "log_model",
        *SAVING,
    )
    return {name: getattr(config, name) for name in names} | {"verbosity": "quiet"}


def attack_config(
    config: SweepConfig, cell: SweepCell, reference: str, direction: str = ""
) -> AttackConfig:
    """Resolved configuration of a cell's attack.

    Args:
        config: Of the sweep.
        cell: Says which attack.
        reference: Checkpoint that a damage control is matched to; empty = none.
        direction: Checkpoint that gives the direction of a ray; empty = none.
    """
    ranked = arm_takes(cell.arm, "noise_rank")
    return resolve_from_model(
        AttackConfig(
            model=cell.model,
            arm=cell.arm,
            seed=cell.seed,
            attack_steps=config.attack_steps,
            trajectory_interval=config.trajectory_interval,
            reference_checkpoint=reference,
            direction_checkpoint=direction,
            match=config.match_of(cell.arm) if reference else "norm",
            noise_draw=cell.draw,
            noise_rank=config.noise_rank if ranked else 1,
            **_shared(config),
        )
    )


def heal_config(
    config: SweepConfig, cell: SweepCell, source: str = "", healer: Healer | None = None
) -> HealConfig:
    """Resolved configuration of a cell's healing.

    Args:
        config: Of the sweep.
        cell: What is healed.
        source: Of the healer, as it was named.
        healer: Of the cell's model; ``None`` = the default one.

    Raises:
        ConfigError: A setting that was given contradicts the healer.
    """
    steps = config.healing_steps
    if steps == AUTO and healer is None:
        steps = preset_for(cell.model).sweep_healing_steps
    wanted = HealConfig(
        model=cell.model,
        arm=cell.arm,
        seed=cell.seed,
        healing_steps=steps,
        healing_lr=config.healing_lr,
        healer=source,
        sham=config.sham and cell.role != SHAM,
        log_text=config.log_text,
        register_as=config.register_as,
        **_shared(config),
    )
    return resolve_from_model(healer.applied(wanted) if healer else wanted)


def basin_config(config: SweepConfig, heal_run_id: str) -> BasinConfig:
    """Configuration of the landscape of a healing run, as far as the sweep decides it."""
    shared = _shared(config)
    return BasinConfig(
        heal_run_id=heal_run_id,
        device=shared["device"],
        output_dir=shared["output_dir"],
        verbosity=shared["verbosity"],
    )
