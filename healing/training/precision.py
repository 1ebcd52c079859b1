"""Number formats of training, and where a model stops being able to compute in them.

*Autocast*: float32 master weights, forward and backward under ``torch.autocast``; fp16 with
``torch.amp.GradScaler`` (Micikevicius et al. 2018, arXiv 1710.03740). *Pure*: weights, gradients
and optimiser state in the low format. There AdamW's ε = 1e-8 is 0 in fp16, whose smallest positive
number is 2⁻²⁴ ≈ 6e-8: a weight without gradient moves by 0/0 and one whose squared gradient
underflows by m/0, so that even a healthy model is not finite after one step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from healing.models.sharing import whole

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """A number format and how training uses it.

    Attributes:
        format: ``fp32``, ``bf16`` or ``fp16``.
        mode: ``autocast`` or ``pure``; of no effect for fp32.
    """

    format: str = "fp32"
    mode: str = "autocast"

    @property
    def dtype(self) -> torch.dtype:
        """The format in torch's words."""
        return FORMATS[self.format]

    @property
    def largest(self) -> float:
        """Largest finite number of the format: 65,504 for fp16, 3.4e38 for the others."""
        return torch.finfo(self.dtype).max

    def headroom(self, peaks: Iterable[float]) -> tuple[float, ...]:
        """Share that each largest |h| is of the largest finite number; NaN where it is NaN."""
        return tuple(peak / self.largest for peak in peaks)

    @property
    def pure(self) -> bool:
        """Whether the weights themselves are in the low format."""
        return self.mode == "pure" and self.format != "fp32"

    @property
    def cast(self) -> bool:
        """Whether forward passes are under autocast."""
        return self.mode == "autocast" and self.format != "fp32"

    def __str__(self) -> str:
        return f"pure {self.format}" if self.pure else self.format + " autocast" * self.cast

    def forward(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Context of a forward pass."""
        if not self.cast:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.dtype)

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """Loss scaling for fp16 under autocast (torch's defaults: from 2¹⁶, halved at every
        overflow); for everything else an object that changes nothing.
        """
        return torch.amp.GradScaler(device.type, enabled=self.cast and self.format == "fp16")

    def weights(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Pure: parameters in the low format inside, float32 (of the same values) afterwards."""
        return _parameters_in(model, self.dtype if self.pure else torch.float32, torch.float32)

    def measuring(self, model: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Pure: parameters in float32 inside, in the low format afterwards.

        Both conversions are exact. The weights take 4 bytes each meanwhile instead of 2;
        gradients are dropped before.
        """
        return _parameters_in(model, torch.float32, self.dtype if self.pure else torch.float32)


FLOAT32 = Precision()


def _convert(model: nn.Module, dtype: torch.dtype) -> None:
    # Buffers stay: rotary frequencies rounded to fp16 would not come back with float32 weights.
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


@contextlib.contextmanager
def _parameters_in(model: nn.Module, inside: torch.dtype, after: torch.dtype) -> Iterator[None]:
    _convert(model, inside)
    try:
        yield
    finally:
        _convert(model, after)


def gradient_norm(model: torch.nn.Module, gradient_clip: float) -> torch.Tensor:
    """Norm of the gradient before clipping, float32; clips to ``gradient_clip`` (0 = not)."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if all(g.dtype == torch.float32 for g in gradients):
        norm = whole(torch.nn.utils.get_total_norm(gradients))
    else:  # in fp16 the norm of a finite gradient can itself overflow
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    if gradient_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm)
    return norm
