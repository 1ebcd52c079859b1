"""Number formats of training, and where a model stops being able to compute in them.

*Autocast*: float32 master weights, forward and backward under ``torch.autocast``; fp16 with
``torch.amp.GradScaler`` (Micikevicius et al. 2018, arXiv 1710.03740). *Pure*: weights, gradients
and optimiser state in the low format. There AdamW's ε = 1e-8 is 0 in fp16, whose smallest positive
number is 2⁻²⁴ ≈ 6e-8: a weight without gradient moves by 0/0 and one whose squared gradient
underflows by m/0, so that even a healthy model is not finite after one step.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from healing.heads import training_loss
from healing.lockout import FORWARD, GRADIENT, Failure
from healing.models import evaluation_mode, training_mode

FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
WINDOWS_PER_FORWARD = 4
"""Windows passed at a time in the search for what is not finite."""


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


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity; always so for whole numbers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def first_nonfinite_parameter(model: nn.Module) -> str:
    """Name of the first parameter, by registration, that is not finite; empty if there is none."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    if bool(torch.isfinite(torch.nn.utils.get_total_norm(p.detach() for p in parameters))):
        return ""  # the usual case, in one pass; a norm may also overflow where no weight has
    # One answer for all of them: on an accelerator every question waits for the queue.
    finite = torch.stack([torch.isfinite(p.detach()).all() for p in parameters]).tolist()
    return "" if all(finite) else names[finite.index(False)]


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


@contextlib.contextmanager
def nonfinite_outputs(model: nn.Module) -> Iterator[list[str]]:
    """Watch the forward passes inside the context.

    Yields:
        A list that grows by the name of each module whose output is not finite, in the order in
        which they finish: a submodule before the module that holds it. The model itself is left
        out.
    """
    found: list[str] = []

    def hook(name: str) -> Any:
        def record(_module: nn.Module, _args: Any, output: Any) -> None:
            if not all(map(all_finite, _tensors(output))):
                found.append(name)

        return record

    handles = [m.register_forward_hook(hook(n)) for n, m in model.named_modules() if n]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def nonfinite_gradients(model: nn.Module) -> Iterator[list[str]]:
    """Watch the backward passes inside the context.

    Yields:
        A list that grows by the name of each parameter whose gradient is not finite, in the order
        in which the backward pass completes them.
    """
    found: list[str] = []

    def hook(name: str) -> Any:
        def record(parameter: torch.Tensor) -> None:
            if parameter.grad is not None and not all_finite(parameter.grad):
                found.append(name)

        return record

    handles = [
        p.register_post_accumulate_grad_hook(hook(n))
        for n, p in model.named_parameters()
        if p.requires_grad
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def gradient_norm(model: torch.nn.Module, gradient_clip: float) -> torch.Tensor:
    """Norm of the gradient before clipping, float32; clips to ``gradient_clip`` (0 = not)."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    gradients = [p.grad for p in parameters if p.grad is not None]
    if all(g.dtype == torch.float32 for g in gradients):
        norm = torch.nn.utils.get_total_norm(gradients)
    else:  # in fp16 the norm of a finite gradient can itself overflow
        norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = torch.linalg.vector_norm(torch.stack(norms))
    if gradient_clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, gradient_clip, norm)
    return norm


def takes_a_step(model: nn.Module, batch: torch.Tensor) -> bool:
    """Whether loss and gradient norm of one pass in the model's own format are finite; no gradient
    is left behind.
    """
    with training_mode(model):
        model.zero_grad()
        loss = training_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
    finite = all_finite(loss) and all_finite(gradient_norm(model, 0.0))
    model.zero_grad()
    return finite


def diagnose(
    model: nn.Module,
    batch: torch.Tensor,
    step: int,
    precision: Precision = FLOAT32,
    scale: float = 1.0,
) -> Failure | None:
    """One forward and backward pass, watched; no gradient is left behind.

    A failure is a loss, a gradient or a gradient norm that is not finite. Its origin is
    :data:`FORWARD` where a module's output or the loss is not finite, else :data:`GRADIENT`.

    Args:
        model: A causal language model, in the precision's weights.
        batch: int64 (windows, tokens), on the model's device.
        step: Number of the step, for the result.
        precision: Of the pass.
        scale: Factor on the loss, as the gradient scaler's.

    Returns:
        What fails first; ``None`` where nothing does.
    """
    with (
        training_mode(model),
        nonfinite_outputs(model) as outputs,
        nonfinite_gradients(model) as gradients,
    ):
        model.zero_grad()
        with precision.forward(batch.device):
            loss = model(input_ids=batch, labels=batch).loss
        failed_forward = list(outputs)  # activation checkpointing runs modules again
        finite = all_finite(loss)
        if finite:
            (scale * loss).backward()
            if not math.isfinite(float(gradient_norm(model, 0.0)) / scale):
                gradients.append("gradient norm")
        model.zero_grad()
    if finite and not gradients:
        return None
    if failed_forward or not finite:
        return Failure(step, FORWARD, (failed_forward or ["loss"])[0])
    return Failure(step, GRADIENT, gradients[0])


@torch.no_grad()
def forward_failure(model: nn.Module, windows: torch.Tensor) -> str:
    """First module whose output is not finite on some windows (windows, tokens) in the model's own
    format, as in measuring; empty where there is none.
    """
    device = next(model.parameters()).device
    with evaluation_mode(model), nonfinite_outputs(model) as found:
        for chunk in windows.split(WINDOWS_PER_FORWARD):
            model(input_ids=chunk.to(device))
            if found:
                return found[0]
    return ""
