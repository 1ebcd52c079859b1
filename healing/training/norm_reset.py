"""Normalisation layers as an untrained model has them."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from healing.errors import ConfigError


def norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """LayerNorm, RMSNorm and their relatives with a gain per dimension, by module name.

    By class name, as transformers tells them too: architectures bring classes of their own.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if "Norm" in type(module).__name__
        and isinstance(getattr(module, "weight", None), nn.Parameter)
    }


@torch.no_grad()
def reset_norms(model: PreTrainedModel) -> None:
    """Set every gain and bias to what the architecture starts from, in place: 1 and 0, or 0 where a
    gain is written as 1 + weight (Gemma).

    Two blown-up gains are enough to collapse a model, and a small rate does not bring them back; a
    healer that does not know the healthy values can still start from neutral ones.

    Raises:
        ConfigError: There is no such layer, or the architecture does not initialise one.
    """
    layers = norm_layers(model)
    if not layers:
        raise ConfigError(
            f"--reset-norms: {type(model).__name__} has no normalisation layer with a gain: leave "
            "it out"
        )
    for name, layer in layers.items():
        # A copy: transformers leaves parameters alone that it marked as loaded.
        fresh = copy.deepcopy(layer)
        for parameter in fresh.parameters():
            parameter.fill_(torch.nan)
        model._init_weights(fresh)
        if any(not bool(torch.isfinite(p).all()) for p in fresh.parameters()):
            raise ConfigError(
                f"--reset-norms: {type(model).__name__} does not say how {name} "
                f"({type(layer).__name__}) begins: leave it out"
            )
        for parameter, neutral in zip(layer.parameters(), fresh.parameters(), strict=True):
            parameter.copy_(neutral)
