"""Architectures without weights: Pythia's sizes as data, others from their config.json."""

from __future__ import annotations

from transformers import GPTNeoXConfig, PreTrainedConfig

from healing.config.presets import PYTHIA, PYTHIA_HIDDEN, model_kind, model_label
from healing.models.model_files import locate, read_config

PYTHIA_SHAPES = {
    # Blocks, heads (Biderman et al. 2023, table 1 and the models' config.json); vocabulary 50,304,
    # which is padded to a multiple of 128. Hidden sizes are in PYTHIA_HIDDEN.
    "70m": (6, 8),
    "160m": (12, 12),
    "410m": (24, 16),
    "1b": (16, 8),
    "1.4b": (24, 16),
    "2.8b": (32, 32),
}
PYTHIA_VOCABULARY = 50_304


def neox_config(vocabulary: int, hidden: int, blocks: int, heads: int) -> GPTNeoXConfig:
    """GPT-NeoX in Pythia's proportions: feed-forward 4 × hidden, a quarter of each head rotary,
    parallel residual, untied output matrix.
    """
    return GPTNeoXConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        max_position_embeddings=2048,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
        },
        use_parallel_residual=True,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )


def pythia_config(size: str) -> GPTNeoXConfig:
    """Architecture of a Pythia size."""
    return neox_config(PYTHIA_VOCABULARY, PYTHIA_HIDDEN[size], *PYTHIA_SHAPES[size])


def architecture(name: str, revision: str = "", deduped: bool = False) -> PreTrainedConfig:
    """Architecture of a model: known here for Pythia, else read from its config.json (a folder's,
    or the Hub's, through its cache).

    Raises:
        ConfigError: Unknown model.
        ModelError: Its configuration cannot be had or used.
    """
    if model_kind(name) == PYTHIA:
        return pythia_config(name)
    location = locate(name, revision, deduped, weights=False)
    return read_config(model_label(name, revision, deduped), location)
