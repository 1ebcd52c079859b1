"""What is not finite first: weights, outputs, gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from healing.measurements.diagnosis import FORWARD, GRADIENT, WEIGHTS, Failure
from healing.models.blocks import evaluation_mode, training_mode
from healing.models.sharing import ALONE, Share, own_part, whole
from healing.models.token_loss import training_loss
from healing.training.precision import FLOAT32, Precision, gradient_norm

WINDOWS_PER_FORWARD = 4
"""Windows passed at a time in the search for what is not finite."""


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor an infinity; always so for whole numbers."""
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def first_nonfinite_parameter(model: nn.Module, share: Share = ALONE) -> str:
    """Name of the first parameter, by registration, that is not finite; empty if there is none.

    Args:
        model: Any; its parameters may be spread over ranks.
        share: Of this rank, where they are.
    """
    names, parameters = zip(*model.named_parameters(), strict=True)
    norm = whole(torch.nn.utils.get_total_norm(p.detach() for p in parameters))
    if bool(torch.isfinite(norm)):
        return ""  # the usual case, in one pass; a norm may also overflow where no weight has
    # One answer for all of them: on an accelerator every question waits for the queue.
    broken = torch.stack([~torch.isfinite(own_part(p.detach())).all() for p in parameters])
    finite = (share.total(broken.long()) == 0).tolist()
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
            if parameter.grad is not None and not all_finite(whole(parameter.grad)):
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


def takes_a_step(model: nn.Module, batch: torch.Tensor, share: Share = ALONE) -> bool:
    """Whether loss and gradient norm of one pass in the model's own format are finite; no gradient
    is left behind.
    """
    with training_mode(model):
        model.zero_grad()
        loss = training_loss(model, batch[share.rows(len(batch))])
        loss.backward()  # type: ignore[no-untyped-call]
    finite = share.everywhere(torch.isfinite(loss)) and all_finite(gradient_norm(model, 0.0))
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
    :data:`FORWARD` where a module's output or the loss is not finite, else :data:`GRADIENT`. Of a
    model that is spread over ranks every rank passes the whole batch, so that all find the same.

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


def failure_before_training(
    model: nn.Module,
    batch: torch.Tensor,
    windows: torch.Tensor,
    share: Share = ALONE,
    *,
    lost: bool = False,
) -> Failure | None:
    """What a model in float32 cannot compute before any step, if there is such a thing.

    Tried in this order: forward and backward pass on the first training batch, the forward passes
    of its measurement, the weights themselves.

    Args:
        model: A causal language model.
        batch: int64 (windows, tokens), on the model's device.
        windows: The probe's, int64 (windows, tokens).
        share: Of the batch.
        lost: Whether its measurement found losses that are not finite.
    """
    # Watched only where needed: that pass holds the logits of the whole batch.
    found = None if takes_a_step(model, batch, share) else diagnose(model, batch, step=0)
    if found:
        return found
    if lost:
        return Failure(0, FORWARD, forward_failure(model, windows) or "probe")
    broken = first_nonfinite_parameter(model, share)
    return Failure(0, WEIGHTS, broken) if broken else None
