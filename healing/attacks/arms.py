"""The arms: HAEP's treatment, a positive control that collapses, and the controls."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Iterator, Mapping

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import (
    AlignmentBaselines,
    gradients_of,
    random_sequences,
    sequence_loss,
)
from healing.attacks.driver import Arm, StepOutcome, WeightChange, gradient_step
from healing.attacks.haep import Catalyst, search_catalyst
from healing.config import AttackConfig
from healing.corpora import Corpus, batches
from healing.models import (
    CheckpointError,
    LoadedModel,
    block_matrices,
    block_outputs,
    embedding_matrix,
    read_checkpoint,
)
from healing.randomness import named_generator
from healing.spectra import keep_mask, spectral_entropy
from healing.subspaces import LowCurvatureSubspace

ENTROPY_FLOOR = 1e-10
"""Eigenvalues under this share of their sum count as this share in the ``spectral`` objective."""


class ObjectiveArm:
    """Gradient descent on an objective that the arm defines.

    Args:
        model: The model under attack.
        objective: The next step's objective; may draw data.
        fixed_objective: The same on fixed data, for diagnostics: measuring must not draw from the
            attack's own stream.
        baselines: What the gradient's alignment is compared with.
        change: Snapshot of the healthy weights.
    """

    stops_early = True

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Callable[[], torch.Tensor],
        fixed_objective: Callable[[], torch.Tensor],
        baselines: AlignmentBaselines,
        change: WeightChange,
    ) -> None:
        self.model, self.objective, self.fixed_objective = model, objective, fixed_objective
        self.baselines, self.change = baselines, change

    def advance(self, optimizer: torch.optim.Optimizer, step: int, total: int) -> StepOutcome:
        """One optimiser step on the objective."""
        return gradient_step(optimizer, self.objective())

    def diagnostics(self) -> dict[str, float]:
        """ρ of the objective's gradient beside its baselines."""
        own = self.baselines.subspace.alignment(gradients_of(self.model, self.fixed_objective()))
        delta = self.change.delta(self.model)
        return {"alignment": float(own), **self.baselines.metrics(self.model, delta)}


class NoiseArm:
    """Adds a fixed weight perturbation in equal parts over the budget: W₀ + (step/total)·E."""

    # Stopping early would leave the noise smaller than what it is matched to.
    stops_early = False

    def __init__(
        self,
        model: PreTrainedModel,
        noise: Mapping[str, torch.Tensor],
        baselines: AlignmentBaselines,
        change: WeightChange,
    ) -> None:
        self.model, self.noise = model, noise
        self.baselines, self.change = baselines, change

    @torch.no_grad()
    def advance(self, optimizer: torch.optim.Optimizer, step: int, total: int) -> StepOutcome:
        """Move every parameter to its place at this step."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.change.healthy[name] + (step / total) * self.noise[name])
        return StepOutcome()

    def diagnostics(self) -> dict[str, float]:
        """ρ of the weight change beside its baselines; there is no objective gradient."""
        return self.baselines.metrics(self.model, self.change.delta(self.model))


def gaussian_noise(
    healthy: Mapping[str, torch.Tensor], norms: Mapping[str, float], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Per-tensor Gaussian noise of the given Frobenius norms, drawn on the CPU in name order."""
    noise = {}
    for name in sorted(healthy):
        draw = torch.randn(healthy[name].shape, generator=generator)
        noise[name] = (draw * (norms[name] / float(draw.norm()))).to(healthy[name])
    return noise


def _reference_norms(config: AttackConfig, change: WeightChange) -> dict[str, float]:
    """‖ΔW‖ per tensor of the referenced attack, or noise_scale · std · √size."""
    if not config.reference_checkpoint:
        return {
            name: config.noise_scale * float(w.std(correction=0)) * math.sqrt(w.numel())
            for name, w in change.healthy.items()
        }
    path = pathlib.Path(config.reference_checkpoint)
    state = read_checkpoint(path).state
    wrong = [k for k, w in change.healthy.items() if k not in state or state[k].shape != w.shape]
    if wrong:
        raise CheckpointError(
            f"{path} is not an attack on model {config.model} (tensor {wrong[0]} missing or of "
            "another shape): give --reference-checkpoint an attack on the same model"
        )
    return {k: float((state[k].to(w) - w).norm()) for k, w in change.healthy.items()}


def mean_spectral_entropy(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean over blocks of the entropy of the hidden spectrum of a batch, nats; differentiable."""
    with block_outputs(model) as outputs:
        model(input_ids=batch.to(next(model.parameters()).device))
        entropies = []
        for hidden in outputs:
            rows = hidden[keep_mask(hidden.detach())]
            rows = (rows - rows.mean(0)).double()
            values = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
            # √λ has no derivative at 0, where collapsed directions end up.
            floor = ENTROPY_FLOOR * float(values.detach().sum())
            entropies.append(spectral_entropy(values.clamp_min(floor)))
    return torch.stack(entropies).mean()


def _spectral_arm(
    model: PreTrainedModel,
    stream: Iterator[torch.Tensor],
    baselines: AlignmentBaselines,
    change: WeightChange,
) -> ObjectiveArm:
    fixed = next(stream)
    return ObjectiveArm(
        model,
        lambda: mean_spectral_entropy(model, next(stream)),
        lambda: mean_spectral_entropy(model, fixed),
        baselines,
        change,
    )


def _sequence_arm(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    baselines: AlignmentBaselines,
    change: WeightChange,
) -> ObjectiveArm:
    def objective() -> torch.Tensor:
        return sequence_loss(model, tokens)

    return ObjectiveArm(model, objective, objective, baselines, change)


def make_arm(
    config: AttackConfig, loaded: LoadedModel, corpus: Corpus, change: WeightChange
) -> tuple[Arm, Catalyst | None]:
    """The arm that the configuration names, ready to run; the catalyst of ``haep``.

    Raises:
        CorpusError: The attack split is too small.
        CheckpointError: The reference of matched noise cannot be used.
    """
    model = loaded.model
    subspace = LowCurvatureSubspace.of(block_matrices(model), config.subspace_energy)
    vocabulary, length = len(embedding_matrix(model)), config.catalyst_length
    randoms = random_sequences(
        config.baseline_draws, length, vocabulary, named_generator(config.seed, "baseline")
    ).to(loaded.device)
    draws = named_generator(config.seed, "attack", config.arm)
    texts = corpus.windows("attack", loaded.tokenizer, length).to(loaded.device)
    pick = torch.randperm(len(texts), generator=named_generator(config.seed, "text"))
    baselines = AlignmentBaselines(subspace, randoms, texts[pick[0]])

    if config.arm in ("gaussian_noise", "none"):
        zero = config.arm == "none"
        norms = dict.fromkeys(change.healthy, 0.0) if zero else _reference_norms(config, change)
        return NoiseArm(
            model, gaussian_noise(change.healthy, norms, draws), baselines, change
        ), None
    if config.arm == "spectral":
        windows = corpus.windows("attack", loaded.tokenizer, config.sequence_length)
        stream = batches(windows, int(config.batch_size), draws)
        return _spectral_arm(model, stream, baselines, change), None
    catalyst = None
    if config.arm == "haep":
        catalyst = search_catalyst(
            model,
            subspace,
            randoms,
            length=length,
            steps=config.search_steps,
            candidates=config.search_candidates,
            generator=draws,
        )
        tokens = catalyst.tokens
    elif config.arm == "random_tokens":
        tokens = random_sequences(1, length, vocabulary, draws)[0].to(loaded.device)
    else:
        tokens = texts[pick[1]]
    return _sequence_arm(model, tokens, baselines, change), catalyst
