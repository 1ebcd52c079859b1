"""Median and 90 % quantile of the tokens' losses: whether a high mean is that of few tokens.

Quantiles of the cross entropy of the probe's predicted tokens, linear between order statistics; a
token whose loss is not finite counts as larger than all others, and a quantile that falls on such
tokens is NaN.
"""

from __future__ import annotations

import torch

from healing.measurements.extra_metrics import ProbeState

SHARDED = True
"""Works on a model whose weights are spread over processes."""
UNITS = {"median": "nats", "q90": "nats"}


def measure(state: ProbeState) -> dict[str, float]:
    """From the losses of the pass itself."""
    losses = state.losses.double()
    ordered = torch.where(torch.isfinite(losses), losses, torch.inf).sort().values
    return {name: _quantile(ordered, share) for name, share in (("median", 0.5), ("q90", 0.9))}


def _quantile(ordered: torch.Tensor, share: float) -> float:
    place = share * (len(ordered) - 1)
    low = int(place)
    lower, upper = float(ordered[low]), float(ordered[min(low + 1, len(ordered) - 1)])
    value = lower if place == low else lower + (place - low) * (upper - lower)
    return value if value < torch.inf else float("nan")
