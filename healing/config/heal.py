"""Configuration of the ``heal`` stage."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from typing import Any, ClassVar

from healing.config.attack import AttackConfig
from healing.config.options import AUTO, Options, flag_name, help_of, option
from healing.config.presets import (
    DEFAULT_MODEL,
    MODELS_HELP,
)
from healing.config.shared import (
    DEDUPED_HELP,
    HEALER_HELP,
    LOGGING,
    OPTIMIZERS,
    REVISION_HELP,
    BaseConfig,
    DryRunOptions,
    SavingOptions,
    TextLoggingOptions,
)
from healing.errors import ConfigError
from healing.registry import ARMS, MEASUREMENTS, METHODS, Facts

NOT_PARALLEL, SHARDED, REPLICATED = PARALLEL = ("none", "fsdp", "ddp")
"""Ways to heal one model: by one process; each process with a part of weights, gradients and
optimiser; each with all of them."""
MOST_RANKS = 1024
WORKS_SHARDED = "SHARDED"
"""Constant of a healing method's or extra measurement's file: whether it works on a model whose
weights are spread over processes."""
DEFAULT_STEPS = 500
DECAYS = ("constant", "cosine", "linear")
PRECISIONS = ("fp32", "bf16", "fp16")
PRECISION_MODES = ("autocast", "pure")


def rate_ratio(method: Facts) -> float:
    """Learning rate of a healing method over that of training all weights."""
    return float(method.get("RATE_RATIO", 1.0))


def _ratios() -> str:
    ratios = {f.name: rate_ratio(f) for f in METHODS.all_facts()}
    return "".join(f"; for {name} {r:g} times that" for name, r in ratios.items() if r != 1.0)


OF_THE_ATTACK = (
    "attack_steps",
    "attack_optimizer",
    "attack_lr",
    "target_rank_reduction",
    "catalyst_length",
    "trajectory_interval",
)
"""Options of the fresh attack, by the names that they have there; ``auto`` is the attack's own
default, so that what is given can be told from what is not. They are no part of a fingerprint: the
collapsed weights are.
"""


def _of_the_attack(name: str, choices: tuple[str, ...] | None = None) -> Any:
    """The attack's own option of this name, with its range."""
    (field,) = (f for f in dataclasses.fields(AttackConfig) if f.name == name)
    default = "" if field.default == AUTO else f" auto = {field.default}."
    kept = ("minimum", "maximum", "exclusive_minimum")
    return option(
        AUTO,
        f"Of the fresh attack, where no checkpoint is given: {help_of(field)}{default}",
        choices=choices,
        determines=False,
        **{key: field.metadata[key] for key in kept},
    )


@dataclass(frozen=True, kw_only=True)
class ParallelOptions(Options):
    """Over how many processes one model is spread."""

    parallel: str = option(
        NOT_PARALLEL,
        "Heal one model by several processes: fsdp = weights, gradients and optimiser in parts "
        "(torch's FSDP2), ddp = whole in each; every batch and the probe are divided among them "
        "(docs/parallel.md). Results are those of one process up to rounding.",
        choices=PARALLEL,
        determines=False,
    )
    ranks: int = option(
        0,
        "parallel: how many processes; 0 = one for each GPU of this machine (on the CPU a number "
        "has to be given), or as many as torchrun has started.",
        minimum=0,
        maximum=MOST_RANKS,
        determines=False,
    )

    @property
    def is_parallel(self) -> bool:
        """Whether there is more to it than one process."""
        return self.parallel != NOT_PARALLEL


def launched() -> bool:
    """Whether torchrun, or another launcher with its variables, has started this process."""
    return {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def follows(config: Any) -> bool:
    """Whether this process was launched as another rank than 0 of what a configuration asks for."""
    return getattr(config, "is_parallel", False) and launched() and os.environ["RANK"] != "0"


def check_parallel(config: Any) -> None:
    """Refuse what cannot be done by several processes, as far as options tell.

    Args:
        config: Of healing.

    Raises:
        ConfigError: Options contradict each other.
    """
    if not config.is_parallel:
        if config.ranks:
            raise ConfigError("--ranks belongs to --parallel: add --parallel fsdp, or leave it out")
        return
    flag = f"--parallel {config.parallel}"
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"{flag} takes a device per process, --device {config.device} is one: say --device cuda"
        )
    if config.precision == "fp16":
        raise ConfigError(
            f"{flag} trains in fp32 or under bf16 autocast: use --precision bf16 or fp32"
        )
    if config.precision_mode == "pure" and config.precision != "fp32":
        raise ConfigError(f"{flag} keeps float32 weights: leave out --precision-mode pure")
    if config.ranks and config.batch_size != "auto":
        check_batch(int(config.batch_size), config.ranks)


