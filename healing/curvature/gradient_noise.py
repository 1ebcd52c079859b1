"""The gradient over batches: its norm beside its sampling error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Columns of the gradients that are widened to float64 at once.
_COLUMNS_PER_BLOCK = 2**20


@dataclass(frozen=True)
class GradientStatistics:
    """The gradient of a loss, as far as b independent batches tell it.

    With G the gradient of the expected loss and g₁ … g_b those of the batches:

    Attributes:
        norm: ‖ḡ‖, of the mean over batches; biased upwards by the noise.
        squared_norm: Unbiased estimate of ‖G‖²: mean of gᵢ·gⱼ over i ≠ j. Can be negative.
        standard_error: Of `squared_norm`, by the jackknife over batches. Where G = 0 it is too
            large (the statistic is degenerate there), which errs towards "not significant".
        noise: Squared standard error of ḡ: Σ‖gᵢ - ḡ‖²/(b(b - 1)) = ‖ḡ‖² - `squared_norm`.
        batches: b.
    """

    norm: float
    squared_norm: float
    standard_error: float
    noise: float
    batches: int

    @property
    def snr(self) -> float:
        """Signal to noise of ḡ: `squared_norm / noise`; NaN where both are 0."""
        if self.noise == 0:
            return math.nan if self.squared_norm == 0 else math.inf
        return self.squared_norm / self.noise

    @property
    def finite(self) -> bool:
        """Whether every batch had a finite gradient."""
        return math.isfinite(self.squared_norm)


def gradient_statistics(gradients: Sequence[Tensor]) -> GradientStatistics:
    """Norm of the mean gradient and what of it is signal, from b gradients of shape `(n,)`.

    All of it follows from the inner products gᵢ·gⱼ, which are summed in float64.

    Raises:
        ValueError: With fewer than three batches, which the jackknife needs.

    Source:
        Hoeffding 1948 (U-statistics); Efron & Stein 1981, Ann. Stat. 9(3) (jackknife variance).
    """
    count = len(gradients)
    if count < 3:
        raise ValueError(f"need at least three batches, got {count}")
    gram = torch.zeros(count, count, dtype=torch.float64)
    for parts in zip(*(g.split(_COLUMNS_PER_BLOCK) for g in gradients), strict=True):
        block = torch.stack(parts).double()
        gram += (block @ block.T).cpu()
    total, trace, rows, own = gram.sum(), gram.trace(), gram.sum(1), gram.diagonal()
    pairs = total - trace
    squared = pairs / (count * (count - 1))
    # Without batch i: its row and its column leave the sum over pairs.
    without = (pairs - 2 * (rows - own)) / ((count - 1) * (count - 2))
    variance = (count - 1) / count * ((without - without.mean()) ** 2).sum()
    noise = ((trace - total / count) / (count * (count - 1))).clamp(min=0)
    norm = (total.clamp(min=0).sqrt() / count).item()
    return GradientStatistics(norm, squared.item(), variance.sqrt().item(), noise.item(), count)
