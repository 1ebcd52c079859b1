"""The probe: frozen token windows on which every state of a model is measured the same way."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from healing.corpora import Corpus
from healing.models import LoadedModel, block_outputs, evaluation_mode
from healing.spectra import CentredRows, RankErrors, Spectrum

TOKENS_PER_FORWARD = 2048
"""Tokens per forward pass: large enough to be fast, small enough that logits stay small."""


@dataclass(frozen=True)
class Measurement:
    """What one state of a model measures on the probe.

    Attributes:
        loss: Mean cross entropy in nats per token over the finite tokens; NaN if there are none.
        nonfinite_tokens: Tokens whose loss is not finite.
        spectra: One per block.
        rank_standard_error: Of the mean effective rank (bootstrap over windows); NaN where it was
            not asked for.
    """

    loss: float
    nonfinite_tokens: int
    spectra: tuple[Spectrum, ...]
    rank_standard_error: float = math.nan

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

    def metrics(self) -> dict[str, float]:
        """Everything measured, under the names of the MLflow contract."""
        headline = {
            "effective_rank": self.effective_rank,
            "perplexity": self.perplexity,
            "loss": self.loss,
            "spectral_gap": self._mean("spectral_gap"),
            "participation_ratio": self._mean("participation_ratio"),
            "stable_rank": self._mean("stable_rank"),
            "nonfinite_tokens": float(self.nonfinite_tokens),
            "dropped_token_share": self._mean("dropped_share"),
        }
        layers = {
            f"layers/effective_rank_{index:02d}": spectrum.effective_rank
            for index, spectrum in enumerate(self.spectra)
        }
        return {**headline, **layers}

    def mean_spectrum(self) -> list[float]:
        """Singular values over the largest of their block, averaged over blocks, descending."""
        relative = [s.singular_values / s.singular_values[0] for s in self.spectra]
        values: list[float] = torch.stack(relative).mean(0).tolist()
        return values


@dataclass(frozen=True)
class Probe:
    """Frozen windows (windows, tokens), int64, on the CPU."""

    windows: torch.Tensor

    @classmethod
    def of(cls, corpus: Corpus, loaded: LoadedModel, tokens: int, length: int) -> Probe:
        """Windows from the corpus' ``probe`` split.

        Raises:
            CorpusError: The split is too small.
        """
        return cls(corpus.windows("probe", loaded.tokenizer, length, tokens))

    def _forward(self, model: nn.Module) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
        device = next(model.parameters()).device
        rows = max(1, TOKENS_PER_FORWARD // self.windows.shape[1])
        with block_outputs(model) as outputs:
            for chunk in self.windows.split(rows):
                ids = chunk.to(device)
                # Chunk i's logits at position t predict token t+1: the one and only shift.
                logits = model(input_ids=ids).logits[:, :-1].float()
                losses = F.cross_entropy(
                    logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
                )
                yield losses, list(outputs)

    @torch.no_grad()
    def loss(self, model: nn.Module) -> float:
        """Mean cross entropy over all tokens, without spectra: nats per token, not finite where
        that of one token is not. The model's mode is restored.
        """
        with evaluation_mode(model):
            parts = [(float(x.double().sum()), x.numel()) for x, _ in self._forward(model)]
        return sum(total for total, _ in parts) / sum(count for _, count in parts)

    @torch.no_grad()
    def measure(
        self, model: nn.Module, error_generator: torch.Generator | None = None
    ) -> Measurement:
        """Loss and spectra of all blocks in one pass over the probe.

        Args:
            model: A causal language model; its mode is restored.
            error_generator: Draws the bootstrap for ``rank_standard_error``; ``None`` skips it.
        """
        total, finite, count = 0.0, 0, 0
        per_block: list[list[torch.Tensor]] = []
        with evaluation_mode(model):
            for losses, outputs in self._forward(model):
                mask = torch.isfinite(losses)
                total += float(losses[mask].double().sum())
                finite += int(mask.sum())
                count += losses.numel()
                per_block = per_block or [[] for _ in outputs]
                for store, output in zip(per_block, outputs, strict=True):
                    store.append(output)
        loss = total / finite if finite else math.nan
        spectra, errors = [], RankErrors(error_generator)
        while per_block:  # one block at a time in float64; its hidden states are freed after it
            block = CentredRows.of(torch.cat(per_block.pop(0)))
            spectra.append(block.spectrum())
            errors.add(block)
        return Measurement(loss, count - finite, tuple(spectra), errors.standard_error())
