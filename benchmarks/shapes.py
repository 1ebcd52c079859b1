"""Models to time: the embedded ones, or random weights in the true shape of a Pythia size."""

from __future__ import annotations

import torch
from transformers import GPTNeoXForCausalLM

from healing.models.architectures import PYTHIA_SHAPES, pythia_config
from healing.models.loading import LoadedModel, load_model


def loaded_model(name: str, device: torch.device | str = "cpu") -> LoadedModel:
    """With nano's tokenizer where the weights are random: its ids are below any vocabulary here."""
    if name not in PYTHIA_SHAPES:
        return load_model(name, str(device))
    # Drawn where they are used: 2.8b takes most of a minute on the host.
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = GPTNeoXForCausalLM(pythia_config(name)).eval()
    model.config.use_cache = False
    return LoadedModel(name, model, load_model("nano").tokenizer, "random")
