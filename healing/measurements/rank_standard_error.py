"""Standard error of the mean effective rank over blocks, by resampling probe windows.

The same windows are drawn for every block, so that the blocks' errors keep their correlation. Up to
:data:`BOOTSTRAP_MAX_DIMENSION` it is the bootstrap itself (Efron & Tibshirani 1993, ch. 6); above
that, where a hundred decompositions per block are too many, its linearisation, the infinitesimal
jackknife (Jaeckel 1972; Efron & Tibshirani, ch. 21), which passes the states once more.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from healing.measurements.covariance import Moments, row_norms
from healing.measurements.spectrum import effective_rank
from healing.models.sharing import ALONE, Share

BOOTSTRAP_MAX_DIMENSION = 256
RESAMPLES = 100


def bootstrap_weights(resamples: int, windows: int, generator: torch.Generator) -> torch.Tensor:
    """Multinomial bootstrap weights: float64 (resamples, windows), each row summing to windows."""
    draws = torch.randint(windows, (resamples, windows), generator=generator)
    return torch.zeros(resamples, windows, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(resamples, windows, dtype=torch.float64)
    )


def bootstrap_ranks(moments: Moments, weights: torch.Tensor) -> torch.Tensor:
    """Effective rank of each resample of windows.

    Args:
        moments: Per window.
        weights: float64 (resamples, windows): how often each window is drawn.

    Returns:
        float64 (resamples,).
    """
    return effective_rank(torch.linalg.eigvalsh(moments.covariance(weights))).cpu()


def bootstrap_error(blocks: Sequence[Moments], generator: torch.Generator) -> float:
    """Bootstrap standard error of the mean effective rank over blocks, moments per window."""
    weights = bootstrap_weights(RESAMPLES, len(blocks[0].counts), generator)
    return float(torch.stack([bootstrap_ranks(m, weights) for m in blocks]).mean(0).std())


class RankInfluence:
    """Derivative of one block's effective rank with respect to each window's weight at 1.

    With f = exp(H), ∂f/∂λᵢ = f·(−ln pᵢ − H)/(2 σᵢ Σσ) and ∂C/∂wₖ = Σ_{rows of k} (x xᵀ − C)/n, so
    that window k has the influence uₖ = Σ_{rows of k} xᵀ M x/n, where M has the eigenvectors of C
    and the eigenvalues ∂f/∂λᵢ; tr C M = 0, since f does not change with the scale of C.

    Args:
        moments: Of the same states.
        share: Of the windows, that are added here.
    """

    def __init__(self, moments: Moments, share: Share = ALONE) -> None:
        self._share = share
        values, vectors = torch.linalg.eigh(moments.covariance())
        sigma = values.clamp_min(values[-1] * 1e-14).sqrt()
        p = sigma / sigma.sum()
        entropy = -torch.xlogy(p, p).sum()
        slope = entropy.exp() * (-p.log() - entropy) / (2 * sigma * sigma.sum())
        self._sensitivity = (vectors * slope) @ vectors.T
        self._mean, self._limit, self._n = moments.mean, moments.limit, moments.rows
        self._found: list[torch.Tensor] = []

    def add(self, hidden: torch.Tensor) -> None:
        """Take the states of some windows, (windows, tokens, hidden)."""
        rows, norms = row_norms(hidden)
        rows = rows - self._mean
        change = ((rows @ self._sensitivity) * rows).sum(-1)
        self._found.append(torch.where(norms <= self._limit, change, 0.0).sum(1) / self._n)

    def per_window(self) -> torch.Tensor:
        """Influence of every window added on any rank, float64 (windows,), on the CPU."""
        return self._share.gathered(torch.cat(self._found)).cpu()


def linear_error(blocks: Sequence[RankInfluence]) -> float:
    """√Σuₖ² of the mean influence over blocks."""
    mean = torch.stack([block.per_window() for block in blocks]).mean(0)
    return float(mean.square().sum().sqrt())
