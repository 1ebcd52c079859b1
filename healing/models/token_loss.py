"""Next-token losses without a tensor of batch × tokens × vocabulary numbers.

Where a model's logits are its output matrix times its last hidden state, the product and the cross
entropy are taken together, a few hundred tokens at a time (``linear_cross_entropy`` of torch).
Whether that holds is tried once per model; architectures that do more to their logits (a soft cap,
a scale) are asked for whole logits instead.
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from healing.models.blocks import evaluation_mode, next_token_loss

CHUNK_TOKENS = 512
"""Tokens whose logits exist at a time: large enough for full speed, 103 MB for Pythia's 50,304."""

_OPTIONS = nn.LinearCrossEntropyOptions(batch_chunk_size=CHUNK_TOKENS, chunking_method=None)
_TRIED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()
_TRIAL_LOGITS = 100.0
"""Size of the logits tried: large, since a soft cap leaves small ones nearly as they are."""


def _logits_are_head_times_hidden(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether the model's logits are exactly its head applied to its body's output, tried with
    large inputs of the head.
    """
    device = head.weight.device
    ids = torch.arange(min(4, head.out_features), device=device)[None]
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(1, ids.shape[1], head.in_features, generator=generator).to(head.weight)
    inputs = inputs * (_TRIAL_LOGITS / F.linear(inputs, head.weight).std().clamp_min(1e-12))
    seen: list[torch.Tensor] = []

    def replace(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        seen.append(args[0])
        return (inputs,)

    handle = head.register_forward_pre_hook(replace)
    try:
        with torch.no_grad(), evaluation_mode(model):
            logits = model(input_ids=ids).logits
            body = model.base_model(input_ids=ids).last_hidden_state
    finally:
        handle.remove()
    if len(seen) != 1 or seen[0].shape != body.shape or logits.shape[-1] != head.out_features:
        return False
    expected = F.linear(inputs, head.weight, head.bias).to(logits)
    return all(
        torch.allclose(a, b, rtol=1e-3, atol=1e-3, equal_nan=True)
        for a, b in ((seen[0], body), (logits, expected))
    )


def plain_head(model: nn.Module) -> nn.Linear | None:
    """The output matrix where it is all that stands between last hidden state and logits."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return None
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return None
    if model not in _TRIED:
        _TRIED[model] = _logits_are_head_times_hidden(model, head)
    return head if _TRIED[model] else None


def _rows(model: PreTrainedModel, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Last hidden states (tokens, hidden) and what they predict (tokens,)."""
    hidden = model.base_model(input_ids=windows).last_hidden_state
    # Position t predicts token t+1: the one and only shift.
    return hidden[:, :-1].flatten(0, 1), windows[:, 1:].flatten()


_METHOD = "losses_by_rows"
"""Name under which a model whose weights are spread over ranks has its losses as a method."""


def as_method(model: PreTrainedModel, *, plain: bool) -> str:
    """Make the losses of a model a method of it, and say its name: they read the output matrix
    outside of its own forward pass, and whoever gathers a model's weights before ``forward`` must
    be able to do so before them.

    Args:
        model: To be spread over ranks.
        plain: What :func:`plain_head` finds on the model as it is whole.
    """
    _TRIED[model] = plain

    def losses(own: PreTrainedModel, loss: Callable[..., torch.Tensor], *given: object) -> object:
        return loss(own, own.get_output_embeddings(), *given)

    setattr(model, _METHOD, types.MethodType(losses, model))
    return _METHOD


def _of(
    model: nn.Module, head: nn.Linear, loss: Callable[..., torch.Tensor], *given: object
) -> torch.Tensor:
    """A loss of a model, its weights gathered where they are spread."""
    method = getattr(model, _METHOD, None)
    return loss(model, head, *given) if method is None else method(loss, *given)


def _fused_loss(
    model: PreTrainedModel, head: nn.Linear, windows: torch.Tensor, reduction: str
) -> torch.Tensor:
    rows, targets = _rows(model, windows)
    weight: torch.Tensor = head.weight
    return F.linear_cross_entropy(
        rows.to(weight.dtype),
        weight,
        targets,
        linear_bias=head.bias,
        reduction=reduction,
        options=_OPTIONS,
    ).float()


def _sum_of_losses(
    rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    logits = F.linear(rows, weight, bias)
    return F.cross_entropy(logits.float(), targets, reduction="sum")


def _recomputing_loss(
    model: PreTrainedModel, head: nn.Linear, windows: torch.Tensor
) -> torch.Tensor:
    rows, targets = _rows(model, windows)
    sums = [
        checkpoint(
            _sum_of_losses,
            some_rows,
            head.weight,
            head.bias,
            some_targets,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        for some_rows, some_targets in zip(
            rows.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True
        )
    ]
    return torch.stack(sums).sum() / len(targets)


def token_losses(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Cross entropy of every token but the first of each window, without gradients.

    Args:
        model: A causal language model.
        windows: int64 (windows, tokens), on the model's device.

    Returns:
        float32 (windows · (tokens − 1),), nats.
    """
    with torch.no_grad():
        head = plain_head(model)
        if head is not None:
            return _of(model, head, _fused_loss, windows, "none")
        logits = model(input_ids=windows).logits[:, :-1].flatten(0, 1)
        targets = windows[:, 1:].flatten()
        parts = zip(logits.split(CHUNK_TOKENS), targets.split(CHUNK_TOKENS), strict=True)
        return torch.cat([F.cross_entropy(x.float(), y, reduction="none") for x, y in parts])


def training_loss(model: nn.Module, windows: torch.Tensor) -> torch.Tensor:
    """Mean of the same over a batch, with a gradient of first order (no second derivatives: they
    need :func:`healing.models.blocks.next_token_loss`, which it equals).

    In float32 by torch's fused form. Under autocast that would round the mean loss to the low
    format (to 1/64 nat in bf16) and find its gradients before any loss scaling, so that fp16 would
    lose the small ones: there the logits of every chunk are made again in the backward pass, and
    the loss is summed in float32.

    Args:
        model: A causal language model in float32, under autocast or not; weights in a low format
            take the model's own loss.
        windows: int64 (windows, tokens), on the model's device.

    Returns:
        float32 scalar, nats per token.
    """
    head = plain_head(model)
    if head is None or head.weight.dtype != torch.float32:
        return next_token_loss(model, windows)
    if torch.is_autocast_enabled(windows.device.type):
        return _of(model, head, _recomputing_loss, windows)
    return _of(model, head, _fused_loss, windows, "mean")
