"""The probe: frozen token windows on which every state of a model is measured the same way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from healing.data.splits import Corpus
from healing.measurements.covariance import MomentAccumulator, Moments, spectra
from healing.measurements.extra_metrics import ProbeState, Remembered, extra_metrics, remember
from healing.measurements.rank_standard_error import (
    BOOTSTRAP_MAX_DIMENSION,
    RankInfluence,
    bootstrap_error,
    linear_error,
)
from healing.measurements.recovery import State
from healing.measurements.spectrum import Spectrum
from healing.models.blocks import block_outputs, evaluation_mode
from healing.models.loading import LoadedModel
from healing.models.sharing import ALONE, Share
from healing.models.token_loss import token_losses
from healing.progress import counted

TOKENS_PER_FORWARD = 2048
"""Tokens per forward pass: large enough to be fast, small enough that hidden states stay small."""

KEPT_SHARE = 2.0
"""Hidden states of the whole probe are kept for a second look where they take at most this multiple
of the weights: less than the optimiser's states will. Else the probe is passed again.
"""


_Passes = Callable[[], Iterator[tuple[torch.Tensor, list[torch.Tensor]]]]
"""Losses of every chunk's tokens (tokens,) and its block outputs, each time it is called."""


@dataclass(frozen=True)
class Measurement:
    """What one state of a model measures on the probe.

    Attributes:
        loss: Mean cross entropy in nats per token over the finite tokens; NaN if there are none.
        nonfinite_tokens: Tokens whose loss is not finite.
        spectra: One per block.
        rank_standard_error: Of the mean effective rank (bootstrap over windows); NaN where it was
            not asked for.
        peaks: Largest |h| of every block over all probe tokens, first ones and outliers too.
        extra: Numbers of the extra measurements, under the names that they are logged as.
    """

    loss: float
    nonfinite_tokens: int
    spectra: tuple[Spectrum, ...]
    rank_standard_error: float = math.nan
    peaks: tuple[float, ...] = ()
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf

    def _mean(self, name: str) -> float:
        return sum(getattr(s, name) for s in self.spectra) / len(self.spectra)

    @property
    def effective_rank(self) -> float:
        """Mean over blocks."""
        return self._mean("effective_rank")

    @property
    def state(self) -> State:
        """The part that recovery needs."""
        return State(self.effective_rank, self.loss, self.perplexity, self.rank_standard_error)

    def metrics(self) -> dict[str, float]:
        """Everything measured, under the names of the MLflow contract."""
        headline = {
            "effective_rank": self.effective_rank,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "spectral_gap": self._mean("spectral_gap"),
            "participation_ratio": self._mean("participation_ratio"),
            "stable_rank": self._mean("stable_rank"),
            "effective_rank_energy": self._mean("effective_rank_energy"),
            "nonfinite_tokens": float(self.nonfinite_tokens),
            "dropped_token_share": self._mean("dropped_share"),
        }
        layers = {
            f"layers/effective_rank_{index:02d}": spectrum.effective_rank
            for index, spectrum in enumerate(self.spectra)
        }
        return {**headline, **layers, **self.extra}

    def panel(self) -> dict[str, float]:
        """The measures of :data:`healing.measurements.recovery.PANEL` that there are."""
        ranks = [spectrum.effective_rank for spectrum in self.spectra]
        spectral = ("participation_ratio", "effective_rank_energy", "stable_rank")
        accuracy = {n: v for n, v in self.extra.items() if n == "extra/accuracy_top1"}
        return {
            "last_block": ranks[-1],
            "min_block": min(ranks),
            **{name: self._mean(name) for name in spectral},
            **{name.removeprefix("extra/"): value for name, value in accuracy.items()},
        }

    def block_spectra(self) -> NDArray[np.float64]:
        """Singular values of every block, descending: (blocks, hidden)."""
        return torch.stack([s.singular_values for s in self.spectra]).numpy()

    def mean_spectrum(self) -> list[float]:
        """Singular values over the largest of their block, averaged over blocks, descending."""
        relative = [s.singular_values / s.singular_values[0] for s in self.spectra]
        values: list[float] = torch.stack(relative).mean(0).tolist()
        return values


