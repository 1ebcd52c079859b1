"""Configuration of the ``pretrain`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import option, validate_fields


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
