"""What the configurations of several stages share: fields, names, sentences."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import AUTO, option, validate_fields
from healing.config.presets import (
    DEFAULT_MODEL,
    MODELS_HELP,
    check_source,
    model_label,
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
OPTIMIZERS = ("adamw", "sgd")
REVISION_HELP = (
    "Branch, tag or commit on the Hub; empty = main. Pythia has a tag per training checkpoint: "
    "step0, step1, step2, step4 ... step512, step1000, step2000 ... step143000."
)
DEDUPED_HELP = "Pythia sizes: the model trained on the deduplicated Pile."
DEVICES_HELP = "auto (accelerator if there is one), cpu, cuda or cuda:N."
CACHE_DIR = "~/.cache/llm-healing"
CACHE_HELP = (
    "Folder that keeps what is made once per healthy model (bases of the low-curvature subspace of "
    "models above 10 million weights), at most 10 GB; empty = nothing is kept."
)
RAW_DATA = "priority5_healing/raw_data"
"""Folder below ``output_dir`` that holds one folder per run."""


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
    cache_dir: str = option(CACHE_DIR, CACHE_HELP)
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
