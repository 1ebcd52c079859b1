"""Configuration of the ``pretrain`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import option
from healing.config.shared import (
    OutputOptions,
    SavingOptions,
    SystemOptions,
    TextOptions,
    ThreadOptions,
    TrainingOptions,
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(
    TextOptions, TrainingOptions, ThreadOptions, OutputOptions, SavingOptions, SystemOptions
):
    """Training of an embedded model from nothing."""

    order = (
        "model",
        "corpus",
        "max_documents",
        "tokens_per_parameter",
        "vocab_size",
        "batch_size",
        "sequence_length",
        ...,
        "measurement_interval",
        "seed",
        "threads",
        "output_dir",
        "verbosity",
        "checkpoint_interval",
        "checkpoint_minutes",
        "resume_run_id",
        "system_metrics",
    )

    model: str = option("nano", "Embedded model to train.", choices=("nano", "micro"))
    corpus: str = option("stdlib", "Text to train on (see attack --corpus).", required=True)
    tokens_per_parameter: float = option(
        20.5, "Training tokens over parameters.", minimum=0, exclusive_minimum=True
    )
    vocab_size: int = option(2048, "Entries of the byte-level BPE.", minimum=300, maximum=65_536)
    batch_size: int = option(16, "Windows per optimiser step.", minimum=1, maximum=2**16)
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
    threads: int = option(0, "CPU threads; 0 = torch's default.", minimum=0, maximum=1024)
    output_dir: str = option(
        "./experiments/pretrained", "Folder the model is written to.", determines=False
    )