@dataclass(frozen=True)
class Probe:
    """Frozen windows, and what is measured on them.

    Attributes:
        windows: int64 (windows, tokens), on the CPU.
        extra: Names of extra measurements.
        remembered: What those keep that compare states (:meth:`remembering`).
        share: Of the windows, that this process passes through the model; all ranks measure
            together, and each gets the measurement of all windows.
    """

    windows: torch.Tensor
    extra: tuple[str, ...] = field(default=(), kw_only=True)
    remembered: Remembered = field(default_factory=dict, kw_only=True, repr=False)
    share: Share = field(default=ALONE, kw_only=True)

    @classmethod
    def of(
        cls,
        corpus: Corpus,
        loaded: LoadedModel,
        tokens: int,
        length: int,
        extra: tuple[str, ...] = (),
    ) -> Probe:
        """Windows from the corpus' ``probe`` split.

        Raises:
            CorpusError: The split is too small.
        """
        return cls(corpus.windows("probe", loaded.tokenizer, length, tokens), extra=extra)

    @torch.no_grad()
    def remembering(self, state: str, model: nn.Module) -> Probe:
        """A probe that also knows the model's present state, for measurements that compare with it;
        this one where none does. The model's mode is restored.

        Args:
            state: ``healthy`` or ``collapsed``.
            model: In that state.

        Raises:
            ConfigError: A measurement would keep more of it than there is room for.
        """
        with evaluation_mode(model):
            found = remember(state, model, self.windows, self.extra)
        if not found:
            return self
        known = {name: {**self.remembered.get(name, {}), state: x} for name, x in found.items()}
        return replace(self, remembered={**self.remembered, **known})

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows.numel()

    def _forward(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        """Losses of every chunk's tokens (tokens,) and its block outputs, of the own share."""
        device = next(model.parameters()).device
        rows = max(1, TOKENS_PER_FORWARD // self.windows.shape[1])
        windows, own = self.share.filled(self.windows)
        with block_outputs(model) as outputs:
            chunks = windows.split(rows)
            for number, chunk in enumerate(counted(chunks, len(chunks))):
                losses = token_losses(model, chunk.to(device))
                counting = min(len(chunk), own - number * rows)
                if counting == len(chunk):
                    yield losses, list(outputs)
                elif counting > 0:
                    kept = losses[: counting * (len(losses) // len(chunk))]
                    yield kept, [hidden[:counting] for hidden in outputs]

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean cross entropy over all tokens, without spectra: nats per token, not finite where
        that of one token is not. The model's mode is restored.
        """
        with evaluation_mode(model):
            parts = [(float(x.double().sum()), x.numel()) for x, _ in self._forward(model)]
        sums = [sum(total for total, _ in parts), sum(count for _, count in parts)]
        total, count = self.share.total(torch.tensor(sums, dtype=torch.float64)).tolist()
        return float(total / count)

    @torch.no_grad()
    def window_losses(self, model: nn.Module) -> torch.Tensor:
        """Mean cross entropy of every window: float64 (windows,), nats per token, on the CPU. Their
        mean is :meth:`loss`. The model's mode is restored.
        """
        with evaluation_mode(model):
            losses = torch.cat([x.double() for x, _ in self._forward(model)])
            losses = self.share.gathered(losses).cpu()
        return losses.view(len(self.windows), -1).mean(1)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, error_generator: torch.Generator | None = None
    ) -> Measurement:
        """Loss and spectra of all blocks in one pass over the probe.

        Args:
            model: A causal language model; its mode is restored.
            error_generator: Draws the bootstrap for ``rank_standard_error``; ``None`` skips it.
                Above hidden size 256 it looks at the states twice; they are kept for that where
                they are small beside the weights (:data:`KEPT_SHARE`), else made again.
        """
        errors = error_generator is not None
        with evaluation_mode(model):
            passes = self._passes(model, keep=errors)
            losses, moments = self._pass(passes, errors=errors)
            error = math.nan
            if error_generator is not None and all(m.finite and m.rows for m in moments):
                error = self._rank_error(passes, moments, error_generator)
            state = ProbeState(model, self.windows, losses, tuple(moments))
            extra = extra_metrics(state, self.extra, self.remembered)
        mask = torch.isfinite(losses)
        finite = int(mask.sum())
        loss = float(losses[mask].double().sum()) / finite if finite else math.nan
        return Measurement(
            loss,
            losses.numel() - finite,
            tuple(spectra(moments)),
            error,
            tuple(m.peak for m in moments),
            extra,
        )

    def _passes(self, model: nn.Module, *, keep: bool) -> _Passes:
        """Makes :meth:`_forward` again and again, or, once made, gives what it kept."""
        kept: list[tuple[torch.Tensor, list[torch.Tensor]]] = []

        def passes() -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
            if kept:
                yield from kept
                return
            for found in self._forward(model):
                if keep and self._may_keep(model, found[1]):
                    kept.append(found)
                yield found

        return passes

    def _may_keep(self, model: nn.Module, outputs: list[torch.Tensor]) -> bool:
        """Whether states are needed twice and small enough: a function of shapes alone."""
        weights = sum(p.numel() for p in model.parameters())
        states = self.tokens * sum(hidden.shape[-1] for hidden in outputs)
        needed = outputs[0].shape[-1] > BOOTSTRAP_MAX_DIMENSION
        return needed and states <= KEPT_SHARE * weights

    def _pass(self, passes: _Passes, *, errors: bool) -> tuple[torch.Tensor, list[Moments]]:
        """Loss of every token, and every block's moments: per window where errors need that."""
        losses: list[torch.Tensor] = []
        blocks: list[MomentAccumulator] = []
        for chunk_losses, outputs in passes():
            losses.append(chunk_losses)
            per_window = errors and outputs[0].shape[-1] <= BOOTSTRAP_MAX_DIMENSION
            blocks = blocks or [
                MomentAccumulator(per_window=per_window, share=self.share) for _ in outputs
            ]
            for block, hidden in zip(blocks, outputs, strict=True):
                block.add(hidden)
        moments = [block.finish() for block in blocks]
        if any(b.stale(m) for b, m in zip(blocks, moments, strict=True)):
            blocks = [
                MomentAccumulator(per_window=per_window, limit=m.limit, share=self.share)
                for m in moments
            ]
            for _, outputs in passes():
                for block, hidden in zip(blocks, outputs, strict=True):
                    block.add(hidden)
            moments = [block.finish() for block in blocks]
        return self.share.gathered(torch.cat(losses)), moments

    def _rank_error(
        self, passes: _Passes, moments: list[Moments], generator: torch.Generator
    ) -> float:
        if len(moments[0].shift) <= BOOTSTRAP_MAX_DIMENSION:
            return bootstrap_error(moments, generator)
        influences = [RankInfluence(m, self.share) for m in moments]
        for _, outputs in passes():
            for influence, hidden in zip(influences, outputs, strict=True):
                influence.add(hidden)
        return linear_error(influences)
