"""Configuration of the ``main`` stage: models × arms × seeds."""

from __future__ import annotations

from dataclasses import dataclass, fields

from healing.config.arm_tags import arm_matches, arm_needs, arm_role
from healing.config.attack import NOISE_RANK_HELP, TRAJECTORY_HELP
from healing.config.options import (
    AUTO,
    MAX_SEED,
    Options,
    flag_name,
    listed,
    option,
    seed_number,
)
from healing.config.presets import MODELS_HELP, canonical_model, check_source
from healing.config.shared import (
    BLANK_LINES,
    DEDUPED_HELP,
    HEALER_HELP,
    LOGGING,
    REVISION_HELP,
    SPLIT_RULE_HELP,
    SPLIT_RULES,
    TEXT_COLUMN_HELP,
    TOKENIZER_HELP,
    CacheOptions,
    DeviceOptions,
    OutputOptions,
    SavingOptions,
    TextLoggingOptions,
    TrainingOptions,
)
from healing.errors import ConfigError
from healing.registry import ARMS, DAMAGE_CONTROL, MATCHES

SEEDS_OF, OTHER_SEEDS = {"nano": 5, "micro": 2}, 3
"""Checkpoints per arm by default: as many as a verdict needs where they cost little."""
NO_HEALER = "none"
MAX_SEEDS = 10_000
"""Seeds of one range."""

LOCAL, RAY = LAUNCHERS = ("local", "ray")
"""Where the cells of a sweep are run."""


