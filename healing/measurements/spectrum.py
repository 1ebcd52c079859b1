"""Spectral numbers of hidden states: effective rank and its relatives.

Everything here works on a matrix of hidden states A (rows = tokens, columns = hidden units) through
the eigenvalues of the d×d covariance of its centred rows, which
:mod:`healing.measurements.covariance` accumulates. With σᵢ the singular values of
centred A and λᵢ = σᵢ²:

=====================  ===========================================  =============================
``effective_rank``     exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ, no threshold   Roy & Vetterli 2007
``participation_ratio``  (Σλ)² / Σλ²                                  Gao et al. 2017
``effective_rank_energy``  the same entropy with pᵢ = λᵢ/Σλ            Roy & Vetterli 2007
``stable_rank``        ‖A‖²_F / ‖A‖²₂ = Σλ / λ₁                     Rudelson & Vershynin 2007
``spectral_gap``       λ₁ / λ₂
=====================  ===========================================  =============================
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

OUTLIER_NORM_RATIO = 10.0
"""Tokens whose norm exceeds this multiple of the median norm (attention sinks) are left out."""

ROWS_PER_DIMENSION = 4
"""Fewer rows than this multiple of the hidden size make the small eigenvalues unreliable."""


@dataclass(frozen=True)
class Spectrum:
    """Spectrum of one block's hidden states.

    Attributes:
        eigenvalues: Of the covariance (1/rows · centred AᵀA), descending, float64 (hidden,); all
            NaN where a hidden state is not finite.
        rows: Tokens used.
        dropped_share: Tokens left out as outliers, over all but the first of each window.
    """

    eigenvalues: torch.Tensor
    rows: int
    dropped_share: float

    @property
    def singular_values(self) -> torch.Tensor:
        """σᵢ of the centred (rows, hidden) matrix, descending, float64."""
        return (self.eigenvalues * self.rows).sqrt()

    @property
    def effective_rank(self) -> float:
        """Exp of the entropy of σ/Σσ; between 1 and the hidden size."""
        return float(effective_rank(self.eigenvalues))

    @property
    def effective_rank_energy(self) -> float:
        """Exp of the entropy of λ/Σλ: as ``effective_rank``, of the energies σ²."""
        return float(effective_rank(self.eigenvalues.clamp_min(0).square()))

    @property
    def participation_ratio(self) -> float:
        """(Σλ)²/Σλ²."""
        return float(self.eigenvalues.sum() ** 2 / self.eigenvalues.square().sum())

    @property
    def stable_rank(self) -> float:
        """Σλ/λ₁."""
        return float(self.eigenvalues.sum() / self.eigenvalues[0])

    @property
    def spectral_gap(self) -> float:
        """λ₁/λ₂ (infinite for a rank-one matrix)."""
        return float(self.eigenvalues[0] / self.eigenvalues[1])


def spectral_entropy(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Entropy −Σ pᵢ ln pᵢ of pᵢ = √λᵢ/Σ√λ over the last dimension, in nats; differentiable.

    Args:
        eigenvalues: (..., hidden), non-negative. NaN where all are zero: a constant matrix has no
            spectrum.
    """
    sigma = eigenvalues.clamp_min(0).sqrt()
    p = sigma / sigma.sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1)


def effective_rank(eigenvalues: torch.Tensor) -> torch.Tensor:
    """Exp of :func:`spectral_entropy` (Roy & Vetterli 2007)."""
    return spectral_entropy(eigenvalues).exp()


def keep_mask(hidden: torch.Tensor) -> torch.Tensor:
    """Which tokens enter the spectrum: not the first of a window, not of outlying norm.

    Args:
        hidden: (windows, tokens, hidden).

    Returns:
        bool (windows, tokens). The median norm is taken over all tokens but the first ones.
    """
    norms = hidden[:, 1:].float().norm(dim=-1)
    kept = norms <= OUTLIER_NORM_RATIO * norms.median()
    first = torch.zeros_like(kept[:, :1])
    return torch.cat([first, kept], dim=1)
