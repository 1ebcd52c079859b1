"""Spectral numbers of hidden states: effective rank and its relatives, with sampling error.

Everything here works on a matrix of hidden states A (rows = tokens, columns = hidden units) through
the d×d covariance of its centred rows, accumulated and decomposed in float64. With σᵢ the singular
values of centred A and λᵢ = σᵢ²:

=====================  ===========================================  =============================
``effective_rank``     exp(−Σ pᵢ ln pᵢ), pᵢ = σᵢ/Σσ, no threshold   Roy & Vetterli 2007
``participation_ratio``  (Σλ)² / Σλ²                                  Gao et al. 2017
``stable_rank``        ‖A‖²_F / ‖A‖²₂ = Σλ / λ₁                     Rudelson & Vershynin 2007
``spectral_gap``       λ₁ / λ₂
=====================  ===========================================  =============================
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

OUTLIER_NORM_RATIO = 10.0
"""Tokens whose norm exceeds this multiple of the median norm (attention sinks) are left out."""

ROWS_PER_DIMENSION = 4
"""Fewer rows than this multiple of the hidden size make the small eigenvalues unreliable."""

# Above this hidden size a bootstrap needs too many decompositions; its linearisation (one
# decomposition) is used instead.
BOOTSTRAP_MAX_DIMENSION = 256


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

    @property
    def enough_rows(self) -> bool:
        """Whether rows ≥ 4 × hidden size."""
        return self.rows >= ROWS_PER_DIMENSION * len(self.eigenvalues)


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


@dataclass(frozen=True)
class CentredRows:
    """The rows of A that are used, centred, and the window that each came from.

    Attributes:
        rows: float64 (rows, hidden), column means zero.
        window: int64 (rows,), index of the probe window.
        n_windows: Number of windows.
        dropped_share: As :attr:`Spectrum.dropped_share`.
    """

    rows: torch.Tensor
    window: torch.Tensor
    n_windows: int
    dropped_share: float

    @classmethod
    def of(cls, hidden: torch.Tensor) -> CentredRows:
        """Select and centre the rows of hidden states (windows, tokens, hidden)."""
        mask = keep_mask(hidden)
        if not bool(torch.isfinite(hidden[:, 1:]).all()):
            # One token that cannot be computed leaves no spectrum to speak of: not an outlier.
            mask[:, 1:] = True
        rows = hidden[mask].double()
        window = mask.nonzero()[:, 0]
        candidates = hidden.shape[0] * (hidden.shape[1] - 1)
        dropped = 1.0 - len(rows) / candidates
        return cls(rows - rows.mean(0), window, hidden.shape[0], dropped)

    def spectrum(self) -> Spectrum:
        """Eigenvalues of the covariance, from the d×d Gram matrix."""
        n, d = self.rows.shape
        if n == 0 or not bool(torch.isfinite(self.rows).all()):
            nan = torch.full((d,), math.nan, dtype=torch.float64)
            return Spectrum(nan, n, self.dropped_share)
        values = torch.linalg.eigvalsh(self.rows.T @ self.rows / n)
        return Spectrum(values.flip(0).clamp_min(0).cpu(), n, self.dropped_share)

    def window_moments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Count (windows,), sum (windows, d) and Gram matrix (windows, d, d) of each window."""
        d = self.rows.shape[1]
        counts = torch.bincount(self.window, minlength=self.n_windows).double()
        sums = self.rows.new_zeros(self.n_windows, d).index_add_(0, self.window, self.rows)
        grams = torch.stack(
            [
                self.rows[self.window == w].T @ self.rows[self.window == w]
                for w in range(self.n_windows)
            ]
        )
        return counts, sums, grams

    def bootstrap_ranks(self, weights: torch.Tensor) -> torch.Tensor:
        """Effective rank of each resample of windows.

        Args:
            weights: float64 (resamples, windows): how often each window is drawn.

        Returns:
            float64 (resamples,).
        """
        counts, sums, grams = self.window_moments()
        weights = weights.to(counts)
        total = (weights @ counts)[:, None, None]
        mean = (weights @ sums)[:, :, None] / total
        second = (weights @ grams.flatten(1)).view(-1, *grams.shape[1:]) / total
        covariance = second - mean @ mean.transpose(1, 2)
        return effective_rank(torch.linalg.eigvalsh(covariance)).cpu()

    def rank_influence(self) -> torch.Tensor:
        """Derivative of the effective rank with respect to each window's weight at 1.

        First-order (infinitesimal-jackknife) counterpart of :meth:`bootstrap_ranks`: the standard
        error is √Σuₖ². With f = exp(H), ∂f/∂λᵢ = f·(−ln pᵢ − H)/(2 σᵢ Σσ) and
        ∂C/∂wₖ = Σ_{rows of k} (x xᵀ − C)/N.

        Returns:
            float64 (windows,).
        """
        n = len(self.rows)
        values, vectors = torch.linalg.eigh(self.rows.T @ self.rows / n)
        sigma = values.clamp_min(values[-1] * 1e-14).sqrt()
        p = sigma / sigma.sum()
        entropy = -torch.xlogy(p, p).sum()
        slope = entropy.exp() * (-p.log() - entropy) / (2 * sigma * sigma.sum())
        per_row = ((self.rows @ vectors).square() - values) @ slope / n
        return per_row.new_zeros(self.n_windows).index_add_(0, self.window, per_row).cpu()


