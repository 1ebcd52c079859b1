"""Configuration of the ``main`` stage: models × arms × seeds."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.attack import NOISE_MATCHES
from healing.config.options import AUTO, listed, option
from healing.config.presets import MODELS_HELP, canonical_model, check_source
from healing.config.shared import (
    BLANK_LINES,
    DEDUPED_HELP,
    HEALER_HELP,
    REVISION_HELP,
    SPLIT_RULE_HELP,
    SPLIT_RULES,
    TEXT_COLUMN_HELP,
    TOKENIZER_HELP,
    CacheOptions,
    DeviceOptions,
    OutputOptions,
    TrainingOptions,
)
from healing.errors import ConfigError
from healing.registry import ARMS


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainingOptions, DeviceOptions, CacheOptions, OutputOptions):
    """Models x arms x seeds: attack and heal each, then summarize."""

    order = (
        ...,
        "batch_size",
        "sequence_length",
        "measurement_interval",
        "workers",
        "device",
        "cache_dir",
        "output_dir",
        "verbosity",
    )

    models: str = option("nano,micro", f"Comma-separated models: {MODELS_HELP}.")
    revision: str = option("", f"Of every model. {REVISION_HELP}")
    deduped: bool = option(False, f"Of every model. {DEDUPED_HELP}")
    arms: str = option(
        "haep,gaussian_noise,spectral", lambda: f"Comma-separated arms: {', '.join(ARMS.names())}."
    )
    seeds: str = option("0,1,2", "Comma-separated seeds; each gives its own checkpoint.")
    noise_match: str = option(
        "loss",
        "What gaussian_noise shares with the haep attack of the same seed: the weight change per "
        "tensor (norm), or the damage: the probe's loss or rank.",
        choices=NOISE_MATCHES,
    )
    sham: bool = option(
        True,
        "Heal the healthy model too, and report every recovery also relative to it (see heal "
        "--sham).",
    )
    basin: bool = option(
        False,
        "Also examine the landscape of every haep and gaussian_noise run (see the basin stage): is "
        "the collapsed state a minimum?",
    )
    healing_steps: int | str = option(
        AUTO,
        "Fine-tuning steps per cell; auto = 60 for nano and micro, else 500; with --healer those "
        "of its budget.",
        minimum=0,
    )
    healing_lr: float | str = option(
        AUTO, "Healing learning rate; auto = by model.", minimum=0, exclusive_minimum=True
    )
    healer: str = option("", f"{HEALER_HELP} Comma-separated, one for each model.")
    attack_steps: int | str = option(AUTO, "Attack budget; auto = by model.", minimum=0)
    corpus: str = option(AUTO, "Clean text (see attack --corpus); auto = by model.")
    workers: int | str = option(
        AUTO,
        "Cells run at a time, in threads; auto = one per CPU core (at most 4) for nano and micro "
        "on the CPU, else 1.",
        minimum=1,
    )
    tokenizer: str = option("", f"Of every model. {TOKENIZER_HELP}")
    text_column: str = option("", TEXT_COLUMN_HELP)
    split_rule: str = option(BLANK_LINES, SPLIT_RULE_HELP, choices=SPLIT_RULES)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.model_list(), self.arm_list(), self.seed_list(), self.healer_list()

    def model_list(self) -> tuple[str, ...]:
        """Model names in the order given, folders as absolute paths."""
        models = tuple(canonical_model(m) for m in listed(self.models, "--models"))
        for model in models:
            check_source(model, self.revision, self.deduped)
        if len(set(models)) < len(models):
            raise ConfigError(f"--models names one folder twice: {self.models}")
        return models

    def arm_list(self) -> tuple[str, ...]:
        """Arms in the order given."""
        arms = listed(self.arms, "--arms", ARMS.names())
        for arm in arms:
            ARMS.check(arm)
        return arms

    def seed_list(self) -> tuple[int, ...]:
        """Seeds in the order given."""
        items = listed(self.seeds, "--seeds")
        if not all(item.isdecimal() for item in items):
            raise ConfigError(
                f"--seeds must be whole numbers from 0, as in 0,1,2; got {self.seeds!r}"
            )
        return tuple(int(item) for item in items)

    def healer_list(self) -> tuple[str, ...]:
        """Healers in the order given."""
        return listed(self.healer, "--healer", empty=True)
