"""Configuration of the ``main`` stage: models × arms × seeds."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.attack import NOISE_MATCHES
from healing.config.options import AUTO, option, validate_fields
from healing.config.presets import MODELS_HELP, canonical_model, check_source
from healing.config.shared import (
    ARMS,
    CACHE_DIR,
    CACHE_HELP,
    DEDUPED_HELP,
    DEVICES_HELP,
    REVISION_HELP,
)
from healing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Models x arms x seeds: attack and heal each, then summarize."""

    models: str = option("nano,micro", f"Comma-separated models: {MODELS_HELP}.")
    revision: str = option("", f"Of every model. {REVISION_HELP}")
    deduped: bool = option(False, f"Of every model. {DEDUPED_HELP}")
    arms: str = option("haep,gaussian_noise,spectral", "Comma-separated arms.")
    seeds: str = option("0,1,2", "Comma-separated seeds; each gives its own checkpoint.")
    noise_match: str = option(
        "loss",
        "What gaussian_noise shares with the haep attack of the same seed: the weight change per "
        "tensor (norm), or the damage: the probe's loss or rank.",
        choices=NOISE_MATCHES,
    )
    sham: bool = option(
        True, "Heal the healthy model too, and refer every recovery to it beside the plain formula."
    )
    basin: bool = option(
        False,
        "Also examine the landscape of every haep and gaussian_noise run (see the basin stage): is "
        "the collapsed state a minimum?",
    )
    healing_steps: int | str = option(
        AUTO,
        "Fine-tuning steps per cell; auto = 60 for nano and micro, else 500.",
        minimum=0,
    )
    healing_lr: float | str = option(
        AUTO, "Healing learning rate; auto = by model.", minimum=0, exclusive_minimum=True
    )
    attack_steps: int | str = option(AUTO, "Attack budget; auto = by model.", minimum=0)
    corpus: str = option(AUTO, "Clean text (see attack --corpus); auto = by model.")
    batch_size: int | str = option(AUTO, "Windows per step; auto = by model.", minimum=1)
    sequence_length: int = option(128, "Tokens per window.", minimum=8, maximum=2048)
    measurement_interval: int = option(10, "Optimiser steps between measurements.", minimum=1)
    workers: int | str = option(
        AUTO,
        "Cells run at a time, in threads; auto = one per CPU core (at most 4) for nano and micro "
        "on the CPU, else 1.",
        minimum=1,
    )
    device: str = option(AUTO, DEVICES_HELP)
    output_dir: str = option("./experiments/results", "Local folder for results.")
    cache_dir: str = option(CACHE_DIR, CACHE_HELP)
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)
        self.model_list(), self.arm_list(), self.seed_list()

    def model_list(self) -> tuple[str, ...]:
        """Model names in the order given, folders as absolute paths."""
        models = tuple(canonical_model(m) for m in _listed(self.models, "--models", None))
        for model in models:
            check_source(model, self.revision, self.deduped)
        if len(set(models)) < len(models):
            raise ConfigError(f"--models names one folder twice: {self.models}")
        return models

    def arm_list(self) -> tuple[str, ...]:
        """Arms in the order given."""
        return _listed(self.arms, "--arms", ARMS)

    def seed_list(self) -> tuple[int, ...]:
        """Seeds in the order given."""
        items = _listed(self.seeds, "--seeds", None)
        if not all(item.isdecimal() for item in items):
            raise ConfigError(
                f"--seeds must be whole numbers from 0, as in 0,1,2; got {self.seeds!r}"
            )
        return tuple(int(item) for item in items)


def _listed(text: str, flag: str, admissible: tuple[str, ...] | None) -> tuple[str, ...]:
    items = tuple(item.strip() for item in text.split(",") if item.strip())
    if not items:
        raise ConfigError(f"{flag} is empty: name at least one")
    unknown = [item for item in items if admissible and item not in admissible]
    if unknown:
        raise ConfigError(
            f"{flag}: unknown {', '.join(unknown)}; choose from {', '.join(admissible or ())}"
        )
    if len(set(items)) < len(items):
        raise ConfigError(f"{flag} names one entry twice: {text}")
    return items
