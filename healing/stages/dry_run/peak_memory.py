"""Predicted peak memory of attack and healing: the project's own stages, run at true shapes on
tensors without content (:mod:`healing.stages.dry_run.tensor_bytes`).
"""

from __future__ import annotations

import functools
import itertools
import pathlib
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from healing.attacks import clean_hessian, gram_alignment
from healing.attacks.clean_hessian import basis_place
from healing.attacks.context import prepare_arm
from healing.attacks.gram_alignment import sequences_per_batch
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.shared import BaseConfig
from healing.curvature.hessian import HessianOperator
from healing.curvature.lanczos import gaussian
from healing.curvature.stochastic_lanczos import RayleighPercentile, rayleigh_quotient
from healing.curvature.subspaces import MatrixSubspace
from healing.measurements.probe import TOKENS_PER_FORWARD, Measurement, Probe
from healing.measurements.rank_standard_error import BOOTSTRAP_MAX_DIMENSION
from healing.models.blocks import block_matrices, embedding_matrix, transformer_blocks
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.registry import METHODS
from healing.stages.dry_run.depth import Run, at_full_depth
from healing.stages.dry_run.plan import attack_plan, heal_plan
from healing.stages.dry_run.shapes_only import shapes_only
from healing.stages.dry_run.tensor_bytes import COPIES, WEIGHTS, Usage, peaks
from healing.training.healing_loop import adapted, heal
from healing.training.nonfinite import takes_a_step

LOADING, PREPARING, ATTACKING, MEASURING, CHECKING, HEALING, WATCHING = (
    "loading",
    "preparing the attack",
    "attack",
    "measurement",
    "first check",
    "healing step",
    "measurement while healing",
)
BESIDE_TENSORS = 160_000_000
"""Bytes that a process on the CPU takes while it runs, beside tensors: texts and their tokens,
buffers of the libraries. Measured with the corpus ``stdlib`` (benchmarks/memory.py); memory that
the C library keeps after it was freed is not in it.
"""
_STEPS = 2
"""Steps that are run: from the second on the optimiser's state is there beside the activations."""
_CHUNKS = 2
"""Forward passes of a measurement that are made: from the second on the moments are there beside
the hidden states.
"""
_WINDOWS = 64
"""Windows of the stand-in for a corpus, where their number has no say."""


