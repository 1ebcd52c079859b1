"""Moments of hidden states, accumulated batch by batch: what a spectrum needs, never all the rows.

The rows that count are all tokens but the first of each window and those whose norm exceeds
10 × the median (:data:`healing.measurements.spectrum.OUTLIER_NORM_RATIO`). That median is known
only at the end, so rows of doubtful norm are held back until then; only where the first batch's
median turns out to be more than twice the final one must the states be passed again.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from healing.measurements.spectrum import OUTLIER_NORM_RATIO, Spectrum
from healing.models.sharing import ALONE, Share

SURE_RATIO = OUTLIER_NORM_RATIO / 2
"""Rows up to this multiple of the first batch's median norm are taken at once."""

GRAM_STRIPS = 4
"""Strips in which the upper half of a Gram matrix is accumulated; more make their products slow."""


@dataclass(frozen=True)
class Moments:
    """Moments of one block's rows x − ``shift``, by group: each probe window, or all in one.

    Attributes:
        counts: Rows, float64 (groups,).
        sums: Σ(x − shift), float64 (groups, hidden).
        grams: Σ(x − shift)(x − shift)ᵀ, float64 (groups, hidden, hidden).
        shift: float64 (hidden,), near the mean: it keeps the covariance from being a small
            difference of large numbers.
        limit: Largest norm of a row that counts.
        dropped_share: Rows left out as outliers, over all tokens but the first of each window.
        peak: Largest |h| over all tokens and units.
        finite: Whether every state is finite; otherwise the moments say nothing.
    """

    counts: torch.Tensor
    sums: torch.Tensor
    grams: torch.Tensor
    shift: torch.Tensor
    limit: float
    dropped_share: float
    peak: float
    finite: bool

    @property
    def rows(self) -> int:
        """Rows that count."""
        return int(self.counts.sum())

    @property
    def mean(self) -> torch.Tensor:
        """Mean row, float64 (hidden,)."""
        return self.shift + self.sums.sum(0) / self.counts.sum()

    def covariance(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Covariance (over rows, 1/n) with every group counted as often as its weight says.

        Args:
            weights: float64 (resamples, groups); ``None`` = every group once.

        Returns:
            float64 (resamples, hidden, hidden), or (hidden, hidden) without weights.
        """
        once = torch.ones(1, len(self.counts), dtype=torch.float64)
        w = (once if weights is None else weights).to(self.counts)
        total = (w @ self.counts)[:, None, None]
        mean = (w @ self.sums)[:, :, None] / total
        second = (w @ self.grams.flatten(1)).view(-1, *self.grams.shape[1:]) / total
        covariance = second - mean @ mean.transpose(1, 2)
        return covariance[0] if weights is None else covariance

    def spectrum(self) -> Spectrum:
        """Eigenvalues of the covariance; all NaN where a hidden state is not finite."""
        return spectra([self])[0]


STACK_BYTES = 2**30
"""Covariances decomposed in one call: one stack of them takes at most this, or is one matrix."""


def spectra(blocks: Sequence[Moments]) -> list[Spectrum]:
    """Spectrum of every block, from as few calls for eigenvalues as stacks fit: an accelerator
    takes the matrices of a stack together.

    Returns:
        All NaN where a hidden state is not finite or no row counts. On the CPU the same bits as
        block by block.
    """
    sound = [block for block in blocks if block.finite and block.rows]
    most = max(1, STACK_BYTES // (8 * len(blocks[0].shift) ** 2))
    values: list[torch.Tensor] = []
    for begin in range(0, len(sound), most):
        stack = torch.stack([block.covariance() for block in sound[begin : begin + most]])
        values += torch.linalg.eigvalsh(stack).flip(-1).clamp_min(0).cpu()
    found, left = [], iter(values)
    for block in blocks:
        nan = torch.full(block.shift.shape, math.nan, dtype=torch.float64)
        own = next(left) if block.finite and block.rows else nan
        found.append(Spectrum(own, block.rows, block.dropped_share))
    return found


def row_norms(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of all tokens but the first of each window, in float64, and their norms.

    Args:
        hidden: (windows, tokens, hidden).

    Returns:
        float64 (windows, tokens − 1, hidden) and (windows, tokens − 1); the norm of a float32 row
        that is finite is finite.
    """
    rows = hidden[:, 1:].double()
    return rows, torch.linalg.vector_norm(rows, dim=-1)


class MomentAccumulator:
    """Takes the hidden states of one block, batch by batch.

    Args:
        per_window: Keep every window's moments apart (windows × hidden² numbers).
        limit: Norm limit, where an earlier pass has found it.
        share: Of the windows, that are added here; the moments are those of all ranks'.
    """

    def __init__(
        self, *, per_window: bool = False, limit: float | None = None, share: Share = ALONE
    ) -> None:
        self._per_window, self._sure, self._share = per_window, limit, share
        self._shift: torch.Tensor | None = None
        self._counts: list[torch.Tensor] = []
        self._sums: list[torch.Tensor] = []
        self._grams: list[torch.Tensor] = []
        self._norms: list[torch.Tensor] = []
        self._held: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._peaks: list[torch.Tensor] = []
        self._windows = 0

    def add(self, hidden: torch.Tensor) -> None:
        """Take the states of some windows, (windows, tokens, hidden), of any float type."""
        rows, norms = row_norms(hidden)
        self._peaks.append(torch.stack(torch.aminmax(hidden)).abs().amax())
        if self._sure is None:
            self._sure = SURE_RATIO * float(self._share.first(norms.median()))
        sure = norms <= self._sure
        if self._shift is None:
            # Of the sure rows alone: one attention sink would carry it far off.
            kept = torch.where(sure[..., None], rows, 0.0).sum((0, 1))
            self._shift = self._share.first(kept / sure.sum().clamp_min(1))
        rows = rows - self._shift
        if not bool(sure.all()):
            window, token = (~sure).nonzero(as_tuple=True)
            held = (window + self._windows, norms[window, token], rows[window, token])
            self._held.append(held)
            rows = torch.where(sure[..., None], rows, 0.0)
        self._norms.append(norms.flatten())
        self._windows += len(rows)
        self._take(sure.sum(1).double(), rows)

    def _take(self, counts: torch.Tensor, rows: torch.Tensor) -> None:
        if self._per_window:
            self._counts.append(counts)
            self._sums.append(rows.sum(1))
            self._grams.append(rows.transpose(1, 2) @ rows)
            return
        flat = rows.flatten(0, 1)
        if not self._grams:
            d = flat.shape[1]
            self._counts, self._sums = [counts.new_zeros(1)], [flat.new_zeros(1, d)]
            self._grams = [flat.new_zeros(1, d, d)]
        self._counts[0] += counts.sum()
        self._sums[0] += flat.sum(0)
        self._add_upper_gram(flat)

    def _add_upper_gram(self, rows: torch.Tensor) -> None:
        """Add rowsᵀ·rows in strips from the diagonal rightwards: 5/8 of the products."""
        gram, width = self._grams[0][0], -(-rows.shape[1] // GRAM_STRIPS)
        for begin in range(0, len(gram), width):
            strip = slice(begin, begin + width)
            gram[strip, begin:].addmm_(rows[:, strip].T, rows[:, begin:])

    def finish(self) -> Moments:
        """The moments of all that was added.

        Call once; where :attr:`stale` says so of the result, pass the states again with its limit.
        """
        assert self._shift is not None, "nothing was added"
        norms = self._share.gathered(torch.cat(self._norms))
        finite = bool(torch.isfinite(norms).all())
        limit = OUTLIER_NORM_RATIO * float(norms.median()) if finite else math.inf
        counts, sums, grams = (torch.cat(x) for x in (self._counts, self._sums, self._grams))
        grams = grams.triu() + grams.triu(1).mT
        for window, size, rows in self._held if finite else []:
            kept = size <= limit
            for group in window[kept].unique().tolist() if self._per_window else [...]:
                own = rows[kept & (window == group)] if self._per_window else rows[kept]
                counts[group] += len(own)
                sums[group] += own.sum(0)
                grams[group] += own.T @ own
        join = self._share.gathered if self._per_window else self._share.total
        counts, sums, grams = join(counts), join(sums), join(grams)
        # One state that cannot be computed leaves no spectrum to speak of: it is not an outlier.
        dropped = 1.0 - float(counts.sum()) / len(norms) if finite else 0.0
        if not finite:
            counts = counts + (len(norms) - counts.sum()) / len(counts)
        peak = float(self._share.largest(torch.stack(self._peaks).amax()))
        return Moments(counts, sums, grams, self._shift, limit, dropped, peak, finite)

    def stale(self, moments: Moments) -> bool:
        """Whether rows were taken at once that the final limit may leave out."""
        assert self._sure is not None, "nothing was added"
        return moments.finite and self._sure > moments.limit
