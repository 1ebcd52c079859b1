"""``--dry-run``: the memory that an attack or a healing run would take, with nothing loaded, and
the time, from one step of each kind.
"""

from __future__ import annotations

import gc
import os
import pathlib
import time
from collections.abc import Mapping

import torch
from transformers import PreTrainedConfig

from healing.config.arm_tags import arm_needs
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.options import AUTO
from healing.config.presets import EMBEDDED, model_kind
from healing.data.corpora import require_named
from healing.errors import ConfigError
from healing.models.architectures import architecture
from healing.models.checkpoints import read_checkpoint
from healing.models.loading import resolve_device
from healing.models.model_files import weights_are_here
from healing.registry import ARMS, METHODS, Registry
from healing.stages.cells.heal import resolve_from_checkpoint
from healing.stages.cells.inputs import load_for, resolve_from_model, use_threads
from healing.stages.dry_run.peak_memory import Prediction, predict_attack, predict_healing
from healing.stages.dry_run.per_rank import predict_rank
from healing.stages.dry_run.tensor_bytes import KINDS
from healing.stages.dry_run.timing import Cost, attack_costs, healing_costs, in_words
from healing.stages.healing_run.inputs import (
    find_checkpoints,
    fresh_attack_config,
    local_checkpoint,
)
from healing.stages.terminal.console import Console
from healing.stages.tuning.healer_files import with_healer
from healing.tracking import open_runs
from healing.tracking.store import MlflowStore  # never later: what a run has loaded is counted


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


def predictions(
    config: AttackConfig | HealConfig, console: Console | None = None
) -> dict[str, tuple[AttackConfig | HealConfig, Prediction]]:
    """Stage → (resolved configuration, prediction): of the stage itself, and of the fresh attack
    where one comes first.

    Args:
        config: Of the stage.
        console: Shows that it goes on.

    Raises:
        ConfigError: Parameters contradict each other, or an arm or method is a plug-in's.
        CorpusError: There is no such text; none is read.
        CheckpointError: What is to be healed cannot be read, or is of another model.
        ModelError: The model's configuration cannot be had.
    """
    console = console or Console("quiet")
    if config.corpus != AUTO:
        require_named(config.corpus)
    if isinstance(config, AttackConfig):
        _own_code(ARMS, config.arm)
        if needed := arm_needs(config.arm):
            raise ConfigError(
                f"memory is not predicted for --arm {config.arm}, which needs the {needed[0]} of "
                "another attack: it takes what --arm gaussian_noise takes"
            )
        with console.doing("reading the model's configuration"):
            attack = resolve_from_model(config)
        with console.doing("the attack without numbers"):
            return {"attack": (attack, predict_attack(attack, *_place(attack)))}
    config, path = _what_is_healed(config)
    with console.doing("reading the model's configuration"):
        healing = resolve_from_checkpoint(config, read_checkpoint(path) if path else None, path)
    found = {} if path else predictions(fresh_attack_config(healing), console)
    with console.doing("healing without numbers"):
        predict = predict_rank if healing.is_parallel else predict_healing
        return {**found, "heal": (healing, predict(healing, *_place(healing)))}


def _what_is_healed(config: HealConfig) -> tuple[HealConfig, pathlib.Path | None]:
    """The configuration with its healer, and the first checkpoint that would be healed; ``None``
    where it is that of a fresh attack.
    """
    store = MlflowStore()
    config, _ = with_healer(config, store)
    _own_code(METHODS, config.healing_method)
    if config.checkpoint_dir:
        return config, find_checkpoints(config.checkpoint_dir)[0]
    return config, local_checkpoint(config, store)


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


def _no_estimate(config: AttackConfig | HealConfig, resolved: AttackConfig | HealConfig) -> str:
    """Why no time is estimated; empty where it is."""
    if getattr(config, "is_parallel", False):
        return "the steps of several processes are not timed"
    cheap = model_kind(resolved.model) == EMBEDDED
    if config.time_steps == "false" or (config.time_steps == AUTO and not cheap):
        return "--time-steps true loads the model and times one step of each kind"
    if not weights_are_here(resolved.model, resolved.revision, resolved.deduped):
        return "the model's weights would have to be downloaded first"
    return ""


def estimates(
    config: AttackConfig | HealConfig, stages: Mapping[str, AttackConfig | HealConfig]
) -> str:
    """Lines on the time of every stage, or why there are none.

    Args:
        config: As given.
        stages: Name → resolved configuration, all of one model.
    """
    first = next(iter(stages.values()))
    if why := _no_estimate(config, first):
        return f"no time is estimated: {why}"
    console, lines = Console(config.verbosity), []
    use_threads(first)
    with console.doing("loading the model"):
        begin = time.perf_counter()
        loaded = load_for(first)
        loading = Cost("loading", 1, time.perf_counter() - begin)
    for name, stage in stages.items():
        with console.doing("timing one step of each kind"):
            if isinstance(stage, AttackConfig):
                costs = attack_costs(stage, loaded)
            else:
                costs = healing_costs(stage, loaded)
        lines.append(in_words(name, [loading, *costs]))
    return "\n".join(lines)


def dry_run(config: AttackConfig | HealConfig) -> dict[str, Prediction]:
    """Predict and print; a run is made only by ``mlflow run``, and then holds the prediction."""
    gc.freeze()  # what was imported need not be looked through again and again
    try:
        found = predictions(config, Console(config.verbosity))
    finally:
        gc.unfreeze()
    console = Console("normal")  # what is printed is what was asked for
    for name, (stage, prediction) in found.items():
        console.say(describe(name, stage.label, prediction))
    threads = torch.get_num_threads()
    try:
        console.say(estimates(config, {name: stage for name, (stage, _) in found.items()}))
    finally:
        torch.set_num_threads(threads)
    peak = max(prediction.peak_bytes for _, prediction in found.values())
    if "MLFLOW_RUN_ID" in os.environ:
        with open_runs.start("dry run", {"stage": "dry_run"}) as run:
            run.metrics({"summary/predicted_peak_bytes": float(peak)})
    return {name: prediction for name, (_, prediction) in found.items()}
