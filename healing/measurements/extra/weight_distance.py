"""Distance of all weights to the healthy and, in healing, to the collapsed ones, ‖W − W₀‖/‖W₀‖.

Over all parameters, in float64. Adapters of the library ``peft`` count as what they add to the
weights; those of other methods do not, until they are merged.

Keeps the weights of each state, 4 bytes per parameter; takes no pass over the probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn

from healing.measurements.extra_metrics import ProbeState, require_room

NEEDS = ("healthy", "collapsed")
UNITS = {"healthy": "ratio", "collapsed": "ratio"}
_WRAPPED = ".base_layer"
"""What ``peft`` puts into the name of a weight that it adds to."""


def _weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Name in the plain model → weight, with what adapters add to it."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        weight = parameter.detach()
        if owner.endswith(_WRAPPED) and own == "weight":
            adapter = modules[owner.removesuffix(_WRAPPED)]
            for active in adapter.active_adapters:  # type: ignore[union-attr]
                weight = weight + adapter.get_delta_weight(active).detach()  # type: ignore[operator, union-attr]
        yield name.replace(_WRAPPED, ""), weight


def remember(model: nn.Module, _windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """A copy of all weights, on the CPU.

    Raises:
        ConfigError: They would take too much room.
    """
    require_room("weight_distance", model, sum(p.numel() for p in model.parameters()))
    return {name: weight.cpu().clone() for name, weight in _weights(model)}


def measure(state: ProbeState) -> dict[str, float]:
    """To each state that there has been."""
    squared = dict.fromkeys(state.remembered, 0.0)
    size = dict.fromkeys(state.remembered, 0.0)
    for name, weight in _weights(state.model):
        for reference, weights in state.remembered.items():
            if name in weights:  # an adapter's own tensors are not
                before = weights[name].to(weight.device).double()
                squared[reference] += float((weight.double() - before).square().sum())
                size[reference] += float(before.square().sum())
    return {
        reference: math.sqrt(squared[reference] / size[reference]) if size[reference] else math.nan
        for reference in state.remembered
    }
