"""Alignment ρ of a token sequence's gradient with the low-curvature subspace, and its baselines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from healing.attacks import gram_alignment
from healing.curvature.subspaces import LowCurvatureSubspace, SingularSubspace
from healing.models.blocks import block_matrices, next_token_loss


def sequence_loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of one sequence (tokens,), nats per token."""
    return next_token_loss(model, tokens.unsqueeze(0))


def gradients_of(
    model: PreTrainedModel, loss: torch.Tensor, *, differentiable: bool = False
) -> dict[str, torch.Tensor]:
    """Gradients of a loss with respect to the block matrices, by name."""
    matrices = block_matrices(model)
    found = torch.autograd.grad(
        loss, list(matrices.values()), create_graph=differentiable, retain_graph=differentiable
    )
    return dict(zip(matrices, found, strict=True))


def sequence_alignment(
    model: PreTrainedModel, subspace: LowCurvatureSubspace, tokens: torch.Tensor
) -> float:
    """ρ of the gradient that one sequence induces, from the gradient itself: for every model."""
    return float(subspace.alignment(gradients_of(model, sequence_loss(model, tokens))))


def sequence_alignments(
    model: PreTrainedModel, subspace: LowCurvatureSubspace, sequences: torch.Tensor
) -> list[float]:
    """ρ of every sequence's gradient: of many together where model and subspace allow it
    (:mod:`healing.attacks.gram_alignment`), else of one after the other.

    Args:
        model: In ``eval`` mode.
        subspace: N.
        sequences: int64 (count, length).
    """
    if isinstance(subspace, SingularSubspace):
        found = gram_alignment.alignments(model, subspace, sequences)
        if found is not None:
            return found
    return [sequence_alignment(model, subspace, row) for row in sequences]


def random_sequences(
    count: int,
    length: int,
    vocab_size: int,
    generator: torch.Generator,
    opening: Sequence[int] = (),
) -> torch.Tensor:
    """Uniform random tokens behind what begins every sequence, int64 (count, length)."""
    drawn = torch.randint(vocab_size, (count, length), generator=generator)
    drawn[:, : len(opening)] = torch.tensor(opening, dtype=torch.int64)
    return drawn


@dataclass(frozen=True)
class AlignmentBaselines:
    """What ρ is compared with, at any weights.

    Attributes:
        subspace: N of the healthy model.
        random: Random sequences, int64 (draws, length).
        clean: One clean sequence, int64 (length,).
    """

    subspace: LowCurvatureSubspace
    random: torch.Tensor
    clean: torch.Tensor

    def metrics(self, model: PreTrainedModel, draws: int = 4) -> dict[str, float]:
        """ρ of random tokens (mean of ``draws``), of clean text, and of an isotropic direction."""
        sequences = torch.cat([self.random[:draws], self.clean[None]])
        *random, clean = sequence_alignments(model, self.subspace, sequences)
        return {
            "alignment_random_tokens": sum(random) / len(random),
            "alignment_clean_text": clean,
            "alignment_isotropic": self.subspace.isotropic_alignment,
        }

    def of_change(self, delta: Mapping[str, torch.Tensor]) -> dict[str, float]:
        """ρ of ΔW; nothing where no matrix has changed."""
        if not any(bool(delta[name].any()) for name in self.subspace.names):
            return {}
        return {"alignment_weight_change": float(self.subspace.alignment(delta))}