def bootstrap_weights(resamples: int, windows: int, generator: torch.Generator) -> torch.Tensor:
    """Multinomial bootstrap weights: float64 (resamples, windows), each row summing to windows."""
    draws = torch.randint(windows, (resamples, windows), generator=generator)
    return torch.zeros(resamples, windows, dtype=torch.float64).scatter_add_(
        1, draws, torch.ones(resamples, windows, dtype=torch.float64)
    )


class RankErrors:
    """Standard error of the mean effective rank over blocks, by resampling probe windows.

    Blocks are added one by one. The same windows are drawn for every block, so that the blocks'
    errors keep their correlation. Up to hidden size 256 this is the bootstrap itself (Efron &
    Tibshirani 1993, ch. 6); above it, its linearisation (:meth:`CentredRows.rank_influence`).

    Args:
        generator: Draws the resamples; ``None`` makes the result NaN at no cost.
        resamples: Bootstrap samples.
    """

    def __init__(self, generator: torch.Generator | None, resamples: int = 100) -> None:
        self._generator, self._resamples = generator, resamples
        self._weights: torch.Tensor | None = None
        self._per_block: list[torch.Tensor] = []
        self._linear = False

    def add(self, block: CentredRows) -> None:
        """Take one block into account."""
        if self._generator is None:
            return
        if not len(block.rows) or not bool(torch.isfinite(block.rows).all()):
            self._generator = None
            return
        self._linear = block.rows.shape[1] > BOOTSTRAP_MAX_DIMENSION
        if self._linear:
            self._per_block.append(block.rank_influence())
            return
        if self._weights is None:
            n = block.n_windows
            self._weights = bootstrap_weights(self._resamples, n, self._generator)
        self._per_block.append(block.bootstrap_ranks(self._weights))

    def standard_error(self) -> float:
        """The standard error; NaN without a generator or where a hidden state is not finite."""
        if self._generator is None or not self._per_block:
            return math.nan
        mean = torch.stack(self._per_block).mean(0)
        return float(mean.square().sum().sqrt() if self._linear else mean.std())


def mean_rank_standard_error(blocks: list[CentredRows], generator: torch.Generator) -> float:
    """:class:`RankErrors` of blocks that are at hand together."""
    errors = RankErrors(generator)
    for block in blocks:
        errors.add(block)
    return errors.standard_error()
