"""Agreement of next-token predictions with the healthy model's: same first choice, KL from it.

top1 = share of predicted probe tokens where both models give the largest logit to the same token,
in percent (a position whose logits are not all finite agrees with nothing); kl = mean over them of
KL(healthy ‖ now) = Σ p·(ln p − ln q) in nats, p and q the two distributions over the vocabulary;
not finite where one of them cannot be computed.

Keeps the healthy model's last hidden states and output matrix (tokens · hidden size + vocabulary ·
hidden size numbers), or all its logits where they are more than the product of these; takes one
more pass over the probe per measurement, and both models' logits, 512 tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from healing.measurements.extra_metrics import ProbeState, require_room
from healing.measurements.probe import TOKENS_PER_FORWARD
from healing.models.token_loss import CHUNK_TOKENS, plain_head

NEEDS = ("healthy",)
UNITS = {"top1": "percent", "kl": "nats"}


@dataclass(frozen=True)
class _Reference:
    """What gives the healthy logits.

    Attributes:
        rows: Last hidden states (tokens, hidden), or logits (tokens, vocabulary), on the CPU.
        weight: Output matrix (vocabulary, hidden); ``None`` where the rows are logits.
        bias: Of the output, where it has one.
    """

    rows: torch.Tensor
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None


def _rows(model: nn.Module, windows: torch.Tensor) -> Iterator[torch.Tensor]:
    """Last hidden states (tokens, hidden), or logits (tokens, vocabulary), of predicting positions:
    all of a window but the last.
    """
    device = next(model.parameters()).device
    head = plain_head(model)
    for chunk in windows.split(max(1, TOKENS_PER_FORWARD // windows.shape[1])):
        ids = chunk.to(device)
        if head is None:
            out = model(input_ids=ids).logits
        else:
            out = model.base_model(input_ids=ids).last_hidden_state  # type: ignore[operator, union-attr]
        yield out[:, :-1].flatten(0, 1)


def remember(model: nn.Module, windows: torch.Tensor) -> _Reference:
    """What gives the healthy predictions.

    Raises:
        ConfigError: It would take too much room.
    """
    head = plain_head(model)
    total, filled = windows.numel() - len(windows), 0
    kept = torch.empty(0)
    for rows in _rows(model, windows):
        if not filled:
            matrix = 0 if head is None else head.weight.numel()
            require_room("agreement", model, total * rows.shape[1] + matrix)
            kept = torch.empty(total, rows.shape[1])
        kept[filled : filled + len(rows)] = rows.float().cpu()
        filled += len(rows)
    if head is None:
        return _Reference(kept)
    bias = None if head.bias is None else head.bias.detach().clone()
    return _Reference(kept, head.weight.detach().clone(), bias)


def _logits(
    rows: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> torch.Tensor:
    return (rows if weight is None else F.linear(rows.to(weight), weight, bias)).float()


def measure(state: ProbeState) -> dict[str, float]:
    """One more pass over the probe."""
    reference: _Reference = state.remembered["healthy"]
    head = plain_head(state.model)
    weight, bias = (None, None) if head is None else (head.weight, head.bias)
    same, divergence, place = 0, 0.0, 0
    for rows in _rows(state.model, state.windows):
        for piece in rows.split(CHUNK_TOKENS):
            before = reference.rows[place : place + len(piece)].to(piece.device)
            healthy = _logits(before, reference.weight, reference.bias)
            now = _logits(piece, weight, bias)
            sound = torch.isfinite(now).all(1) & torch.isfinite(healthy).all(1)
            same += int(((healthy.argmax(1) == now.argmax(1)) & sound).sum())
            log_p, log_q = healthy.log_softmax(1), now.log_softmax(1)
            divergence += float((log_p.exp() * (log_p - log_q)).sum(1).double().sum())
            place += len(piece)
    return {"top1": 100.0 * same / place, "kl": divergence / place}
