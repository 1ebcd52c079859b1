"""Frozen configurations of every stage, the presets per model size, and their validation.

Standard library only: a configuration can be built, checked, hashed and pickled without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeVar

from healing.options import AUTO, ConfigError, option, validate_fields

ARMS = (
    "haep",
    "haep_oracle",
    "spectral",
    "random_tokens",
    "random_text",
    "gaussian_noise",
    "none",
)
TREATMENT, CONTROL, SHAM = "haep", "gaussian_noise", "none"
NOISE_MATCHES = ("norm", "loss", "rank")
OPTIMIZERS = ("adamw", "sgd")
SUBSPACES = ("singular", "hessian")
PRECISIONS = ("fp32", "bf16", "fp16")
PRECISION_MODES = ("autocast", "pure")
DEVICES_HELP = "auto (accelerator if there is one), cpu, cuda, cuda:N or mps."
RAW_DATA = "priority5_healing/raw_data"
"""Folder below ``output_dir`` that holds one folder per run."""


@dataclass(frozen=True)
class Preset:
    """What differs by model size; every value can be overridden from the command line.

    Attributes:
        source: ``embedded``, or the model's id on the Hugging Face Hub.
        corpus: Where clean text comes from unless the user says otherwise.
        probe_tokens: Tokens of the frozen probe, at least 4 × hidden size.
        batch_size: Windows per fine-tuning step.
        attack_lr: AdamW learning rate of the attack.
        attack_sgd_lr: SGD learning rate of the attack.
        attack_steps: Attack budget, in optimiser steps.
        healing_lr: Learning rate of healing.
        sweep_healing_steps: Healing steps per cell of the default ``main`` sweep.
        threads: CPU threads of torch; 0 = torch's default.
    """

    source: str
    corpus: str
    probe_tokens: int
    batch_size: int
    attack_lr: float
    attack_sgd_lr: float
    attack_steps: int
    healing_lr: float
    sweep_healing_steps: int
    threads: int


_EMBEDDED = {
    "nano": Preset("embedded", "stdlib", 4096, 8, 2e-2, 0.2, 40, 1e-3, 60, 1),
    "micro": Preset("embedded", "stdlib", 4096, 8, 2e-2, 0.2, 40, 1e-3, 60, 1),
}
_PYTHIA = {
    size: Preset(f"EleutherAI/pythia-{size}", "pile", tokens, 8, 1e-3, 1e-1, 100, 1e-4, 500, 0)
    for size, tokens in {
        "70m": 8192,
        "160m": 8192,
        "410m": 8192,
        "1b": 8192,
        "1.4b": 8192,
        "2.8b": 10240,
    }.items()
}
PRESETS: dict[str, Preset] = {**_EMBEDDED, **_PYTHIA}
MODELS = tuple(PRESETS)
DEFAULT_MODEL = "1b"

NOT_DETERMINING = frozenset(
    {
        "device",
        "output_dir",
        "verbosity",
        "num_runs",
        "runs_per_checkpoint",
        "checkpoint_dir",
        "attack_run_id",
        "reference_checkpoint",
        "reference_run_id",
        "save_healed",
    }
)
"""Fields left out of a cell's fingerprint: they change no number, or what they name does and is put
in where it is known (the kind of device, a reference's weights)."""


def preset_for(model: str) -> Preset:
    """The preset of a model name.

    Raises:
        ConfigError: The name is not one of :data:`MODELS`.
    """
    if model not in PRESETS:
        raise ConfigError(f"unknown model {model!r}: choose one of {', '.join(MODELS)}")
    return PRESETS[model]


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What every stage that loads a model shares."""

    model: str = option(DEFAULT_MODEL, f"Model size: {', '.join(MODELS)}.")
    corpus: str = option(
        AUTO,
        "Clean text: stdlib, pile, a .txt/.jsonl/.parquet file or folder, or a Hub dataset id; "
        "auto = stdlib for embedded models, pile for Pythia.",
    )
    max_documents: int = option(
        20_000, "Documents read from the corpus at most (a stream stops there).", minimum=1
    )
    seed: int = option(0, "Seed of every named random stream.", minimum=0, maximum=2**31 - 1)
    batch_size: int | str = option(
        AUTO, "Windows per optimiser step; auto = by model (8).", minimum=1
    )
    sequence_length: int = option(
        128, "Tokens per window, in training and on the probe.", minimum=8, maximum=2048
    )
    probe_tokens: int | str = option(
        AUTO, "Tokens of the frozen probe; auto = by model, at least 4 x hidden size.", minimum=64
    )
    measurement_interval: int = option(10, "Optimiser steps between measurements.", minimum=1)
    threads: int | str = option(
        AUTO,
        "CPU threads of torch; 0 = torch's default, auto = 1 for nano and micro (reproducible on "
        "any number of cores), else 0.",
        minimum=0,
    )
    device: str = option(AUTO, DEVICES_HELP)
    output_dir: str = option("./experiments/results", "Local folder for results.")
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)
        if self.model != AUTO:
            preset_for(self.model)


@dataclass(frozen=True, kw_only=True)
class AttackConfig(BaseConfig):
    """One attack: a healthy model, an arm, a budget."""

    arm: str = option("haep", "Way of hurting the model.", choices=ARMS)
    attack_steps: int | str = option(AUTO, "Budget in optimiser steps; auto = by model.", minimum=0)
    attack_optimizer: str = option(
        "adamw", "Optimiser of the arms that descend an objective.", choices=OPTIMIZERS
    )
    attack_lr: float | str = option(
        AUTO,
        "Learning rate of the attack; auto = by model and optimiser.",
        minimum=0,
        exclusive_minimum=True,
    )
    warmup_steps: int = option(
        0,
        "Clean batches that AdamW's second moment sees before the attack; the weights stay.",
        minimum=0,
    )
    target_rank_reduction: float = option(
        0.35,
        "Stop once the effective rank on the clean probe fell by this share (0 to 1); "
        "1 = use the whole budget.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    catalyst_length: int = option(
        16, "Tokens of the sequence the attack trains on.", minimum=8, maximum=2048
    )
    search_steps: int = option(
        12, "Rounds of the catalyst search (haep); 0 = keep the random start.", minimum=0
    )
    search_candidates: int = option(
        12, "Token swaps re-evaluated per round of the catalyst search.", minimum=1
    )
    baseline_draws: int = option(
        24, "Random sequences that the catalyst's alignment is compared with.", minimum=3
    )
    subspace: str = option(
        "singular",
        "Low-curvature subspace: the complement of each weight matrix's leading singular "
        "directions, or of the leading eigenvectors of the clean loss's Hessian.",
        choices=SUBSPACES,
    )
    subspace_energy: float = option(
        0.99,
        "singular: share of each weight matrix's energy in its leading directions.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    hessian_directions: int = option(
        16, "hessian: leading eigenvectors left out of the subspace.", minimum=1
    )
    curvature_tokens: int = option(
        1024, "Tokens of the attack split that the Hessian is taken on.", minimum=8
    )
    rayleigh_draws: int = option(
        16,
        "haep, haep_oracle: random directions that the curvature along the gradient is ranked "
        "among; 0 = not measured.",
        minimum=0,
    )
    reference_checkpoint: str = option(
        "",
        "gaussian_noise: attack checkpoint that the noise is matched to; empty = noise_scale is "
        "used.",
    )
    reference_run_id: str = option("", "gaussian_noise: the same, given as an MLflow attack run.")
    match: str = option(
        "norm",
        "gaussian_noise with a reference: equal weight change per tensor (norm), or one scale for "
        "all tensors at which the probe's loss or rank is the reference's within 2 %.",
        choices=NOISE_MATCHES,
    )
    noise_scale: float = option(
        1.0,
        "gaussian_noise without a reference: standard deviation of the noise over that of "
        "each tensor.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_reference()
        if self.warmup_steps and self.attack_optimizer != "adamw":
            raise ConfigError(
                "--warmup-steps prepares AdamW's second moment: leave it out with "
                f"--attack-optimizer {self.attack_optimizer}"
            )

    def _check_reference(self) -> None:
        given = [n for n in ("reference_checkpoint", "reference_run_id") if getattr(self, n)]
        flags = ["--" + name.replace("_", "-") for name in given]
        if given and self.arm != "gaussian_noise":
            raise ConfigError(f"{flags[0]} belongs to --arm gaussian_noise, not to {self.arm}")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(flags)} exclude each other: give one of them")
        if self.match != "norm" and not given:
            raise ConfigError(
                f"--match {self.match} needs the attack to match: give --reference-run-id or "
                "--reference-checkpoint with --arm gaussian_noise"
            )


@dataclass(frozen=True, kw_only=True)
class HealConfig(BaseConfig):
    """Healing of one checkpoint, of a folder of checkpoints, or of a fresh attack."""

    model: str = option(
        AUTO,
        f"Model size: {', '.join(MODELS)}; auto = the model the checkpoint names, "
        f"else {DEFAULT_MODEL}.",
    )
    collapsed_checkpoint: str = option("", "Checkpoint file to heal (a path or an MLflow URI).")
    attack_run_id: str = option("", "MLflow attack run whose checkpoint is healed.")
    checkpoint_dir: str = option(
        "", "Folder searched for checkpoint_post_treatment.pt; each is healed."
    )
    runs_per_checkpoint: int = option(
        1, "Healing runs per checkpoint found in --checkpoint-dir.", minimum=1, maximum=3
    )
    num_runs: int = option(1, "Healing runs (replicates) per checkpoint otherwise.", minimum=1)
    arm: str = option(
        "haep", "Arm of the fresh attack, where no checkpoint is given.", choices=ARMS
    )
    healing_steps: int = option(500, "Fine-tuning steps on clean text.", minimum=0)
    healing_lr: float | str = option(
        AUTO,
        "Learning rate; auto = 1e-4 for Pythia sizes, 1e-3 for nano and micro.",
        minimum=0,
        exclusive_minimum=True,
    )
    healing_optimizer: str = option("adamw", "Optimiser of healing.", choices=OPTIMIZERS)
    sham: bool = option(
        False,
        "Also refer recovery to the sham: the healthy model through the same fine-tuning (healed "
        "once per seed and replicate, and found again in the store).",
    )
    gradient_checkpointing: bool = option(False, "Recompute activations to save memory.")
    gradient_clip: float = option(0.0, "Largest gradient norm; 0 = no clipping.", minimum=0)
    save_healed: bool = option(
        True, "Store the healed weights, which basin needs (4 bytes per parameter)."
    )
    precision: str = option("fp32", "Number format of healing.", choices=PRECISIONS)
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
            flags = " and ".join("--" + name.replace("_", "-") for name in given)
            raise ConfigError(f"{flags} exclude each other: give one of them")


@dataclass(frozen=True, kw_only=True)
class SummarizeConfig:
    """Which healing runs to pool, and how."""

    experiment: str = option(
        "", "MLflow experiment (name or id) that holds the healing runs; empty = the current one."
    )
    filter: str = option(
        "", "MLflow filter string added to the query, e.g. \"tags.model = 'nano'\"."
    )
    legacy: bool = option(
        False, "Summarize the predecessor's imported runs; they are never pooled with others."
    )
    confidence: float = option(
        0.95, "Confidence level of the intervals.", minimum=0.5, maximum=0.999
    )
    output_dir: str = option("./experiments/results", "Local folder for results.")
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Recorded results of the predecessor to read into MLflow."""

    folder: str = option("", "Folder of the predecessor's results, searched at any depth.")
    output_dir: str = option("./experiments/results", "Local folder for the report.")
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Training of an embedded model from nothing."""

    model: str = option("nano", "Embedded model to train.", choices=("nano", "micro"))
    corpus: str = option("stdlib", "Text to train on (see attack --corpus).")
    max_documents: int = option(20_000, "Documents read from the corpus at most.", minimum=1)
    tokens_per_parameter: float = option(
        20.5, "Training tokens over parameters.", minimum=0, exclusive_minimum=True
    )
    vocab_size: int = option(2048, "Entries of the byte-level BPE.", minimum=300, maximum=65_536)
    batch_size: int = option(16, "Windows per optimiser step.", minimum=1)
    sequence_length: int = option(128, "Tokens per window.", minimum=8, maximum=2048)
    learning_rate: float = option(
        4e-3,
        "Peak AdamW learning rate (linear warm-up, cosine decay).",
        minimum=0,
        exclusive_minimum=True,
    )
    weight_decay: float = option(0.1, "Decoupled weight decay.", minimum=0)
    gradient_clip: float = option(1.0, "Largest gradient norm.", minimum=0)
    measurement_interval: int = option(
        250, "Optimiser steps between held-out evaluations.", minimum=1
    )
    seed: int = option(0, "Seed of every named random stream.", minimum=0, maximum=2**31 - 1)
    threads: int = option(0, "CPU threads; 0 = torch's default.", minimum=0)
    output_dir: str = option("./experiments/pretrained", "Folder the model is written to.")
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Models x arms x seeds: attack and heal each, then summarize."""

    models: str = option("nano,micro", "Comma-separated model sizes.")
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
        "Fine-tuning steps per cell; auto = 60 for nano and micro, 500 for Pythia.",
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
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)
        self.model_list(), self.arm_list(), self.seed_list()

    def model_list(self) -> tuple[str, ...]:
        """Model names in the order given."""
        return _listed(self.models, "--models", MODELS)

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


