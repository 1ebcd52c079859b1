"""Likeness of the hidden states to the healthy ones (linear CKA): mean over blocks, every block.

CKA = ‖YᵀX‖²_F/(‖XᵀX‖_F·‖YᵀY‖_F), X and Y the centred states of one block on the same tokens
(rows), healthy and now: 1 = equal up to rotation and one scale, whatever the basis. States that
have nothing to do with each other read about √(PR_X·PR_Y)/rows, with PR their participation ratios,
not 0 (Kornblith et al. 2019, arXiv 1905.00414). The rows are those that count in both states: all
tokens but the first of each window and those of outlying norm in either. NaN where a state is not
finite or does not vary.

Keeps the healthy states, tokens · blocks · hidden size · 4 bytes; takes one more pass over the
probe per measurement, and three products of rows · hidden² per block in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from healing.measurements.covariance import Moments, row_norms
from healing.measurements.extra_metrics import ProbeState, require_room
from healing.measurements.probe import TOKENS_PER_FORWARD
from healing.measurements.spectrum import OUTLIER_NORM_RATIO
from healing.models.blocks import block_outputs

NEEDS = ("healthy",)
UNITS = {"mean": "0 to 1", "block_NN": "0 to 1"}


@dataclass(frozen=True)
class _Reference:
    """Healthy states of one block.

    Attributes:
        rows: float32 (windows, tokens − 1, hidden), on the CPU.
        counts: Which of them count, bool (windows, tokens − 1).
        mean: Of those, float64 (hidden,).
    """

    rows: torch.Tensor
    counts: torch.Tensor
    mean: torch.Tensor


def _passes(model: nn.Module, windows: torch.Tensor) -> Iterator[tuple[slice, list[torch.Tensor]]]:
    """Which windows, and the outputs of every block on them (windows, tokens, hidden)."""
    device = next(model.parameters()).device
    height = max(1, TOKENS_PER_FORWARD // windows.shape[1])
    body = getattr(model, "base_model", model)  # no logits are needed
    with block_outputs(model) as outputs:
        for begin in range(0, len(windows), height):
            chosen = slice(begin, min(begin + height, len(windows)))
            body(input_ids=windows[chosen].to(device))
            yield chosen, list(outputs)


def remember(model: nn.Module, windows: torch.Tensor) -> list[_Reference]:
    """Healthy states of every block.

    Raises:
        ConfigError: They would take too much room.
    """
    kept: list[torch.Tensor] = []
    for chosen, outputs in _passes(model, windows):
        if not kept:
            require_room("cka", model, windows.numel() * sum(h.shape[-1] for h in outputs))
            count, length = len(windows), windows.shape[1] - 1
            kept = [torch.empty(count, length, h.shape[-1]) for h in outputs]
        for rows, hidden in zip(kept, outputs, strict=True):
            rows[chosen] = hidden[:, 1:].float().cpu()
    return [_reference(rows) for rows in kept]


def _reference(rows: torch.Tensor) -> _Reference:
    norms = torch.linalg.vector_norm(rows.flatten(0, 1), dim=1).view(rows.shape[:2])
    counts = norms <= OUTLIER_NORM_RATIO * norms.median()
    return _Reference(rows, counts, rows[counts].mean(0).double())


class _Cross:
    """Sums over rows of one block: Σx, Σy, ΣxxT, ΣyyT, ΣyxT of x and y near their means."""

    def __init__(self, reference: _Reference, moments: Moments) -> None:
        self.reference, self.moments = reference, moments
        self.sums: list[torch.Tensor] = []
        self.rows = 0

    def add(self, chosen: slice, hidden: torch.Tensor) -> None:
        """Take the states of some windows, (windows, tokens, hidden)."""
        own, norms = row_norms(hidden)
        counts = self.reference.counts[chosen].to(own.device) & (norms <= self.moments.limit)
        healthy = self.reference.rows[chosen].to(own)
        x = healthy[counts] - self.reference.mean.to(own.device)
        y = own[counts] - self.moments.mean
        found = [x.sum(0), y.sum(0), x.T @ x, y.T @ y, y.T @ x]
        self.sums = [a + b for a, b in zip(self.sums, found, strict=True)] if self.sums else found
        self.rows += len(x)

    def cka(self) -> float:
        """From the sums, centred exactly; NaN where it is not defined."""
        if not (self.moments.finite and self.rows):
            return math.nan
        sx, sy, xx, yy, yx = self.sums
        n = self.rows
        first, second, cross = (
            torch.linalg.matrix_norm(total - torch.outer(a, b) / n)
            for total, a, b in ((xx, sx, sx), (yy, sy, sy), (yx, sy, sx))
        )
        return float(cross**2 / (first * second)) if first * second > 0 else math.nan


def measure(state: ProbeState) -> dict[str, float]:
    """One more pass over the probe."""
    blocks = [
        _Cross(reference, moments)
        for reference, moments in zip(state.remembered["healthy"], state.moments, strict=True)
    ]
    for chosen, outputs in _passes(state.model, state.windows):
        for block, hidden in zip(blocks, outputs, strict=True):
            block.add(chosen, hidden)
    values = [block.cka() for block in blocks]
    single = {f"block_{index:02d}": value for index, value in enumerate(values)}
    return {"mean": sum(values) / len(values), **single}
