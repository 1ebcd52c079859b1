"""How long an attack or a healing run would take here: one step of each kind, timed.

Of a step the second is timed: the first one makes the optimiser's state. In the place of text and
of the subspace stand random tokens and zeros of the same shapes. Of what takes long in a run, the
iterations that find a ``hessian`` subspace are not timed, nor are text, files, figures and store.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, cast
from unittest import mock

import torch

from healing.attacks.alignment import random_sequences, sequence_alignments
from healing.attacks.base import Arm
from healing.attacks.catalyst_search import token_gradient
from healing.attacks.context import AttackContext
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.shared import BaseConfig
from healing.curvature.subspaces import MatrixSubspace
from healing.measurements.probe import Probe
from healing.models.blocks import block_matrices, next_token_loss
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.registry import ARMS
from healing.stages.dry_run.plan import (
    SEARCHING,
    attack_measurements,
    healing_runs,
    measurements,
    with_shams,
)
from healing.training.healing_loop import adapted
from healing.training.optimizers import make_optimizer
from healing.training.precision import Precision
from healing.training.trainer import Trainer

PROBE_TOKENS = 512
"""Of a measurement these are timed, and twice as many: a part grows with them, a part does not."""

FIRST_PRODUCT, OTHER_PRODUCTS = 3.5, 2.2
"""Hessian products in gradients of the same tokens (docs/performance.md)."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """So many times something.

    Attributes:
        what: In the plural, or what happens once.
        count: How often.
        seconds: Of one.
    """

    what: str
    count: int
    seconds: float

    @property
    def total(self) -> float:
        """Seconds of all."""
        return self.count * self.seconds

    def __str__(self) -> str:
        if self.count == 1:
            return f"{self.what} {duration(self.total)}"
        return f"{self.count:,} {self.what} {duration(self.total)} ({self.seconds:.2g} s each)"


def duration(seconds: float) -> str:
    """``8 s``, ``3 min 20 s``, ``5 h 10 min``."""
    if seconds < 59.5:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def in_words(name: str, costs: Sequence[Cost]) -> str:
    """Lines for a terminal on a stage."""
    total = sum(cost.total for cost in costs)
    parts = ", ".join(str(cost) for cost in costs if cost.count)
    return f"{name}: about {duration(total)} here\n  {parts}"


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of one call; an accelerator is waited for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _tokens(loaded: LoadedModel, windows: int, length: int) -> torch.Tensor:
    return random_sequences(windows, length, loaded.vocabulary, named_generator(0, "timing"))


def _measurements(config: BaseConfig, loaded: LoadedModel, plain: int, runs: int) -> list[Cost]:
    """Those of so many runs: two of each with standard errors, ``plain`` without.

    One takes what a line through two short ones says. Its error takes on top what it takes a short
    one: the spectra of resampled states, which do not depend on the number of windows.
    """
    length = config.sequence_length
    few = max(1, PROBE_TOKENS // length)
    taken = []
    for windows, draws in ((few, None), (2 * few, None), (few, named_generator(0, "timing"))):
        probe = Probe(_tokens(loaded, windows, length))
        measuring = functools.partial(probe.measure, loaded.model, draws)
        taken.append(seconds_of(measuring, loaded.device))
    short, double, with_error = taken
    more = (-(-int(config.probe_tokens) // length) - few) / few
    one = short + max(0.0, double - short) * more
    return [
        Cost("measurements", runs * plain, one),
        Cost("with standard errors", 2 * runs, one + max(0.0, with_error - short)),
    ]


def healing_costs(config: HealConfig, loaded: LoadedModel) -> list[Cost]:
    """Of all healing runs of one checkpoint; the model's weights are other ones afterwards."""
    model, total = loaded.model, int(config.healing_steps)
    if config.gradient_checkpointing:
        model.activation_checkpointing_enable()
    batch = _tokens(loaded, int(config.batch_size), config.sequence_length).to(loaded.device)
    precision = Precision(config.precision, config.precision_mode)
    runs = healing_runs(config) * (2 if with_shams(config) else 1)
    with adapted(model, config, named_generator(0, "sft")), precision.weights(model):
        trainer = Trainer(model, config)
        trainer.step(batch)
        step = seconds_of(lambda: trainer.step(batch), loaded.device)
        with precision.measuring(model):
            plain = measurements(total, config.measurement_interval) - 2
            measuring = _measurements(config, loaded, plain, runs)
    return [Cost("steps", runs * total, step), *measuring]


