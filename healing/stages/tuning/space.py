"""What can be tried: axes with their values, and the healing that a choice of values means."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from healing.config.heal import DECAYS, HealConfig, rate_ratio
from healing.config.presets import preset_for
from healing.config.shared import OPTIMIZERS
from healing.config.tune import (
    BATCH,
    CLIP,
    DECAY,
    METHOD,
    NORMS,
    OPTIMIZER,
    RATE,
    WARMUP,
    TuneConfig,
)
from healing.randomness import named_generator
from healing.registry import METHODS

Values = Mapping[str, Any]
"""Axis → value of one healer."""


@dataclass(frozen=True)
class Axis:
    """One thing that healers differ in.

    Attributes:
        name: Of the axis.
        choices: Its values; empty where any number of an interval is one.
        low: End of that interval, on a log scale.
        high: Its other end.
    """

    name: str
    choices: tuple[Any, ...] = ()
    low: float = math.nan
    high: float = math.nan

    def grid(self, points: int) -> tuple[Any, ...]:
        """Its values, or as many of the interval, evenly on the log scale, ends included."""
        if self.choices:
            return self.choices
        ratio = self.high / self.low
        return tuple(self.low * ratio ** (i / (points - 1)) for i in range(points))


def axes_of(config: TuneConfig) -> tuple[Axis, ...]:
    """The axes that a configuration asks for."""
    choices = {
        OPTIMIZER: lambda: OPTIMIZERS,
        WARMUP: lambda: config.choices(WARMUP),
        DECAY: lambda: DECAYS,
        CLIP: lambda: config.choices(CLIP),
        BATCH: lambda: config.choices(BATCH),
        NORMS: lambda: (False, True),
        METHOD: lambda: ("full", "lora"),
    }
    return tuple(
        Axis(name, low=config.rate_lowest, high=config.rate_highest)
        if name == RATE
        else Axis(name, choices[name]())
        for name in config.axis_list()
    )


def default_values(config: TuneConfig) -> dict[str, Any]:
    """The default healer of the model, on every axis."""
    return {
        RATE: 1.0,
        OPTIMIZER: "adamw",
        WARMUP: 0.0,
        DECAY: "constant",
        CLIP: 0.0,
        BATCH: config.default_batch,
        NORMS: False,
        METHOD: "full",
    }


def settings_of(config: TuneConfig, values: Values) -> dict[str, Any]:
    """The fields of :class:`HealConfig` that a healer decides; the default's where it says nothing.

    The rate is relative to the default one of model, method and optimiser, so that one interval
    suits all of them.
    """
    v = {**default_values(config), **values}
    sgd = v[OPTIMIZER] == "sgd"
    default_rate = preset_for(config.model).healing_lr * rate_ratio(METHODS.facts(v[METHOD]))
    plain = HealConfig()
    return {
        "healing_lr": v[RATE] * default_rate * (config.sgd_rate_ratio if sgd else 1.0),
        "healing_optimizer": v[OPTIMIZER],
        "healing_momentum": config.sgd_momentum if sgd else 0.0,
        "healing_warmup": v[WARMUP],
        "healing_decay": v[DECAY],
        "healing_method": v[METHOD],
        "lora_rank": plain.lora_rank,
        "lora_alpha": plain.lora_alpha,
        "gradient_clip": v[CLIP],
        "reset_norms": v[NORMS],
        "batch_size": v[BATCH],
        "sequence_length": config.sequence_length,
    }


def grid_points(config: TuneConfig) -> list[dict[str, Any]]:
    """Every combination but the default one, in an order that the seed draws."""
    axes = axes_of(config)
    combinations = itertools.product(*(axis.grid(config.grid_rates) for axis in axes))
    points = [dict(zip([a.name for a in axes], values, strict=True)) for values in combinations]
    plain = default_values(config)
    others = [point for point in points if point != {name: plain[name] for name in point}]
    order = torch.randperm(len(others), generator=named_generator(config.seed, "grid"))
    return [others[i] for i in order.tolist()]
