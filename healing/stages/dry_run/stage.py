"""``--dry-run``: the memory that an attack or a healing run would take, with nothing loaded."""

from __future__ import annotations

import os

import torch
from transformers import PreTrainedConfig

from healing.config.arm_tags import arm_needs
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.errors import ConfigError
from healing.models.architectures import architecture
from healing.models.checkpoints import read_checkpoint
from healing.models.loading import resolve_device
from healing.registry import ARMS, METHODS, Registry
from healing.stages.cells.heal import resolve_from_checkpoint
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.dry_run.peak_memory import Prediction, predict_attack, predict_healing
from healing.stages.dry_run.tensor_bytes import KINDS
from healing.stages.heal_inputs import find_checkpoints, fresh_attack_config, local_checkpoint
from healing.stages.terminal.console import Console
from healing.stages.tuning.healer_files import with_healer
from healing.tracking import run_logger
from healing.tracking.store import MlflowStore


def table(prediction: Prediction) -> str:
    """Megabytes by phase and kind, for a terminal."""
    header = ["phase", *KINDS, "sum (MB)"]
    rows = [
        [phase, *(f"{kinds[k] / 1e6:,.0f}" for k in KINDS), f"{sum(kinds.values()) / 1e6:,.0f}"]
        for phase, kinds in prediction.phases.items()
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = []
    for name, *cells in [header, *rows]:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]))
    return "\n".join(lines)


def describe(name: str, label: str, prediction: Prediction) -> str:
    """What was predicted, for a terminal."""
    highest = max(prediction.phases, key=lambda phase: sum(prediction.phases[phase].values()))
    on_cpu = prediction.device.type == "cpu"
    beside = (
        f"the process without tensors {prediction.base / 1e6:,.0f} MB"
        if on_cpu
        else "tensors alone; the driver and the allocator's reserve come on top"
    )
    return "\n".join(
        [
            f"{name} of {label} on {prediction.device}: {prediction.n_params:,} parameters, "
            f"{prediction.n_trainable:,} trained",
            table(prediction),
            f"predicted peak: {prediction.peak_bytes / 1e9:.2f} GB ({highest}; {beside})",
            *prediction.plan,
        ]
    )


def predictions(config: AttackConfig | HealConfig) -> dict[str, tuple[str, Prediction]]:
    """Stage → (model, prediction): the stage itself, and the fresh attack where one comes first.

    Raises:
        ConfigError: Parameters contradict each other, or an arm or method is a plug-in's.
        CheckpointError: What is to be healed cannot be read, or is of another model.
        ModelError: The model's configuration cannot be had.
    """
    if isinstance(config, AttackConfig):
        _own_code(ARMS, config.arm)
        if needed := arm_needs(config.arm):
            raise ConfigError(
                f"memory is not predicted for --arm {config.arm}, which needs the {needed[0]} of "
                "another attack: it takes what --arm gaussian_noise takes"
            )
        attack = resolve_from_model(config)
        return {"attack": (attack.label, predict_attack(attack, *_place(attack)))}
    config, _ = with_healer(config, MlflowStore())
    _own_code(METHODS, config.healing_method)
    paths = find_checkpoints(config.checkpoint_dir) if config.checkpoint_dir else []
    path = paths[0] if paths else local_checkpoint(config, MlflowStore())
    healing = resolve_from_checkpoint(config, read_checkpoint(path) if path else None, path)
    found = {} if path else predictions(fresh_attack_config(healing))
    return {**found, "heal": (healing.label, predict_healing(healing, *_place(healing)))}


def _own_code(registry: Registry, name: str) -> None:
    """Refuse what was never held against a measurement: code that other distributions bring."""
    facts = registry.facts(name)
    if not facts.built_in:
        raise ConfigError(
            f"memory is not predicted for plug-in {registry.kind}s: {name} is of {facts.source}"
        )


def _place(config: AttackConfig | HealConfig) -> tuple[PreTrainedConfig, torch.device]:
    shape = architecture(config.model, config.revision, config.deduped)
    return shape, resolve_device(config.device)


def dry_run(config: AttackConfig | HealConfig) -> dict[str, Prediction]:
    """Predict and print; a run is made only by ``mlflow run``, and then holds the prediction."""
    found = predictions(config)
    for name, (label, prediction) in found.items():
        Console("normal").say(describe(name, label, prediction))
    peak = max(prediction.peak_bytes for _, prediction in found.values())
    if "MLFLOW_RUN_ID" in os.environ:
        with run_logger.start("dry run", {"stage": "dry_run"}) as run:
            run.metrics({"summary/predicted_peak_bytes": float(peak)})
    return {name: prediction for name, (_, prediction) in found.items()}
