"""Models to time: the embedded ones, or random weights in the true shape of a Pythia size."""

from __future__ import annotations

import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from healing.models import LoadedModel, load_model

SHAPES = {"70m": (512, 6, 8), "160m": (768, 12, 12)}


def loaded_model(name: str) -> LoadedModel:
    """With nano's tokenizer where the weights are random: its ids are below any vocabulary here."""
    if name not in SHAPES:
        return load_model(name)
    hidden, layers, heads = SHAPES[name]
    config = GPTNeoXConfig(
        vocab_size=50304,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000.0,
            "partial_rotary_factor": 0.25,
        },
        use_cache=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(config).eval()
    return LoadedModel(name, model, load_model("nano").tokenizer, "random")