@dataclass(frozen=True, kw_only=True)
class LaunchOptions(Options):
    """Where cells are run, and what each may take there."""

    launcher: str = option(
        LOCAL,
        "Where cells are run: in threads of this process (local), or on the machines of a Ray "
        "cluster (ray; docs/cluster.md).",
        choices=LAUNCHERS,
        determines=False,
    )
    ray_address: str = option(
        "",
        "launcher ray: auto = the cluster of this machine, HOST:PORT, or ray://HOST:PORT; empty = "
        "one is started here, and ends with the command.",
        determines=False,
    )
    worker_cpus: int | str = option(
        AUTO,
        "launcher ray: CPUs of a cell; auto = 1 for nano and micro and on an accelerator, else all "
        "of the smallest machine.",
        minimum=1,
        maximum=1024,
        determines=False,
    )
    worker_gpus: float | str = option(
        AUTO,
        "launcher ray: GPUs of a cell, or a part of one (0.25); auto = 1 where the cluster has any "
        "and --device is not cpu.",
        minimum=0,
        maximum=1,
        determines=False,
    )
    worker_memory: float | str = option(
        AUTO,
        "launcher ray: memory of a cell in GB; auto = as predicted (see --dry-run of attack and "
        "heal) on the CPU, else not asked for; 0 = not asked for.",
        minimum=0,
        maximum=2**20,
        determines=False,
    )
    worker_dir: str = option(
        "",
        "launcher ray: folder of every machine in which cells keep files while they compute; "
        "empty = the system's temporary folder.",
        determines=False,
    )
    retries: int = option(
        2,
        "launcher ray: so often a cell is tried again whose worker or machine died.",
        minimum=0,
        maximum=100,
        determines=False,
    )
    ending_seconds: float = option(
        15.0,
        "launcher ray: that cells have, once the command is told to stop, to come to a safe point "
        "and store their states, three times the weights with AdamW; what takes longer is killed.",
        minimum=1,
        maximum=3600,
        determines=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.launcher == RAY:
            return
        for name in ("ray_address", "worker_dir"):
            if given := getattr(self, name):
                raise ConfigError(
                    f"{flag_name(name)} {given} is for --launcher ray: add it, or leave this out"
                )


LAUNCHING = tuple(field.name for field in fields(LaunchOptions))
"""Fields of the above."""


@dataclass(frozen=True, kw_only=True)
class SweepConfig(
    TrainingOptions,
    DeviceOptions,
    CacheOptions,
    OutputOptions,
    SavingOptions,
    TextLoggingOptions,
    LaunchOptions,
):
    """Models x arms x seeds: attack and heal each, then summarize."""

    order = (
        ...,
        "batch_size",
        "sequence_length",
        "measurement_interval",
        "workers",
        *LAUNCHING,
        "device",
        "cache_dir",
        "output_dir",
        "verbosity",
        "checkpoint_interval",
        "checkpoint_minutes",
        "resume_run_id",
        *LOGGING,
    )

    models: str = option("nano,micro", f"Comma-separated models: {MODELS_HELP}.")
    revision: str = option("", f"Of every model. {REVISION_HELP}")
    deduped: bool = option(False, f"Of every model. {DEDUPED_HELP}")
    arms: str = option(
        "haep,random_tokens,random_text",
        lambda: f"Comma-separated arms. {ARMS.describe()}.",
    )
    seeds: str = option(
        AUTO,
        "Comma-separated seeds or ranges of them (0-4); each gives its own checkpoint. After "
        "MODEL= those of one model: 0-2,nano=0-9; auto = 0-4 for nano, 0-1 for micro, else 0-2.",
    )
    noise_match: str = option(
        AUTO,
        "What damage controls share with the haep attack of the same seed: the weight change per "
        "tensor (norm), or the damage: the probe's loss, rank, or both; auto = rank, but loss for "
        "gaussian_noise and norm for rotated_change, which leave the rank too high at every "
        "strength.",
        choices=(AUTO, *MATCHES),
    )
    noise_rank: int = option(1, NOISE_RANK_HELP, minimum=1, maximum=2**16)
    control_draws: int = option(
        1,
        "Checkpoints of every damage control that draws noise, per haep attack: each is another "
        "draw.",
        minimum=1,
        maximum=1000,
    )
    ray_of: str = option(
        "random_text",
        "ray: which of the arms gives the direction, by its attack of the same seed.",
        choices=ARMS.names,
    )
    sham: bool = option(
        True,
        "Heal the healthy model too, and report every recovery also relative to it (see heal "
        "--sham).",
    )
    basin: bool = option(
        False,
        "Also examine the landscape of every haep and damage control run, of several draws the "
        "first (see the basin stage): is the collapsed state a minimum?",
    )
    healing_steps: int | str = option(
        AUTO,
        "Fine-tuning steps per cell; auto = those of the healer's budget, without one 60 for nano "
        "and micro, else 500.",
        minimum=0,
    )
    healing_lr: float | str = option(
        AUTO, "Healing learning rate; auto = by model.", minimum=0, exclusive_minimum=True
    )
    healer: str = option(
        AUTO,
        f"{HEALER_HELP} Comma-separated, one for each model. none = the model's default rate, "
        "constant; auto = the included one of each model that has one, unless a setting that it "
        "decides (rate, batch size, window) is given; else none.",
    )
    attack_steps: int | str = option(AUTO, "Attack budget; auto = by model.", minimum=0)
    trajectory_interval: int | str = option(AUTO, TRAJECTORY_HELP, minimum=0, determines=False)
    corpus: str = option(AUTO, "Clean text (see attack --corpus); auto = by model.", required=True)
    workers: int | str = option(
        AUTO,
        "Cells run at a time; auto = one per CPU core (at most 4) for nano and micro on the CPU, "
        "else 1; with --launcher ray as many as the cluster holds.",
        minimum=1,
        maximum=256,
    )
    tokenizer: str = option("", f"Of every model. {TOKENIZER_HELP}")
    text_column: str = option("", TEXT_COLUMN_HELP)
    split_rule: str = option(BLANK_LINES, SPLIT_RULE_HELP, choices=SPLIT_RULES)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.launcher == RAY and self.device.startswith("cuda:"):
            raise ConfigError(
                f"--device {self.device} with --launcher ray: Ray chooses the GPU of each cell; "
                "give cuda"
            )
        self._check_controls()
        self.seeds_by_model()
        self.healer_list()

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

    def _check_controls(self) -> None:
        arms = self.arm_list()
        for arm in arms:
            if "direction" in arm_needs(arm) and self.ray_of not in arms:
                raise ConfigError(
                    f"--arms names {arm}, whose direction is that of {self.ray_of} (--ray-of): add "
                    f"{self.ray_of} to --arms"
                )
            matches = (AUTO, *arm_matches(arm))
            if arm_role(arm) == DAMAGE_CONTROL and self.noise_match not in matches:
                raise ConfigError(
                    f"--noise-match {self.noise_match} is not for {arm} of --arms: choose from "
                    f"{', '.join(matches)}"
                )

    def healer_list(self) -> tuple[str, ...]:
        """Healers in the order given; none for ``none`` and for ``auto``."""
        healers = listed(self.healer, "--healer")
        if len(healers) > 1 and (alone := {AUTO, NO_HEALER} & set(healers)):
            raise ConfigError(
                f"--healer {self.healer} names {alone.pop()} beside others: give one of the two"
            )
        return () if healers in ((AUTO,), (NO_HEALER,)) else healers

    def match_of(self, arm: str) -> str:
        """What a damage control shares with the attack that it is matched to."""
        return arm_matches(arm)[0] if self.noise_match == AUTO else self.noise_match

    def seeds_by_model(self) -> dict[str, tuple[int, ...]]:
        """Model → its seeds, in the order given.

        Raises:
            ConfigError: What is no seed, a seed that is there twice, a model that is not among
                --models or has none.
        """
        if self.seeds == AUTO:
            return {
                name: tuple(range(SEEDS_OF.get(name, OTHER_SEEDS))) for name in self.model_list()
            }
        given: dict[str, list[int]] = {}
        model = ""
        for entry in listed(self.seeds, "--seeds"):
            name, named, seeds = entry.rpartition("=")
            if named:
                model = canonical_model(name.strip())
                if model in given:
                    raise ConfigError(f"--seeds names model {name} twice: {self.seeds}")
            wanted = _range(seeds.strip(), self.seeds)
            if len(wanted) > MAX_SEEDS:
                raise ConfigError(
                    f"--seeds {self.seeds} are more than {MAX_SEEDS} seeds of a model: name fewer"
                )
            given.setdefault(model, []).extend(wanted)
        models = self.model_list()
        if unknown := [name for name in given if name and name not in models]:
            raise ConfigError(f"--seeds names {unknown[0]}, which is not among --models")
        found = {name: tuple(given.get(name, given.get("", ()))) for name in models}
        for name, own in found.items():
            if not own:
                raise ConfigError(f"--seeds has none for model {name}: {self.seeds}")
            if len(set(own)) < len(own):
                raise ConfigError(f"--seeds names one entry twice: {self.seeds}")
        return found

    def seeds_text(self) -> str:
        """The seeds in words that a person reads: as given; of ``auto`` those of each model."""
        if self.seeds != AUTO:
            return self.seeds
        found: dict[str, list[str]] = {}
        for name, own in self.seeds_by_model().items():
            span = f"{own[0]}-{own[-1]}" if len(own) > 1 else str(own[0])
            found.setdefault(span, []).append(name)
        if len(found) == 1:
            return next(iter(found))
        return ", ".join(f"{span} ({' and '.join(names)})" for span, names in found.items())


def _range(text: str, whole: str) -> range:
    """One seed, or those from a first to a last."""
    first, dash, last = text.partition("-")
    seeds = [seed_number(part) for part in (first, last if dash else first)]
    if None in seeds or not seeds[0] <= seeds[1]:  # type: ignore[operator]
        raise ConfigError(
            f"--seeds must be whole numbers from 0 or ranges, as in 0,1,2 or 0-4; got {whole!r} "
            f"(at most {MAX_SEED})"
        )
    return range(seeds[0], seeds[1] + 1)  # type: ignore[arg-type, operator]
