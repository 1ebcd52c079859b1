"""All weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from healing.config.heal import HealConfig

SHARDED = True
"""Works on a model whose weights are spread over processes."""


def check(config: HealConfig) -> None:
    """Nothing is needed."""


def n_trainable(model: nn.Module, config: HealConfig) -> int:
    """All parameters."""
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def adapted(
    model: PreTrainedModel, config: HealConfig, generator: torch.Generator
) -> Iterator[None]:
    """The model as it is.

    Args:
        model: A causal language model.
        config: Of the healing.
        generator: Not drawn from.
    """
    yield