def check_batch(batch_size: int, ranks: int) -> None:
    """Every process must have as many windows of a batch as the others: else the mean of their
    gradients is not the batch's.

    Raises:
        ConfigError: It cannot be divided.
    """
    if batch_size % ranks:
        possible = [n for n in range(1, batch_size + 1) if not batch_size % n]
        raise ConfigError(
            f"a batch of {batch_size} windows cannot be divided among {ranks} ranks: use "
            f"--ranks {', '.join(map(str, possible))}, or a --batch-size that is a multiple of "
            f"{ranks}"
        )


@dataclass(frozen=True, kw_only=True)
class HealConfig(BaseConfig, ParallelOptions, SavingOptions, TextLoggingOptions, DryRunOptions):
    """Healing of one checkpoint, of a folder of checkpoints, or of a fresh attack."""

    order = (
        ...,
        "parallel",
        "ranks",
        "checkpoint_interval",
        "checkpoint_minutes",
        "resume_run_id",
        *LOGGING,
        "dry_run",
        "time_steps",
    )
    unresolved: ClassVar[tuple[str, ...]] = (*OF_THE_ATTACK, "time_steps")

    model: str = option(
        AUTO,
        f"Model: {MODELS_HELP}; auto = the model the checkpoint names, else {DEFAULT_MODEL}.",
    )
    revision: str = option("", f"{REVISION_HELP} A checkpoint brings its own.")
    deduped: bool = option(False, f"{DEDUPED_HELP} A checkpoint brings its own.")
    collapsed_checkpoint: str = option(
        "",
        "Checkpoint file to heal: a path, an MLflow URI of a file, or an attack's logged model "
        "(models:/…), which stands for its run's checkpoint.",
        separates=False,
    )
    attack_run_id: str = option(
        "",
        "MLflow attack run whose checkpoint is healed, or its logged model (models:/…).",
        determines=False,
    )
    checkpoint_dir: str = option(
        "",
        "Folder searched for checkpoint_post_treatment.pt; each is healed.",
        determines=False,
    )
    runs_per_checkpoint: int = option(
        1,
        "Healing runs per checkpoint found in --checkpoint-dir.",
        minimum=1,
        maximum=3,
        determines=False,
    )
    num_runs: int = option(
        1,
        "Healing runs (replicates) per checkpoint otherwise.",
        minimum=1,
        maximum=1000,
        determines=False,
    )
    arm: str = option(
        "haep",
        lambda: f"Arm of the fresh attack, where no checkpoint is given. {ARMS.describe()}.",
        choices=ARMS.names,
        separates=False,
    )
    attack_steps: int | str = _of_the_attack("attack_steps")
    attack_optimizer: str = _of_the_attack("attack_optimizer", (AUTO, *OPTIMIZERS))
    attack_lr: float | str = _of_the_attack("attack_lr")
    target_rank_reduction: float | str = _of_the_attack("target_rank_reduction")
    catalyst_length: int | str = _of_the_attack("catalyst_length")
    trajectory_interval: int | str = _of_the_attack("trajectory_interval")
    healing_steps: int | str = option(
        DEFAULT_STEPS,
        "Fine-tuning steps on clean text; auto = as many as the --healer was selected with, "
        f"{DEFAULT_STEPS} without one.",
        minimum=0,
    )
    healing_lr: float | str = option(
        AUTO,
        lambda: f"Learning rate; auto = 1e-3 for nano and micro, else 1e-4{_ratios()}.",
        minimum=0,
        exclusive_minimum=True,
    )
    healing_optimizer: str = option("adamw", "Optimiser of healing.", choices=OPTIMIZERS)
    healing_momentum: float = option(
        0.0, "sgd: momentum of the gradients (heavy ball).", minimum=0, maximum=0.999, later=True
    )
    healing_warmup: float = option(
        0.0,
        "Share of --healing-steps over which the rate rises linearly to --healing-lr.",
        minimum=0,
        maximum=1,
        later=True,
    )
    healing_decay: str = option(
        "constant",
        "The rate after the warm-up: constant, or falling to 0 at the end of --healing-steps along "
        "half a cosine or a line.",
        choices=DECAYS,
        later=True,
    )
    healing_method: str = option(
        "full", lambda: f"What is trained. {METHODS.describe()}.", choices=METHODS.names
    )
    lora_rank: int = option(
        8, "lora: rank r of the change of every matrix.", minimum=1, maximum=2**16
    )
    lora_alpha: float = option(
        16.0,
        "lora: the change is alpha / rank times the product of the adapters.",
        minimum=0,
        exclusive_minimum=True,
    )
    sham: bool = option(
        False,
        "Also report recovery relative to a sham run (the healthy model, fine-tuned the same way; "
        "made once per seed and replicate, and found again in the store).",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    gradient_clip: float = option(0.0, "Largest gradient norm; 0 = no clipping.", minimum=0)
    reset_norms: bool = option(
        False,
        "Set gains and biases of all LayerNorm and RMSNorm layers to those of an untrained model "
        "before the first step.",
        later=True,
    )
    healer: str = option("", HEALER_HELP, determines=False)
    save_healed: bool = option(
        True,
        "Store the healed weights, which basin needs (4 bytes per parameter).",
        determines=False,
    )
    precision: str = option(
        AUTO,
        "Number format of healing; auto = bf16 on an accelerator, fp32 on the CPU.",
        choices=(AUTO, *PRECISIONS),
    )
    precision_mode: str = option(
        "autocast",
        "bf16, fp16: autocast (fp32 master weights) or pure (weights, gradients and optimiser "
        "state in the low format); of no effect for fp32.",
        choices=PRECISION_MODES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given = [
            name
            for name in ("collapsed_checkpoint", "attack_run_id", "checkpoint_dir")
            if getattr(self, name)
        ]
        if len(given) > 1:
            flags = " and ".join(map(flag_name, given))
            raise ConfigError(f"{flags} exclude each other: give one of them")
        if given and (of_the_attack := self.given_of_the_attack()):
            raise ConfigError(
                f"{flag_name(next(iter(of_the_attack)))} is of the fresh attack, and "
                f"{flag_name(given[0])} names a state that was attacked before: leave one of them "
                "out"
            )
        if self.checkpoint_dir and self.num_runs != 1:
            raise ConfigError(
                "--num-runs is not for --checkpoint-dir: say --runs-per-checkpoint there"
            )
        if self.runs_per_checkpoint != 1 and not self.checkpoint_dir:
            raise ConfigError("--runs-per-checkpoint is for --checkpoint-dir: say --num-runs here")
        ARMS.check(self.arm)
        METHODS.check(self.healing_method)
        self._check_method(METHODS.facts(self.healing_method))
        check_parallel(self)
        if self.is_parallel:
            self._check_works_sharded()
        if self.healing_momentum and self.healing_optimizer != "sgd":
            raise ConfigError(
                "--healing-momentum belongs to --healing-optimizer sgd: leave it out with "
                f"--healing-optimizer {self.healing_optimizer}"
            )

    def given_of_the_attack(self) -> dict[str, Any]:
        """The options of the fresh attack that are not left to it."""
        values = {name: getattr(self, name) for name in OF_THE_ATTACK}
        return {name: value for name, value in values.items() if value != AUTO}

    def _check_works_sharded(self) -> None:
        flag = f"--parallel {self.parallel}"
        method = METHODS.facts(self.healing_method)
        if not method.get(WORKS_SHARDED, False):
            raise ConfigError(
                f"{flag} does not go with --healing-method {method.name}: use --healing-method full"
            )
        for name in self.measurement_list():
            if not MEASUREMENTS.facts(name).get(WORKS_SHARDED, False):
                raise ConfigError(
                    f"--measurements {name} needs all weights in one process, {flag} spreads "
                    "them: leave it out"
                )

    def _check_method(self, method: Facts) -> None:
        rounds = self.precision_mode == "pure" and self.precision != "fp32"
        if rounds and method.get("KEEPS_WEIGHTS", False):
            raise ConfigError(
                f"--healing-method {method.name} keeps the weights, --precision-mode pure rounds "
                "them: use --precision-mode autocast"
            )
        by_ratio = self.healing_lr == AUTO and rate_ratio(method) != 1.0
        if by_ratio and self.healing_optimizer != "adamw":
            raise ConfigError(
                f"--healing-lr auto is AdamW's for --healing-method {method.name}: give a number "
                f"with --healing-optimizer {self.healing_optimizer}"
            )
