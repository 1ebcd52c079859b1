"""The arms: HAEP's treatment, a positive control that collapses, and the controls."""

from __future__ import annotations

import functools
import itertools
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import (
    AlignmentBaselines,
    gradients_of,
    random_sequences,
    sequence_loss,
)
from healing.attacks.base import StepOutcome
from healing.attacks.catalyst_search import Catalyst, search_catalyst
from healing.attacks.clean_hessian import clean_hessian, hessian_subspace, rayleigh_rank
from healing.attacks.loop import gradient_step
from healing.attacks.weight_change import Differences, WeightChange, snapshot
from healing.config.attack import AttackConfig
from healing.config.shared import CONTROL, SHAM, TREATMENT
from healing.curvature.basis_cache import kept_bases
from healing.curvature.hessian import HessianOperator
from healing.curvature.subspaces import LowCurvatureSubspace
from healing.data.splits import Corpus
from healing.data.windows import batches
from healing.errors import CheckpointError
from healing.measurements.spectrum import keep_mask, spectral_entropy
from healing.models.blocks import block_matrices, block_outputs
from healing.models.checkpoints import COLLAPSED_KIND, Checkpoint, read_checkpoint
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.training.nonfinite import all_finite

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
        projected: Whether the optimiser is given P_N of the gradient instead of the gradient
            (``haep_oracle``); parameters outside the matrices then stay.
    """

    stops_early = True

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Callable[[], torch.Tensor],
        fixed_objective: Callable[[], torch.Tensor],
        baselines: AlignmentBaselines,
        change: WeightChange,
        *,
        projected: bool = False,
    ) -> None:
        self.model, self.objective, self.fixed_objective = model, objective, fixed_objective
        self.baselines, self.change, self.projected = baselines, change, projected

    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """One optimiser step on the objective; a watched one says how it treats N (κ)."""
        matrices = block_matrices(self.model)
        before = snapshot(matrices) if watched else {}
        outcome = gradient_step(optimizer, self.objective(), self._project_gradients)
        if watched and outcome.finite:
            gradients = {n: p.grad for n, p in matrices.items() if p.grad is not None}
            update = Differences(matrices, before)
            numbers = self.baselines.subspace.amplification(gradients, update)
            if self.projected:
                del numbers["kappa"]  # there is no gradient outside N to compare with
            outcome = replace(outcome, diagnostics=numbers)
        optimizer.zero_grad()  # measuring and the next forward pass have their room
        return outcome

    def give_gradients(self) -> None:
        """Gradients of the objective on its fixed data, as the optimiser is given them."""
        self.fixed_objective().backward()  # type: ignore[no-untyped-call]
        self._project_gradients()

    def _project_gradients(self) -> None:
        if not self.projected:
            return
        named = dict(self.model.named_parameters())
        subspace = self.baselines.subspace
        gradients = {n: named[n].grad for n in subspace.names}
        inside = subspace.project({n: g for n, g in gradients.items() if g is not None})
        for name, parameter in named.items():
            parameter.grad = inside.get(name)

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
    def place(self, scale: float) -> None:
        """Put the weights at W₀ + scale·E."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self.change.healthy[name] + scale * self.noise[name])

    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """Move every parameter to its place at this step."""
        self.place(step / total)
        return StepOutcome()

    def give_gradients(self) -> None:
        """There are none."""

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


def _require_attack(reference: Checkpoint, path: pathlib.Path, healthy_digest: str) -> None:
    """Refuse as a reference what is not an attack on these very weights.

    Raises:
        CheckpointError: Saying what it is instead.
    """
    made = reference.config
    problem = ""
    if reference.kind != COLLAPSED_KIND:
        problem = "holds healed weights"
    elif made.get("arm") in (CONTROL, SHAM):
        problem = f"is of the arm {made['arm']}"
    elif made.get("healthy_digest", healthy_digest) != healthy_digest:
        problem = "was made from other healthy weights than the ones here"
    if problem:
        raise CheckpointError(
            f"{path} {problem}: give noise the checkpoint of an attack on this model to match"
        )


