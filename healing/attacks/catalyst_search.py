"""HAEP's catalyst: a token sequence whose gradient lies in the low-curvature subspace.

Gradient-guided discrete search in the manner of GCG (Zou et al. 2023, arXiv 2307.15043): the
derivative of ρ with respect to the one-hot tokens proposes swaps, the true ρ of each proposal is
evaluated, and only improvements are kept.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import gradients_of, random_sequences, sequence_alignments
from healing.attacks.gram_alignment import differentiable_alignment
from healing.curvature.hessian import twice_differentiable_attention
from healing.curvature.subspaces import LowCurvatureSubspace, SingularSubspace
from healing.models.blocks import embedding_matrix
from healing.progress import during, phase

TOP_TOKENS = 64
"""Swaps are drawn from this many tokens of steepest ascent per position."""

FOUND_Z_SCORE = 4.0


@dataclass(frozen=True)
class Catalyst:
    """Result of a search.

    Attributes:
        tokens: int64 (length,).
        alignment: ρ of its gradient at the healthy weights.
        history: ρ after each round, starting with the random start.
        random_alignments: ρ of random sequences.
        evaluations: True objective evaluations spent.
    """

    tokens: torch.Tensor
    alignment: float
    history: tuple[float, ...]
    random_alignments: tuple[float, ...]
    evaluations: int

    @property
    def status(self) -> str:
        """``found`` if ρ exceeds that of every random sequence and their mean by more than
        :data:`FOUND_Z_SCORE` standard deviations, else ``failed``.

        The second condition is the one that a random search of equal budget rarely meets: the best
        of 145 normal draws lies 2.6 standard deviations above the mean.
        """
        beaten = self.alignment > max(self.random_alignments)
        return "found" if beaten and self._z_score > FOUND_Z_SCORE else "failed"

    @property
    def _z_score(self) -> float:
        spread = statistics.stdev(self.random_alignments)
        difference = self.alignment - statistics.fmean(self.random_alignments)
        return difference / spread if spread else float("nan")

    def metrics(self) -> dict[str, float]:
        """ρ, its random baseline, and how many standard deviations above it the catalyst is."""
        mean = statistics.fmean(self.random_alignments)
        spread = statistics.stdev(self.random_alignments)
        return {
            "catalyst_alignment": self.alignment,
            "catalyst_alignment_start": self.history[0],
            "random_alignment_mean": mean,
            "random_alignment_sd": spread,
            "random_alignment_max": max(self.random_alignments),
            "catalyst_z_score": self._z_score,
            "catalyst_evaluations": float(self.evaluations),
        }


@dataclass(frozen=True)
class SearchState:
    """A search after a round: what the next rounds depend on.

    Attributes:
        tokens: The best sequence so far.
        history: ρ after each round, starting with the random start.
        random_alignments: ρ of random sequences.
        stream: State of the generator, uint8.
    """

    tokens: tuple[int, ...]
    history: tuple[float, ...]
    random_alignments: tuple[float, ...]
    stream: torch.Tensor


def _not_kept(state: SearchState) -> None:
    """Nobody goes on with it."""


def token_gradient(
    model: PreTrainedModel, subspace: LowCurvatureSubspace, tokens: torch.Tensor
) -> torch.Tensor:
    """∂ρ/∂(one-hot input), (length, vocabulary), with the labels held fixed.

    Differentiates the gradient, so attention is written out in operations with second derivatives.
    """
    embedding = embedding_matrix(model).detach()
    embedded = embedding[tokens].requires_grad_()
    with twice_differentiable_attention(model), torch.enable_grad():
        rho = None
        if isinstance(subspace, SingularSubspace):
            rho = differentiable_alignment(model, subspace, embedded, tokens)
        if rho is None:
            loss = model(inputs_embeds=embedded[None], labels=tokens[None]).loss
            rho = subspace.alignment(gradients_of(model, loss, differentiable=True))
        (slope,) = torch.autograd.grad(rho, embedded)
    # A one-hot row selects its token's embedding, so its derivative is the embedding's times Eᵀ.
    return slope @ embedding.T


def propose_swaps(
    tokens: torch.Tensor,
    gradient: torch.Tensor,
    count: int,
    generator: torch.Generator,
    fixed: int = 0,
) -> torch.Tensor:
    """Copies of the sequence with one token swapped each, int64 (count, length).

    Position is uniform behind the first ``fixed``; the token is uniform among the position's
    steepest ascents.
    """
    length, vocabulary = gradient.shape
    best = gradient.topk(min(TOP_TOKENS, vocabulary), dim=1).indices
    positions = torch.randint(fixed, length, (count,), generator=generator)
    picks = torch.randint(best.shape[1], (count,), generator=generator)
    proposals = tokens.repeat(count, 1)
    device = tokens.device
    rows = torch.arange(count, device=device)
    proposals[rows, positions.to(device)] = best[positions.to(device), picks.to(device)]
    return proposals


def search_catalyst(
    model: PreTrainedModel,
    subspace: LowCurvatureSubspace,
    baseline: torch.Tensor,
    *,
    length: int,
    steps: int,
    candidates: int,
    generator: torch.Generator,
    vocabulary: int | None = None,
    opening: Sequence[int] = (),
    begun: SearchState | None = None,
    keep: Callable[[SearchState], None] = _not_kept,
) -> Catalyst:
    """Maximise ρ over token sequences from a random start.

    Args:
        model: Healthy model, in ``eval`` mode.
        subspace: N.
        baseline: Random sequences to beat, int64 (draws, length); never used as a start.
        length: Tokens of the catalyst.
        steps: Rounds; each evaluates ``candidates`` swaps.
        candidates: Swaps per round.
        generator: Draws the start and the swaps.
        vocabulary: Ids that are tokens; ``None`` = all rows of the embeddings.
        opening: What begins every sequence that the model was trained on: never swapped.
        begun: State to go on from; its rounds are not done again.
        keep: Given the state after the start and after every round.
    """
    device = next(model.parameters()).device
    vocabulary = vocabulary or len(embedding_matrix(model))
    if begun is None:
        tokens = random_sequences(1, length, vocabulary, generator, opening)[0].to(device)
        with during("alignment of random tokens"):
            # The start stands among the random sequences of one batch.
            sequences = torch.cat([tokens[None], baseline])
            best, *randoms = sequence_alignments(model, subspace, sequences)
        history = [best]
    else:
        tokens = torch.tensor(begun.tokens, device=device)
        history, randoms = list(begun.history), list(begun.random_alignments)
        best = history[-1]
        generator.set_state(begun.stream)

    def keep_state() -> None:
        stream = generator.get_state()
        keep(SearchState(tuple(tokens.tolist()), tuple(history), tuple(randoms), stream))

    if begun is None:
        keep_state()
    gradient: torch.Tensor | None = None
    done = len(history) - 1
    rounds = range(done, steps)
    for _ in phase("catalyst search", rounds, steps, lambda: f"ρ {history[-1]:.4f}", begin=done):
        if gradient is None:  # a round without improvement leaves it as it was
            gradient = token_gradient(model, subspace, tokens)[:, :vocabulary]
        proposals = propose_swaps(tokens, gradient, candidates, generator, len(opening))
        alignments = sequence_alignments(model, subspace, proposals)
        for proposal, rho in zip(proposals, alignments, strict=True):
            if rho > best:  # the round's highest, the first of equal ones
                best, tokens, gradient = rho, proposal, None
        history.append(best)
        keep_state()
    return Catalyst(tokens, best, tuple(history), tuple(randoms), 1 + steps * candidates)
