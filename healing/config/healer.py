"""A healer that was selected: frozen settings of healing, and what they were selected on."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from healing.config.fingerprint import fingerprint
from healing.config.heal import HealConfig
from healing.config.options import AUTO, MAX_SEED, MAX_TEXT, flag_name
from healing.errors import ConfigError
from healing.registry import NAME

HEALER_NAME = "healer.json"
"""Name of the file, in a tune run's folder and among its artifacts."""
SETTINGS = (
    "healing_lr",
    "healing_optimizer",
    "healing_momentum",
    "healing_warmup",
    "healing_decay",
    "healing_method",
    "lora_rank",
    "lora_alpha",
    "gradient_clip",
    "reset_norms",
    "batch_size",
    "sequence_length",
)
"""Fields of :class:`HealConfig` that a healer decides. How long it heals is no part of it."""
INCLUDED = pathlib.Path(__file__).parent / "healers"


def included_healers() -> tuple[str, ...]:
    """Names of the healers that come with the project."""
    return tuple(sorted(path.stem for path in INCLUDED.glob("*.json")))


def _is_typed(entries: Mapping[str, Any]) -> bool:
    """Whether every entry of a healer's file, which anybody may have written, is of its type."""
    settings, arms, seeds = (entries[name] for name in ("settings", "arms", "seeds"))
    if not isinstance(settings, Mapping) or set(settings) != set(SETTINGS):
        return False
    sizes = (settings["batch_size"], settings["sequence_length"], entries["token_budget"])
    counts = (*sizes, entries["tried"])
    texts = (entries["model"], entries["study"], entries["study_digest"])
    numbers = ("loss", "default_loss", "rank_recovery_pct", "default_rank_recovery_pct")
    return (
        all(type(count) is int and 0 < count < 2**63 for count in counts)
        and type(entries["trial"]) is int
        and all(isinstance(text, str) and len(text) <= MAX_TEXT for text in texts)
        and all(type(entries[name]) in (int, float) for name in numbers)
        and isinstance(arms, (list, tuple))
        and all(isinstance(arm, str) and NAME.fullmatch(arm) for arm in arms)
        and isinstance(seeds, (list, tuple))
        and all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in seeds)
    )


@dataclass(frozen=True, kw_only=True)
class Healer:
    """The winner of a search for the strongest healer.

    Attributes:
        settings: Every field of :data:`SETTINGS` and its value.
        model: Label of the model whose collapsed states it was selected on.
        arms: Of the attacks that made them.
        seeds: Of these attacks and of healing them: no verdict may rest on them.
        tried: Healers that were tried, itself, the default and those ended early included.
        token_budget: Training tokens that each was given per checkpoint.
        loss: Its final loss on the probe, mean over the selection checkpoints, nats per token.
        default_loss: The default healer's.
        rank_recovery_pct: Its rank recovery, mean over the same; no part of the selection.
        default_rank_recovery_pct: The default healer's.
        trial: Its number in the study.
        study: Name of the study.
        study_digest: Hash of the study: what was searched, and every trial with its result.
    """

    settings: Mapping[str, Any]
    model: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    tried: int
    token_budget: int
    loss: float
    default_loss: float
    rank_recovery_pct: float
    default_rank_recovery_pct: float
    trial: int
    study: str
    study_digest: str

    @classmethod
    def of(cls, entries: Mapping[str, Any], source: str) -> Healer:
        """From the content of its file.

        Raises:
            ConfigError: It is not such a file, or a setting is not admissible.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        wrong = f"--healer {source} is not a {HEALER_NAME} of the tune entry point"
        is_whole = isinstance(entries, Mapping) and set(entries) == names
        if not is_whole or not _is_typed(entries):
            raise ConfigError(f"{wrong} (its entries are others): name another, or tune again")
        found = cls(**{**entries, "arms": tuple(entries["arms"]), "seeds": tuple(entries["seeds"])})
        try:
            HealConfig(**found.settings)
        except ConfigError as error:
            raise ConfigError(f"{wrong}: {error}") from error
        return found

    def entries(self) -> dict[str, Any]:
        """Content of its file."""
        return dataclasses.asdict(self)

    @property
    def digest(self) -> str:
        """Hash of everything above (16 hex digits)."""
        numbers = {k: repr(v) if isinstance(v, float) else v for k, v in self.entries().items()}
        return fingerprint(numbers)

    @property
    def steps(self) -> int:
        """Optimiser steps of the budget that it was selected with."""
        return self.token_budget // (self.settings["batch_size"] * self.settings["sequence_length"])

    def tags(self) -> dict[str, Any]:
        """Of a healing run that uses it."""
        arms, seeds = ", ".join(self.arms), ", ".join(map(str, self.seeds))
        return {
            "healer": self.digest,
            "healers_tried": self.tried,
            "healer_budget_tokens": self.token_budget,
            "healer_selection": f"{self.model}, arms {arms}, seeds {seeds}",
        }

    def applied(self, config: HealConfig) -> HealConfig:
        """The configuration with its settings; ``auto`` steps are those of its budget.

        A setting that has its default value counts as not given.

        Raises:
            ConfigError: A setting that was given contradicts it.
        """
        plain = HealConfig()
        for name, value in self.settings.items():
            given = getattr(config, name)
            if given not in (value, getattr(plain, name)):
                raise ConfigError(
                    f"{flag_name(name)} {given} contradicts --healer {config.healer}, whose "
                    f"{flag_name(name)} is {value}: leave one of the two out"
                )
        steps = self.steps if config.healing_steps == AUTO else config.healing_steps
        return replace(config, **self.settings, healing_steps=steps)

    def check_use(self, source: str, model: str, seeds: Iterable[int]) -> None:
        """Refuse what it cannot be judged on.

        Args:
            source: As it was named, for the message.
            model: Label of the model that is healed.
            seeds: Of attack and healing.

        Raises:
            ConfigError: Another model, or a seed that it was selected on.
        """
        if model != self.model:
            raise ConfigError(
                f"--healer {source} was selected on {self.model}, and its rates are that model's: "
                f"tune one for {model}, or give the settings as options"
            )
        again = sorted(set(seeds) & set(self.seeds))
        if again:
            listed = ", ".join(map(str, again))
            raise ConfigError(
                f"seed {listed} has selected --healer {source}: judge it on seeds other than "
                f"{', '.join(map(str, self.seeds))}"
            )
