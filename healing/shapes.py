"""Architectures without weights: Pythia's sizes as data, others from their config.json."""

from __future__ import annotations

from transformers import GPTNeoXConfig, PreTrainedConfig

from healing.presets import PYTHIA, model_kind, model_label
from healing.sources import locate, read_config

PYTHIA_SHAPES = {
    # hidden size, blocks, heads, feed-forward size (Biderman et al. 2023, table 1 and the models'
    # config.json); vocabulary 50,304, which is padded to a multiple of 128.
    "70m": (512, 6, 8, 2048),
    "160m": (768, 12, 12, 3072),
    "410m": (1024, 24, 16, 4096),
    "1b": (2048, 16, 8, 8192),
    "1.4b": (2048, 24, 16, 8192),
    "2.8b": (2560, 32, 32, 10240),
}
PYTHIA_VOCABULARY = 50_304


def pythia_config(size: str) -> GPTNeoXConfig:
    """Architecture of a Pythia size."""
    hidden, blocks, heads, feed_forward = PYTHIA_SHAPES[size]
    return GPTNeoXConfig(
        vocab_size=PYTHIA_VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        intermediate_size=feed_forward,
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
