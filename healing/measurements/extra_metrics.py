"""Extra measurements of one state: what they are given, and the names that they are logged as."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from healing.errors import ConfigError
from healing.measurements.covariance import Moments
from healing.registry import MEASUREMENTS, NAME


@dataclass(frozen=True)
class ProbeState:
    """One state of a model on the probe, as one pass over it left it.

    Attributes:
        model: In evaluation mode; gradients are off.
        windows: int64 (windows, tokens), on the CPU.
        losses: Cross entropy of every predicted token, nats (windows · (tokens − 1),), in the order
            of the windows; not finite where it cannot be computed.
        moments: Covariance of the hidden states, one per block.
    """

    model: nn.Module
    windows: torch.Tensor
    losses: torch.Tensor
    moments: tuple[Moments, ...]


def extra_metrics(state: ProbeState, names: Sequence[str]) -> dict[str, float]:
    """``extra/<file>_<name>`` → number, of every measurement asked for.

    Raises:
        ConfigError: A measurement is not there, or gives names that no metric can have.
    """
    found = {}
    for name in names:
        for key, value in MEASUREMENTS.load(name).measure(state).items():
            if not NAME.fullmatch(key):
                raise ConfigError(f"measurement {name!r} names a number {key!r}: use a-z, 0-9, _")
            found[f"extra/{name}_{key}"] = float(value)
    return found
