"""Weights against a snapshot of the healthy ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping

import torch


class Differences(Mapping[str, torch.Tensor]):
    """p − reference by parameter name, formed one tensor at a time as they are asked for.

    Args:
        parameters: Name → parameter.
        reference: Name → tensor of the same shape, on any device.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
    ) -> None:
        self._parameters, self._reference = parameters, reference

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name].detach()
        return parameter - self._reference[name].to(parameter.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def snapshot(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory: an accelerator has better use for its own."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


@torch.no_grad()
def put(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Copy named tensors into the parameters, in place."""
    for name, parameter in model.named_parameters():
        parameter.copy_(state[name])


class WeightChange:
    """‖W−W₀‖/‖W₀‖ against a snapshot of the healthy weights, in host memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.healthy = snapshot(dict(model.named_parameters()))
        self._norm = _norm(self.healthy)

    def delta(self, model: torch.nn.Module) -> Differences:
        """W−W₀ by parameter name."""
        return Differences(dict(model.named_parameters()), self.healthy)

    @contextlib.contextmanager
    def replaced(self, model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Other weights in the model's place for the block, then the healthy ones again."""
        try:
            put(model, state)
            yield
        finally:
            put(model, self.healthy)

    def relative(self, model: torch.nn.Module) -> float:
        """The ratio of norms over all parameters."""
        return _norm(self.delta(model)) / self._norm


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    norms = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors.values())
    return math.sqrt(sum(float(norm) ** 2 for norm in norms))
