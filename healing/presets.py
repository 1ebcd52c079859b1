"""What differs by model size: where it comes from, and the defaults that suit it."""

from __future__ import annotations

from dataclasses import dataclass

from healing.options import ConfigError


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
LORA_RATE_RATIO = 10.0
"""Learning rate of adapters over that of all weights (docs/method.md, Low-rank healing)."""


def preset_for(model: str) -> Preset:
    """The preset of a model name.

    Raises:
        ConfigError: The name is not one of :data:`MODELS`.
    """
    if model not in PRESETS:
        raise ConfigError(f"unknown model {model!r}: choose one of {', '.join(MODELS)}")
    return PRESETS[model]