def _reference_norms(
    config: AttackConfig, change: WeightChange, healthy_digest: str
) -> dict[str, float]:
    """‖ΔW‖ per tensor of the referenced attack, or noise_scale · std · √size."""
    if not config.reference_checkpoint:
        return {
            name: config.noise_scale * float(w.std(correction=0)) * math.sqrt(w.numel())
            for name, w in change.healthy.items()
        }
    path = pathlib.Path(config.reference_checkpoint)
    reference = read_checkpoint(path)
    _require_attack(reference, path, healthy_digest)
    state = reference.state
    wrong = [k for k, w in change.healthy.items() if k not in state or state[k].shape != w.shape]
    if wrong:
        raise CheckpointError(
            f"{path} is not an attack on model {config.model} (tensor {wrong[0]} missing or of "
            "another shape): give --reference-checkpoint an attack on the same model"
        )
    return {k: float((state[k].to(w) - w).norm()) for k, w in change.healthy.items()}


def mean_spectral_entropy(model: PreTrainedModel, batch: torch.Tensor) -> torch.Tensor:
    """Mean over blocks of the entropy of the hidden spectrum of a batch, nats; differentiable. NaN
    where a hidden state is not finite.
    """
    with block_outputs(model) as outputs:
        model(input_ids=batch.to(next(model.parameters()).device))
        if not all(map(all_finite, outputs)):
            return math.nan * outputs[-1].sum()  # eigenvalues would raise
        entropies = []
        for hidden in outputs:
            rows = hidden[keep_mask(hidden.detach())]
            rows = (rows - rows.mean(0)).double()
            values = torch.linalg.eigvalsh(rows.T @ rows / len(rows))
            # √λ has no derivative at 0, where collapsed directions end up.
            floor = ENTROPY_FLOOR * float(values.detach().sum())
            entropies.append(spectral_entropy(values.clamp_min(floor)))
    return torch.stack(entropies).mean()


@dataclass(frozen=True)
class Preparation:
    """An arm ready to run, and what was found while it was made.

    Attributes:
        arm: What the driver runs.
        catalyst: Result of the search (``haep`` and ``haep_oracle``).
        numbers: Curvature at the healthy weights.
        statuses: How the iterations behind these numbers ended.
    """

    arm: ObjectiveArm | NoiseArm
    catalyst: Catalyst | None = None
    numbers: Mapping[str, float] = field(default_factory=dict)
    statuses: Mapping[str, str] = field(default_factory=dict)


