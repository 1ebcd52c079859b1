"""Frozen configurations of every stage and their validation.

Standard library only: a configuration can be built, checked, hashed and pickled without torch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass
from typing import Any, TypeVar

from healing.options import AUTO, ConfigError, option, validate_fields
from healing.presets import (
    DEFAULT_MODEL,
    HUB,
    LORA_RATE_RATIO,
    MAIN,
    MODELS_HELP,
    PYTHIA,
    PYTHIA_HIDDEN,
    canonical_model,
    check_source,
    model_kind,
    model_label,
    preset_for,
    probe_tokens_for,
)

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
METHODS = ("full", "lora")
FULL, LORA = METHODS
SUBSPACES = ("singular", "hessian")
PRECISIONS = ("fp32", "bf16", "fp16")
PRECISION_MODES = ("autocast", "pure")
REVISION_HELP = (
    "Branch, tag or commit on the Hub; empty = main. Pythia has a tag per training checkpoint: "
    "step0, step1, step2, step4 ... step512, step1000, step2000 ... step143000."
)
DEDUPED_HELP = "Pythia sizes: the model trained on the deduplicated Pile."
DEVICES_HELP = "auto (accelerator if there is one), cpu, cuda or cuda:N."
RAW_DATA = "priority5_healing/raw_data"
"""Folder below ``output_dir`` that holds one folder per run."""


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
        "dry_run",
    }
)
"""Fields left out of a cell's fingerprint: they change no number, or what they name does and is put
in where it is known (the kind of device, a reference's weights)."""

NOT_SETTINGS = frozenset(
    {
        "seed",
        "fingerprint",
        "attack_run_id",
        "reference_checkpoint",
        "reference_run_id",
        "reference_fingerprint",
        "model_commit",
        "output_dir",
        "verbosity",
        "device",
        "dry_run",
    }
)
"""Entries of a checkpoint's configuration that runs may differ in and still be pooled."""


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """What every stage that loads a model shares."""

    model: str = option(DEFAULT_MODEL, f"Model: {MODELS_HELP}.")
    revision: str = option("", REVISION_HELP)
    deduped: bool = option(False, DEDUPED_HELP)
    corpus: str = option(
        AUTO,
        "Clean text: stdlib, pile, a .txt/.jsonl/.jsonl.zst/.parquet file or folder, or a Hub "
        "dataset id; auto = stdlib for nano and micro, else pile.",
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
        AUTO,
        "Tokens of the frozen probe; auto = by model: 4096 for nano and micro, else 8192 or what "
        "gives 4 rows per hidden dimension.",
        minimum=64,
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
            check_source(self.model, self.revision, self.deduped)

    @property
    def label(self) -> str:
        """The model with its revision and training set, for titles, tags and groups."""
        return model_label(self.model, self.revision, self.deduped)


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

    dry_run: bool = option(
        False, "Predict the peak memory from the model's shape, print it and load nothing."
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
        f"Model: {MODELS_HELP}; auto = the model the checkpoint names, else {DEFAULT_MODEL}.",
    )
    revision: str = option("", f"{REVISION_HELP} A checkpoint brings its own.")
    deduped: bool = option(False, f"{DEDUPED_HELP} A checkpoint brings its own.")
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
        "Learning rate; auto = 1e-3 for nano and micro, else 1e-4, and 10 times that for lora.",
        minimum=0,
        exclusive_minimum=True,
    )
    healing_optimizer: str = option("adamw", "Optimiser of healing.", choices=OPTIMIZERS)
    healing_method: str = option(
        FULL,
        "What is trained: all weights, or (lora, which needs peft) low-rank adapters of the linear "
        "layers inside the blocks, merged afterwards.",
        choices=METHODS,
    )
    lora_rank: int = option(8, "lora: rank r of the change of every matrix.", minimum=1)
    lora_alpha: float = option(
        16.0,
        "lora: the change is alpha / rank times the product of the adapters.",
        minimum=0,
        exclusive_minimum=True,
    )
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

    dry_run: bool = option(
        False, "Predict the peak memory from the model's shape, print it and load nothing."
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
        if self.healing_method == LORA:
            self._check_lora()

    def _check_lora(self) -> None:
        if self.precision_mode == "pure" and self.precision != "fp32":
            raise ConfigError(
                "--healing-method lora keeps the weights, --precision-mode pure rounds them: "
                "use --precision-mode autocast"
            )
        if self.healing_optimizer != "adamw" and self.healing_lr == AUTO:
            raise ConfigError(
                "--healing-lr auto is AdamW's for --healing-method lora: give a number with "
                f"--healing-optimizer {self.healing_optimizer}"
            )


ConfigT = TypeVar("ConfigT", bound=BaseConfig)


def resolve(config: ConfigT, *, accelerated: bool = False) -> ConfigT:
    """Replace every ``auto`` by the preset of the configuration's model.

    The device stays ``auto``: which accelerator exists is not a property of the experiment. So does
    the probe's size where only the model's own files tell its hidden size
    (:func:`healing.experiment.loading.complete`).

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
        if getattr(config, field.name) == AUTO and hasattr(preset, field.name):
            values[field.name] = getattr(preset, field.name)
    if getattr(config, "precision", "") == AUTO:
        values["precision"] = "bf16" if accelerated else "fp32"
    if "attack_lr" in values and getattr(config, "attack_optimizer", "") == "sgd":
        values["attack_lr"] = preset.attack_sgd_lr
    if "healing_lr" in values and getattr(config, "healing_method", FULL) == LORA:
        values["healing_lr"] = LORA_RATE_RATIO * preset.healing_lr
    if "probe_tokens" in values and model in PYTHIA_HIDDEN:
        hidden = PYTHIA_HIDDEN[model]
        values["probe_tokens"] = probe_tokens_for(hidden, config.sequence_length)
    return dataclasses.replace(config, **values)


def as_params(config: Any) -> dict[str, Any]:
    """The fields of a configuration as a flat dictionary, in declaration order."""
    return dataclasses.asdict(config)


def fingerprint(*parts: Any) -> str:
    """Hash (16 hex digits) of what determines a result.

    Dataclasses contribute every field except :data:`NOT_DETERMINING`, and a model's folder not its
    path: its content is hashed where it is known. Anything else must be JSON-serialisable.
    """
    plain = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            part = {k: v for k, v in as_params(part).items() if k not in NOT_DETERMINING}
            if os.path.isabs(str(part.get("model", ""))):
                part["model"] = "folder"
        plain.append(part)
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