class _Corpus:
    """Windows of random tokens in the place of text."""

    def __init__(self, loaded: LoadedModel, count: int) -> None:
        self._loaded, self._count = loaded, count

    def windows(self, split: str, tokenizer: Any, length: int, tokens: int = 0) -> torch.Tensor:
        return _tokens(self._loaded, -(-tokens // length) or self._count, length)


def _empty_subspace(
    cls: type[MatrixSubspace], weight: torch.Tensor, energy: float
) -> MatrixSubspace:
    """Half of the directions leading, all of them zero: as much to multiply as any."""
    short, long = sorted(weight.shape)
    k = short // 2
    return cls(
        weight.new_zeros(long, k),
        weight.new_zeros(short, short - k),
        weight.shape[0] < weight.shape[1],
    )


def _bases(config: AttackConfig, loaded: LoadedModel) -> float:
    """Seconds of all, from one matrix of every shape."""
    weights = list(block_matrices(loaded.model).values())
    counts = Counter(weight.shape for weight in weights)
    examples = {weight.shape: weight for weight in weights}
    found = 0.0
    for shape, count in counts.items():
        one = functools.partial(MatrixSubspace.of, examples[shape], config.subspace_energy)
        found += count * seconds_of(one, loaded.device)
    return found


def _search(config: AttackConfig, context: AttackContext) -> list[Cost]:
    """Rounds of the catalyst search, and Hessian products, of which a gradient is timed."""
    model, subspace, loaded = context.model, context.subspace, context.loaded
    sequences = _tokens(loaded, config.search_candidates, config.catalyst_length)
    sequences = sequences.to(loaded.device)

    def one_round() -> None:
        token_gradient(model, subspace, sequences[0])
        sequence_alignments(model, subspace, sequences)

    seconds = seconds_of(one_round, loaded.device)
    # The random sequences cost as many candidates do.
    random = 1 + round(config.baseline_draws / config.search_candidates)
    costs = [Cost("rounds of the search", config.search_steps + random, seconds)]
    if draws := int(config.rayleigh_draws):
        length = min(config.sequence_length, int(config.curvature_tokens))
        windows = _tokens(loaded, int(config.curvature_tokens) // length, length)
        gradient = seconds_of(
            lambda: next_token_loss(model, windows.to(loaded.device)).backward(), loaded.device
        )
        model.zero_grad()
        products = FIRST_PRODUCT + OTHER_PRODUCTS * draws
        costs.append(Cost("curvature ranks", 1, gradient * products))
    return costs


def _comparisons(records: int, interval: int) -> int:
    """How often baselines are taken: at the first record, the last, and every interval between."""
    return len({0, records - 1, *range(0, records, interval or records)})


def _steps(config: AttackConfig, loaded: LoadedModel, arm: Arm) -> list[Cost]:
    total = arm.steps(config)
    parameters = loaded.model.parameters()
    optimizer = make_optimizer(config.attack_optimizer, parameters, float(config.attack_lr))
    numbers = itertools.count(1)

    def step() -> None:
        arm.advance(optimizer, next(numbers), max(total, 2), watched=False)

    each = 0.0
    if total:
        step()
        each = seconds_of(step, loaded.device)
    deciding = measurements(total, config.measurement_interval) - 2
    plain = attack_measurements(total, config) - 2
    diagnoses, comparisons = (
        seconds_of(diagnose, loaded.device) for diagnose in (arm.diagnostics, arm.baselines_now)
    )
    # What is asked for at every record, and is nothing for most arms.
    asked = Cost("records", plain + 1, diagnoses)
    compared = Cost("baselines", _comparisons(deciding + 1, config.baseline_interval), comparisons)
    return [
        Cost("steps", total, each),
        *_measurements(config, loaded, plain, 1),
        Cost("diagnostics", 1, asked.total + compared.total),
    ]


def attack_costs(config: AttackConfig, loaded: LoadedModel) -> list[Cost]:
    """Of one attack at its full budget, whose bases are not kept from an earlier one; the model's
    weights are other ones afterwards.
    """
    short = dataclasses.replace(
        config,
        search_steps=0,
        baseline_draws=3,
        rayleigh_draws=0,
        subspace="singular",
        cache_dir="",
        reference_checkpoint="",
        reference_run_id="",
        match="norm",
    )
    corpus: Any = _Corpus(loaded, max(2, int(config.batch_size)))
    context = AttackContext(short, loaded, cast(Any, corpus), WeightChange(loaded.model))
    with mock.patch.object(MatrixSubspace, "of", classmethod(_empty_subspace)):
        arm: Arm = ARMS.load(config.arm).make(context)
    costs = []
    if config.subspace == "singular" and "subspace" in vars(context):
        costs.append(Cost("bases", 1, _bases(config, loaded)))
    if config.arm in SEARCHING:
        costs += _search(config, context)
    if config.warmup_steps:
        batch = _tokens(loaded, int(config.batch_size), config.sequence_length).to(loaded.device)
        gradient = seconds_of(
            lambda: next_token_loss(loaded.model, batch).backward(), loaded.device
        )
        loaded.model.zero_grad()
        costs.append(Cost("warm-up batches", config.warmup_steps, gradient))
    return [*costs, *_steps(config, loaded, arm)]