class _Maker:
    """Makes the arm of one configuration from the healthy model."""

    def __init__(
        self, config: AttackConfig, loaded: LoadedModel, corpus: Corpus, change: WeightChange
    ) -> None:
        self.config, self.loaded, self.corpus, self.change = config, loaded, corpus, change
        self.model, self.length = loaded.model, config.catalyst_length
        self.vocabulary = loaded.vocabulary
        self.numbers: dict[str, float] = {}
        self.statuses: dict[str, str] = {}
        self.texts = corpus.windows("attack", loaded.tokenizer, self.length).to(loaded.device)
        self.pick = torch.randperm(len(self.texts), generator=named_generator(config.seed, "text"))
        randoms = random_sequences(
            config.baseline_draws,
            self.length,
            self.vocabulary,
            named_generator(config.seed, "baseline"),
        ).to(loaded.device)
        self.baselines = AlignmentBaselines(self._subspace(), randoms, self.texts[self.pick[0]])

    @functools.cached_property
    def hessian(self) -> HessianOperator:
        return clean_hessian(self.config, self.loaded, self.corpus)

    def _subspace(self) -> LowCurvatureSubspace:
        config = self.config
        if config.subspace == "singular":
            matrices = block_matrices(self.model)
            return kept_bases(
                matrices, config.subspace_energy, self.loaded.digest, config.cache_dir
            )
        start = named_generator(config.seed, "lanczos")
        found = hessian_subspace(self.hessian, self.model, config.hessian_directions, start)
        self.numbers |= found.metrics()
        self.statuses["hessian_status"] = found.status
        return found.subspace

    def noise(self) -> NoiseArm:
        config, change = self.config, self.change
        zero = config.arm == "none"
        norms = (
            dict.fromkeys(change.healthy, 0.0)
            if zero
            else _reference_norms(config, change, self.loaded.digest)
        )
        draws = named_generator(config.seed, "attack", config.arm)
        return NoiseArm(
            self.model, gaussian_noise(change.healthy, norms, draws), self.baselines, change
        )

    def spectral(self) -> ObjectiveArm:
        config = self.config
        windows = self.corpus.windows("attack", self.loaded.tokenizer, config.sequence_length)
        draws = named_generator(config.seed, "attack", config.arm)
        stream = batches(windows, int(config.batch_size), draws)
        fixed = next(stream)
        return ObjectiveArm(
            self.model,
            lambda: mean_spectral_entropy(self.model, next(stream)),
            lambda: mean_spectral_entropy(self.model, fixed),
            self.baselines,
            self.change,
        )

    def catalyst(self) -> Catalyst:
        config = self.config
        found = search_catalyst(
            self.model,
            self.baselines.subspace,
            self.baselines.random,
            length=self.length,
            steps=config.search_steps,
            candidates=config.search_candidates,
            # The oracle draws what haep draws: the two differ in the projection alone.
            generator=named_generator(config.seed, "attack", TREATMENT),
            vocabulary=self.vocabulary,
        )
        if config.rayleigh_draws:
            gradients = gradients_of(self.model, sequence_loss(self.model, found.tokens))
            randoms = named_generator(config.seed, "rayleigh")
            draws = int(config.rayleigh_draws)
            self.numbers |= rayleigh_rank(self.hessian, gradients, draws, randoms)
        return found

    def sequence(self, tokens: torch.Tensor) -> ObjectiveArm:
        def objective() -> torch.Tensor:
            return sequence_loss(self.model, tokens)

        return ObjectiveArm(
            self.model,
            objective,
            objective,
            self.baselines,
            self.change,
            projected=self.config.arm == "haep_oracle",
        )

    def make(self) -> Preparation:
        arm, catalyst = self.config.arm, None
        made: ObjectiveArm | NoiseArm
        if arm in ("gaussian_noise", "none"):
            made = self.noise()
        elif arm == "spectral":
            made = self.spectral()
        elif arm in (TREATMENT, "haep_oracle"):
            catalyst = self.catalyst()
            made = self.sequence(catalyst.tokens)
        elif arm == "random_tokens":
            draws = named_generator(self.config.seed, "attack", arm)
            tokens = random_sequences(1, self.length, self.vocabulary, draws)[0]
            made = self.sequence(tokens.to(self.loaded.device))
        elif arm == "random_text":
            made = self.sequence(self.texts[self.pick[1]])
        else:
            raise ValueError(f"no arm is made under the name {arm!r}")
        return Preparation(made, catalyst, self.numbers, self.statuses)


def make_arm(
    config: AttackConfig, loaded: LoadedModel, corpus: Corpus, change: WeightChange
) -> Preparation:
    """The arm that the configuration names, ready to run.

    Raises:
        CorpusError: The attack split is too small.
        CheckpointError: The reference of matched noise cannot be used.
    """
    return _Maker(config, loaded, corpus, change).make()


def warmup_batches(
    config: AttackConfig, loaded: LoadedModel, corpus: Corpus
) -> Iterator[torch.Tensor]:
    """``warmup_steps`` batches of clean text (windows, tokens) from the attack split.

    Raises:
        CorpusError: The attack split is too small.
    """
    if config.warmup_steps:
        windows = corpus.windows("attack", loaded.tokenizer, config.sequence_length)
        draws = named_generator(config.seed, "warmup")
        stream = batches(windows, int(config.batch_size), draws)
        for batch in itertools.islice(stream, config.warmup_steps):
            yield batch.to(loaded.device)