ConfigT = TypeVar("ConfigT", bound=BaseConfig)


def resolve(config: ConfigT) -> ConfigT:
    """Replace every ``auto`` by the preset of the configuration's model.

    The device stays ``auto``: which accelerator exists is not a property of the experiment.

    Raises:
        ConfigError: Unknown model.
    """
    model = DEFAULT_MODEL if config.model == AUTO else config.model
    preset = preset_for(model)
    values: dict[str, Any] = {"model": model}
    for field in dataclasses.fields(config):
        if getattr(config, field.name) == AUTO and hasattr(preset, field.name):
            values[field.name] = getattr(preset, field.name)
    if "attack_lr" in values and getattr(config, "attack_optimizer", "") == "sgd":
        values["attack_lr"] = preset.attack_sgd_lr
    return dataclasses.replace(config, **values)


def as_params(config: Any) -> dict[str, Any]:
    """The fields of a configuration as a flat dictionary, in declaration order."""
    return dataclasses.asdict(config)


def fingerprint(*parts: Any) -> str:
    """Hash (16 hex digits) of what determines a result.

    Dataclasses contribute every field except :data:`NOT_DETERMINING`; anything else must be
    JSON-serialisable.
    """
    plain = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            part = {k: v for k, v in as_params(part).items() if k not in NOT_DETERMINING}
        plain.append(part)
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
