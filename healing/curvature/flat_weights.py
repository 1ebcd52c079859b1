"""Weights as one flat vector: read, put back, kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def weights_of(model: nn.Module) -> Tensor:
    """A copy of all parameters as one flat vector, shape `(n,)`."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@torch.no_grad()
def put_weights(model: nn.Module, vector: Tensor) -> None:
    """Copy a flat vector `(n,)` into the parameters, in place, in their dtype.

    Raises:
        ValueError: If `vector` has not as many entries as the model has parameters.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"expected shape ({sum(sizes)},), got {tuple(vector.shape)}")
    for parameter, part in zip(model.parameters(), vector.split(sizes), strict=True):
        parameter.copy_(part.view_as(parameter))


@contextmanager
def restoring_weights(model: nn.Module) -> Iterator[Tensor]:
    """Yield the current weights, `(n,)`, and put them back, bit by bit, at exit."""
    saved = weights_of(model)
    try:
        yield saved
    finally:
        put_weights(model, saved)
