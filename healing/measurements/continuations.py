"""What a model says: openings of the probe continued greedily.

Nothing is drawn, so that no random stream moves, and no state is kept between tokens: any causal
model is continued alike, whatever its cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from healing.models.blocks import evaluation_mode

PROMPTS, OPENING, LENGTH = 4, 16, 24
"""Windows that are begun, tokens given of each, tokens that follow."""
NOT_COMPUTED = -1
"""In a token's place where the model's logits are not finite; so are all that follow it."""


@dataclass(frozen=True)
class Continuations:
    """Openings of the probe and what states of a model make of them.

    Attributes:
        openings: int64 (prompts, tokens).
        true: What the text goes on with, int64 (prompts, tokens).
        by_state: State → greedy continuation, int64 (prompts, tokens).
    """

    openings: torch.Tensor
    true: torch.Tensor
    by_state: dict[str, torch.Tensor]


def openings_of(windows: torch.Tensor) -> Continuations:
    """The beginnings of a few windows, spread over the probe, with no state yet.

    Args:
        windows: int64 (windows, tokens). Short ones are begun and continued by a third each.
    """
    given = min(OPENING, windows.shape[1] // 3)
    length = min(LENGTH, windows.shape[1] - given)
    rows = torch.linspace(0, len(windows) - 1, min(PROMPTS, len(windows))).long()
    chosen = windows[rows]
    return Continuations(chosen[:, :given], chosen[:, given : given + length], {})


@torch.no_grad()
def continued(model: nn.Module, openings: torch.Tensor, length: int) -> torch.Tensor:
    """The most likely next token, again and again; the first of equally likely ones.

    Args:
        model: A causal language model; its mode is restored.
        openings: int64 (prompts, tokens).
        length: Tokens to add.

    Returns:
        int64 (prompts, length), on the CPU; :data:`NOT_COMPUTED` from where logits are not finite.
    """
    device = next(model.parameters()).device
    ids = openings.to(device)
    lost = torch.zeros(len(ids), dtype=torch.bool, device=device)
    said = []
    with evaluation_mode(model):
        for _ in range(length):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1].float()
            lost = lost | ~torch.isfinite(logits).all(1)
            best = logits.nan_to_num().argmax(1)
            said.append(best.masked_fill(lost, NOT_COMPUTED).cpu())
            ids = torch.cat([ids, best[:, None]], dim=1)
    return torch.stack(said, dim=1)
