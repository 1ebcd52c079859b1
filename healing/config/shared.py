"""What the configurations of several stages share: fields, names, sentences.

A field that may be ``auto`` is resolved once, in this order: what the user gives, else what the
checkpoint or healing run names (``resolve_from_checkpoint``, for heal and basin), else the preset
of the model (``resolve_from_presets``), else what the model's own files tell
(``resolve_from_model``, which includes the presets).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from healing.config.options import AUTO, Options, listed, option
from healing.config.presets import (
    DEFAULT_MODEL,
    MODELS_HELP,
    check_source,
    model_label,
)
from healing.errors import ConfigError
from healing.registry import MEASUREMENTS

OPTIMIZERS = ("adamw", "sgd")
REVISION_HELP = (
    "Branch, tag or commit on the Hub; empty = main. Pythia has a tag per training checkpoint: "
    "step0, step1, step2, step4 ... step512, step1000, step2000 ... step143000."
)
DEDUPED_HELP = "Pythia sizes: the model trained on the deduplicated Pile."
TOKENIZER_HELP = "Folder, Hub id or GGUF file with a tokenizer for the model; empty = its own."
HEALER_HELP = (
    "Heal as the healer does that a tune run selected: the run's id, its healer.json, or the name "
    "of one that is included (docs/method.md). What is given beside it must not contradict it."
)
TEXT_COLUMN_HELP = (
    "Column of the corpus that holds the documents; empty = text or content. One of chats is made "
    "text by the model's chat template."
)
SPLIT_RULE_HELP = (
    "What parts the documents of local text files: blank_lines, line, or file (nothing does)."
)
BLANK_LINES, LINE, WHOLE_FILE = SPLIT_RULES = ("blank_lines", "line", "file")
"""What parts the documents of a text file."""
CACHE_DIR = "~/.cache/llm-healing"
CACHE_HELP = (
    "Folder that keeps what is made once per healthy model (bases of the low-curvature subspace of "
    "models above 10 million weights) and text streamed from the Hub, at most 10 GB of each; "
    "empty = nothing is kept."
)
MOST_OF_A_NAME = 256
"""Characters of a registered model's name that MLflow's databases keep."""
RAW_DATA = "priority5_healing/raw_data"
"""Folder below ``output_dir`` that holds one folder per run."""


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Options):
    """Which model."""

    model: str = option(DEFAULT_MODEL, f"Model: {MODELS_HELP}.")
    revision: str = option("", REVISION_HELP)
    deduped: bool = option(False, DEDUPED_HELP)
    tokenizer: str = option("", TOKENIZER_HELP, later=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model != AUTO:
            check_source(self.model, self.revision, self.deduped)

    @property
    def label(self) -> str:
        """The model with its revision and training set, for titles, tags and groups."""
        return model_label(self.model, self.revision, self.deduped)


@dataclass(frozen=True, kw_only=True)
class TextOptions(Options):
    """Which text, and how it is drawn from."""

    corpus: str = option(
        AUTO,
        "Clean text: stdlib, pile, a file or folder (.txt, .jsonl, .parquet …; docs/models.md), "
        "or a Hub dataset id; auto = stdlib for nano and micro, else pile.",
        required=True,
    )
    max_documents: int = option(
        20_000, "Documents read from the corpus at most (a stream stops there).", minimum=1
    )
    text_column: str = option("", TEXT_COLUMN_HELP, later=True)
    split_rule: str = option(BLANK_LINES, SPLIT_RULE_HELP, choices=SPLIT_RULES, later=True)
    seed: int = option(
        0, "Seed of every named random stream.", minimum=0, maximum=2**31 - 1, separates=False
    )


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(Options):
    """How text becomes steps, and which of them are measured."""

    batch_size: int | str = option(
        AUTO, "Windows per optimiser step; auto = by model (8).", minimum=1, maximum=2**16
    )
    sequence_length: int = option(
        128, "Tokens per window, in training and on the probe.", minimum=8, maximum=2048
    )
    measurement_interval: int = option(10, "Optimiser steps between measurements.", minimum=1)


@dataclass(frozen=True, kw_only=True)
class ThreadOptions(Options):
    """How many CPU threads."""

    threads: int | str = option(
        AUTO,
        "CPU threads of torch; 0 = torch's default, auto = 1 for nano and micro (reproducible on "
        "any number of cores), else 0.",
        minimum=0,
        maximum=1024,
    )


@dataclass(frozen=True, kw_only=True)
class DeviceOptions(Options):
    """Where it runs."""

    device: str = option(
        AUTO, "auto (accelerator if there is one), cpu, cuda or cuda:N.", determines=False
    )


@dataclass(frozen=True, kw_only=True)
class OutputOptions(Options):
    """What is written where, and how much is said."""

    output_dir: str = option("./experiments/results", "Local folder for results.", determines=False)
    verbosity: str = option(
        "normal",
        "quiet, normal or verbose.",
        choices=("quiet", "normal", "verbose"),
        determines=False,
    )


@dataclass(frozen=True, kw_only=True)
class CacheOptions(Options):
    """What is kept beyond a run."""

    cache_dir: str = option(CACHE_DIR, CACHE_HELP, determines=False)


@dataclass(frozen=True, kw_only=True)
class ResumeOptions(Options):
    """Going on with a run that was cut."""

    resume_run_id: str = option(
        "",
        "Go on with this run, which was stopped or killed: with its own settings, in a new run "
        "that holds the whole history. (The same command as before goes on, too.)",
        determines=False,
    )


@dataclass(frozen=True, kw_only=True)
class SavingOptions(ResumeOptions):
    """How often the state of training is kept on disk, so that it can go on."""

    checkpoint_interval: int = option(
        0,
        "Keep the state of training (weights, optimiser, records) every so many steps; 0 = by time "
        "alone. A run that is told to stop keeps it in any case.",
        minimum=0,
        determines=False,
    )
    checkpoint_minutes: float = option(
        10.0,
        "Keep the state of training after so many minutes; 0 = by steps alone.",
        minimum=0,
        determines=False,
    )


SAVING = ("checkpoint_interval", "checkpoint_minutes")
"""Fields that a run hands on to those that come first."""


@dataclass(frozen=True, kw_only=True)
class SystemOptions(Options):
    """What the machine does meanwhile."""

    system_metrics: bool = option(
        False,
        "Chart the load of CPU, memory, disk and network (of NVIDIA GPUs where nvidia-ml-py is "
        "installed) while the command runs, as MLflow's system metrics.",
        determines=False,
    )


@dataclass(frozen=True, kw_only=True)
class LoggingOptions(SystemOptions):
    """What MLflow shows of a run beside its headline numbers."""

    log_layers: bool = option(
        False,
        "Chart every block's numbers in MLflow, as layers/…; metrics.jsonl has them in any case.",
        determines=False,
    )
    log_images: bool = option(
        True,
        "Log the spectra of all blocks at up to ten steps as pictures that MLflow shows by step "
        "(about 0.16 MB a run).",
        determines=False,
    )
    log_model: bool = option(
        False,
        "Store the resulting weights with their tokenizer as an MLflow model, which "
        "mlflow.transformers.load_model reads (4 bytes per parameter on disk and in the store, "
        "beside the checkpoint). A finished run that is taken again gets none, nor does a sham.",
        determines=False,
    )
    register_as: str = option(
        "",
        "log_model: also make it a version of this model of MLflow's registry; main registers the "
        "healed models alone.",
        determines=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.register_as and not self.log_model:
            raise ConfigError("--register-as names what --log-model stores: add --log-model")
        check_registered_name(self.register_as)


def check_registered_name(name: str) -> None:
    """Refuse what MLflow's registry does not take as the name of a model; empty = none is given.

    Raises:
        ConfigError: It cannot be one.
    """
    if not name:
        return
    if bad := next((c for c in "/:" if c in name), ""):
        raise ConfigError(
            f"--register-as {name!r} holds {bad!r}, which no model of the registry may: leave it "
            "out"
        )
    if name.startswith("..") or name == "." or not name.strip():
        raise ConfigError(f"--register-as {name!r} cannot name a model: take letters and digits")
    if len(name) > MOST_OF_A_NAME:
        raise ConfigError(
            f"--register-as has {len(name)} characters: name a model with at most {MOST_OF_A_NAME}"
        )


@dataclass(frozen=True, kw_only=True)
class TextLoggingOptions(LoggingOptions):
    """The same of a run that has healed something."""

    log_text: bool = option(
        True,
        "Log how the healthy, the collapsed and the healed model continue the same four openings "
        "of the probe, greedily by 24 tokens.",
        determines=False,
    )


LOGGING = (
    "log_layers",
    "log_images",
    "log_text",
    "log_model",
    "register_as",
    "system_metrics",
)
"""Fields of the above."""


@dataclass(frozen=True, kw_only=True)
class DryRunOptions(Options):
    """Whether it runs at all."""

    unresolved: ClassVar[tuple[str, ...]] = ("time_steps",)

    dry_run: bool = option(
        False,
        "Predict the peak memory from the model's shape, print it and the plan; nothing is made.",
        determines=False,
    )
    time_steps: str = option(
        AUTO,
        "dry_run: load the model and time one step of each kind, to say how long it would take; "
        "auto = for nano and micro.",
        choices=(AUTO, "true", "false"),
        determines=False,
    )


@dataclass(frozen=True, kw_only=True)
class BaseConfig(
    ModelOptions,
    TextOptions,
    TrainingOptions,
    ThreadOptions,
    DeviceOptions,
    CacheOptions,
    OutputOptions,
):
    """What every stage that loads a model and measures it on the probe shares."""

    order: ClassVar[tuple[Any, ...]] = (
        ...,
        "probe_tokens",
        "measurement_interval",
        "measurements",
        "threads",
        "device",
        "cache_dir",
        "output_dir",
        "verbosity",
    )

    probe_tokens: int | str = option(
        AUTO,
        "Tokens of the frozen probe; auto = 4096, or what gives 4 rows per hidden dimension where "
        "that is more.",
        minimum=64,
    )
    measurements: str = option(
        "",
        lambda: (
            "Comma-separated extra measurements of every measured state, logged as extra/…; no "
            f"part of any verdict. {MEASUREMENTS.describe()}."
        ),
        separates=False,
        later=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.measurement_list():
            MEASUREMENTS.check(name)

    def measurement_list(self) -> tuple[str, ...]:
        """Names of the extra measurements in the order given."""
        return listed(self.measurements, "--measurements", MEASUREMENTS.names(), empty=True)
