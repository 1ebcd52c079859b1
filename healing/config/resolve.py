"""Resolution of ``auto`` from the presets."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from healing.config.heal import DEFAULT_STEPS, rate_ratio
from healing.config.options import AUTO
from healing.config.presets import (
    DEFAULT_MODEL,
    HUB,
    MAIN,
    PYTHIA,
    PYTHIA_HIDDEN,
    canonical_model,
    model_kind,
    preset_for,
    probe_tokens_for,
)
from healing.config.shared import BaseConfig
from healing.registry import METHODS

ConfigT = TypeVar("ConfigT", bound=BaseConfig)


def resolve_from_presets(config: ConfigT, *, accelerated: bool = False) -> ConfigT:
    """Replace every ``auto`` by the preset of the configuration's model.

    The device stays ``auto``: which accelerator exists is not a property of the experiment. So does
    the probe's size where only the model's own files tell its hidden size
    (:func:`healing.stages.cells.inputs.resolve_from_model`).

    Args:
        config: Of any stage that loads a model.
        accelerated: Whether it runs on an accelerator that has bf16, which is then the format.

    Raises:
        ConfigError: Unknown model.
    """
    model = DEFAULT_MODEL if config.model == AUTO else config.model
    preset = preset_for(model)
    values: dict[str, Any] = {"model": canonical_model(model)}
    if not config.revision and model_kind(model) in (PYTHIA, HUB):
        values["revision"] = MAIN
    for field in dataclasses.fields(config):
        is_auto = getattr(config, field.name) == AUTO and field.name not in config.unresolved
        if is_auto and hasattr(preset, field.name):
            values[field.name] = getattr(preset, field.name)
    if getattr(config, "healing_steps", "") == AUTO and hasattr(config, "healing_method"):
        values["healing_steps"] = DEFAULT_STEPS
    if getattr(config, "precision", "") == AUTO:
        values["precision"] = "bf16" if accelerated else "fp32"
    if "attack_lr" in values and getattr(config, "attack_optimizer", "") == "sgd":
        values["attack_lr"] = preset.attack_sgd_lr
    if "healing_lr" in values and hasattr(config, "healing_method"):
        values["healing_lr"] = rate_ratio(METHODS.facts(config.healing_method)) * preset.healing_lr
    if "probe_tokens" in values and model in PYTHIA_HIDDEN:
        hidden = PYTHIA_HIDDEN[model]
        values["probe_tokens"] = probe_tokens_for(hidden, config.sequence_length)
    return dataclasses.replace(config, **values)