@dataclass(frozen=True)
class _ShortProbe(Probe):
    """The first windows of a probe: a measurement's peak does not grow with their number.

    Attributes:
        count: Tokens of the probe that it stands for.
        whole: The model that is measured, in its full depth.
    """

    count: int
    whole: PreTrainedModel

    @classmethod
    def of_config(cls, config: BaseConfig, whole: PreTrainedModel) -> _ShortProbe:
        """Zeros; all windows where each one's moments are kept."""
        length = config.sequence_length
        windows = -(-int(config.probe_tokens) // length)
        tokens = windows * length
        if whole.config.get_text_config().hidden_size > BOOTSTRAP_MAX_DIMENSION:
            windows = min(windows, _CHUNKS * max(1, TOKENS_PER_FORWARD // length))
        return cls(torch.zeros(windows, length, dtype=torch.long), tokens, whole)

    @property
    def tokens(self) -> int:
        """Of the whole probe: whether its states are kept depends on them."""
        return self.count

    def _may_keep(self, model: nn.Module, outputs: list[torch.Tensor]) -> bool:
        """As for the whole model."""
        return super()._may_keep(self.whole, outputs[:1] * len(transformer_blocks(self.whole)))

    def states_left_out(self, model: PreTrainedModel) -> torch.Tensor:
        """Room of the states that a measurement with its error would keep beside these windows'."""
        hidden, device = embedding_matrix(model).shape[1], next(model.parameters()).device
        kept = self._may_keep(model, [torch.empty(1, hidden, device="meta")])
        states = (self.count - self.windows.numel()) * hidden * len(transformer_blocks(model))
        return torch.empty(states if kept else 0, device=device)


@dataclass(frozen=True)
class _WatchedProbe(_ShortProbe):
    """A probe whose measurements are a phase of their own."""

    usage: Usage

    def measure(
        self, model: torch.nn.Module, error_generator: torch.Generator | None = None
    ) -> Measurement:
        with self.usage.phase(WATCHING):
            measured = super().measure(model, error_generator)
        # Without content every count is 1, and all other tokens would be looked into.
        return replace(measured, nonfinite_tokens=0)


@dataclass(frozen=True)
class Prediction:
    """Predicted memory of one run.

    Attributes:
        n_params: Parameters of the model.
        n_trainable: Parameters that are trained.
        device: Where the tensors are.
        base: Bytes of the process without the model: interpreter and libraries, as resident when
            the prediction was asked for, and :data:`BESIDE_TENSORS`.
        phases: Phase → kind → bytes at its peak.
        plan: What the run would do and leave on disk, line by line.
    """

    n_params: int
    n_trainable: int
    device: torch.device
    base: int
    phases: Mapping[str, Mapping[str, int]]
    plan: Sequence[str] = ()

    @property
    def tensor_bytes(self) -> int:
        """Largest total of a phase."""
        return max(sum(kinds.values()) for kinds in self.phases.values())

    @property
    def peak_bytes(self) -> int:
        """On the CPU of the whole process; on an accelerator of its tensors."""
        return self.tensor_bytes + (self.base if self.device.type == "cpu" else 0)


def resident_bytes() -> int:
    """Memory that this process has now, in bytes; its highest so far where only that is known."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(fields["VmRSS"].split()[0])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _base(config: BaseConfig) -> int:
    if isinstance(config, HealConfig):
        METHODS.load(config.healing_method).check(config)  # what it imports is resident
    return resident_bytes() + BESIDE_TENSORS


def _bare_model(
    usage: Usage, architecture: PreTrainedConfig, device: torch.device
) -> PreTrainedModel:
    """The model on its device, after what loading it takes: the mapped file beside the weights
    (where the file holds float32, its pages are the weights until they change), and a copy of one
    tensor to hash.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        architecture, dtype=torch.float32, attn_implementation="sdpa"
    ).to(device)
    model.config.use_cache = False
    usage.watch_blocks(transformer_blocks(model))
    with usage.phase(LOADING):
        usage.claim(WEIGHTS, [*model.parameters(), *model.buffers()])
        state = model.state_dict()
        largest = max(state.values(), key=torch.Tensor.numel)
        # An accelerator is given the weights one by one from the file's pages in host memory.
        usage.new(COPIES, [largest] if device.type != "cpu" else [*state.values(), largest])
    return model.eval()


def _measure_healthy(usage: Usage, probe: _ShortProbe, model: PreTrainedModel) -> Measurement:
    """The measurement with its standard error that every stage begins with."""
    with usage.phase(MEASURING):
        left_out = probe.states_left_out(model)
        measured = probe.measure(model, named_generator(0, "bootstrap"))
        del left_out
    return measured


def _loaded(config: BaseConfig, model: PreTrainedModel, device: torch.device) -> LoadedModel:
    """What the stages read of a loaded model; there is no tokenizer."""
    parts: dict[str, Any] = {"name": config.model, "model": model, "device": device}
    parts |= {"digest": "", "opening": []}
    parts["vocabulary"] = len(embedding_matrix(model))
    return cast(LoadedModel, SimpleNamespace(tokenizer=None, **parts))


def _always_step(
    _scaler: torch.amp.GradScaler, optimizer: Any, _state: Any, *args: Any, **options: Any
) -> Any:
    """In place of a decision that rests on content: whether a gradient is infinite."""
    return optimizer.step(*args, **options)


def predict_healing(
    config: HealConfig, architecture: PreTrainedConfig, device: torch.device
) -> Prediction:
    """Predict the memory of one healing run.

    Args:
        config: Resolved configuration.
        architecture: Of the model.
        device: Where it will be.
    """
    base = _base(config)
    whole, found = at_full_depth(functools.partial(_healing, config, device), architecture)
    count = sum(p.numel() for p in whole.parameters())
    plan = heal_plan(config, count)
    return Prediction(count, found.n_trainable, device, base, peaks(found.moments), plan)


def _healing(
    config: HealConfig,
    device: torch.device,
    architecture: PreTrainedConfig,
    whole: PreTrainedModel,
) -> Run:
    """A healing run of a model of any depth that stands for the whole one."""
    config = replace(
        config,
        healing_steps=_STEPS,
        measurement_interval=_STEPS,
        sham=False,
        reset_norms=False,  # looks at values, and takes no memory to speak of
    )
    vocabulary = architecture.get_text_config().vocab_size
    with (
        shapes_only(),
        Usage(vocabulary, device) as usage,
        mock.patch.object(torch.amp.GradScaler, "_maybe_opt_step", _always_step),
    ):
        model = _bare_model(usage, architecture, device)
        probe = _ShortProbe.of_config(config, whole)
        trainable = METHODS.load(config.healing_method).n_trainable(model, config)
        collapsed = _measure_healthy(usage, probe, model)
        if config.gradient_checkpointing:
            model.activation_checkpointing_enable()
        order = named_generator(0, "sft")
        windows = torch.zeros(int(config.batch_size), config.sequence_length, dtype=torch.long)
        with usage.phase(CHECKING), adapted(model, config, order):
            usage.watch_gradients(model)
            takes_a_step(model, windows.to(device))
        loaded = _loaded(config, model, device)
        watched = _WatchedProbe(probe.windows, probe.count, whole, usage)
        with usage.phase(HEALING):
            for _ in heal(loaded, config, windows, watched, collapsed, order):
                pass
    return Run(usage.moments, trainable)


def _largest_space(
    cls: type[MatrixSubspace], weight: torch.Tensor, energy: float
) -> MatrixSubspace:
    """The most that the directions can take: how many there are depends on the weights, and is most
    where all singular values are equal.
    """
    short, long = sorted(weight.shape)
    k = min(short, int(energy * short) + 1)
    leading, rest = weight.new_empty(long, k), weight.new_empty(short, short - k)
    return cls(leading, rest, weight.shape[0] < weight.shape[1])


def _one_product(
    operator: HessianOperator,
    vector: torch.Tensor,
    generator: torch.Generator,
    _draws: int,
    **_kept: object,
) -> RayleighPercentile:
    """One Hessian product, along a random direction: beside the gradient, as all but the first."""
    quotient = rayleigh_quotient(operator, gaussian(operator, generator))
    return RayleighPercentile(quotient, quotient, vector.new_ones(1))


def _without_the_first_diagnosis(arm: Any) -> Any:
    """An arm that is diagnosed after its step alone: before it the optimiser has no state yet."""
    for name in ("diagnostics", "baselines_now"):
        setattr(arm, name, _but_the_first(getattr(arm, name)))
    return arm


def _but_the_first(diagnose: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    calls = itertools.count()
    return lambda: diagnose() if next(calls) else {}


class _Corpus:
    """Windows without text."""

    def windows(self, split: str, tokenizer: Any, length: int, tokens: int = 0) -> torch.Tensor:
        return torch.zeros(-(-tokens // length) or _WINDOWS, length, dtype=torch.long)


def predict_attack(
    config: AttackConfig, architecture: PreTrainedConfig, device: torch.device
) -> Prediction:
    """Predict the memory of one attack: the making of its arm and one step that is measured.

    The low-curvature subspace of the singular kind counts with as many directions as it can have,
    since their number depends on the weights; what finding them takes for a moment is not seen. Of
    the ``hessian`` kind only the first iterations of Lanczos are. Of what comes one after the
    other (rounds, draws, batches, steps) the fewest that show the peak are run.

    Args:
        config: Resolved configuration.
        architecture: Of the model.
        device: Where it will be.
    """
    base = _base(config)
    whole, found = at_full_depth(functools.partial(_attack, config, device), architecture)
    count = sum(p.numel() for p in whole.parameters())
    plan = attack_plan(config, count)
    return Prediction(count, count, device, base, peaks(found.moments), plan)


def _attack(
    config: AttackConfig,
    device: torch.device,
    architecture: PreTrainedConfig,
    whole: PreTrainedModel,
) -> Run:
    """An attack on a model of any depth that stands for the whole one."""
    candidates, with_start = (
        sequences_per_batch(whole, config.catalyst_length, count)
        for count in (config.search_candidates, config.baseline_draws + 1)
    )
    matrices = sum(p.numel() for p in block_matrices(whole).values())
    config = replace(  # the fewest of what comes one after the other
        config,
        attack_steps=1,
        measurement_interval=1,
        search_steps=min(config.search_steps, 1),
        rayleigh_draws=min(int(config.rayleigh_draws), 1),
        reference_checkpoint="",
        match="norm",
        # One batch of candidates, one of baselines (which the start joins).
        search_candidates=candidates,
        baseline_draws=max(3, with_start - 1),
    )
    vocabulary = architecture.get_text_config().vocab_size
    with (
        shapes_only(),
        Usage(vocabulary, device) as usage,
        mock.patch.object(MatrixSubspace, "of", classmethod(_largest_space)),
        # What this machine cannot hold is what a prediction is asked for.
        mock.patch.object(clean_hessian, "require_room", return_value=None),
        # A comparison of numbers that are not there.
        mock.patch.object(gram_alignment, "_trial_succeeds", return_value=True),
        # Decided by the size of the whole model.
        mock.patch.object(
            gram_alignment, "sequences_per_batch", lambda model, length, count: count
        ),
        mock.patch.object(clean_hessian, "basis_place", return_value=basis_place(matrices)),
        mock.patch.object(clean_hessian, "rayleigh_percentile", _one_product),
        mock.patch.object(
            MatrixSubspace,
            "energies_of_product",
            usage.on_block_of(MatrixSubspace.energies_of_product, lambda space: space.leading),
        ),
    ):
        model = _bare_model(usage, architecture, device)
        probe = _ShortProbe.of_config(config, whole)
        loaded, corpus = _loaded(config, model, device), cast(Any, _Corpus())
        healthy = _measure_healthy(usage, probe, model)
        with usage.phase(PREPARING):
            change = WeightChange(model)
            arm = _without_the_first_diagnosis(prepare_arm(config, loaded, corpus, change).arm)
        usage.watch_gradients(model)
        with usage.phase(ATTACKING):
            for _ in arm.run(loaded, config, probe, healthy, change):
                pass
    return Run(usage.moments, 0)
