"""The attack loop: one function, one optimiser, one budget and one probe for every arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from transformers import PreTrainedModel

from healing.config import AttackConfig
from healing.models import LoadedModel, next_token_loss
from healing.optimizers import make_optimizer
from healing.probe import Measurement, Probe


class Arm(Protocol):
    """What an arm decides: what is fed or added, and nothing else."""

    stops_early: bool
    """Whether reaching the target rank reduction ends the attack."""

    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """Do step ``step`` (from 1) of ``total``; a watched one is also diagnosed."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the arm's own at the current weights (alignment and its baselines)."""

    def give_gradients(self) -> None:
        """Put the objective's gradients at the current weights where the optimiser finds them."""


@dataclass(frozen=True)
class StepOutcome:
    """What one step did.

    Attributes:
        objective: The arm's own objective before the step (nats for language-model losses).
        grad_norm: Gradient norm; NaN for arms without one.
        finite: Whether the step could be taken.
        diagnostics: Numbers of a watched step: what the optimiser made of the gradient.
    """

    objective: float = math.nan
    grad_norm: float = math.nan
    finite: bool = True
    diagnostics: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class AttackRecord:
    """One point of the attack's trajectory.

    Attributes:
        step: Optimiser steps done.
        measurement: On the clean probe.
        outcome: Of the last step.
        weight_change: ‖W−W₀‖/‖W₀‖ over all parameters.
        diagnostics: The arm's own numbers.
    """

    step: int
    measurement: Measurement
    outcome: StepOutcome
    weight_change: float
    diagnostics: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """All numbers under the names of the MLflow contract."""
        own = {
            "train_loss": self.outcome.objective,
            "grad_norm": self.outcome.grad_norm,
            "weight_change": self.weight_change,
        }
        return {
            **self.measurement.metrics(),
            **own,
            **self.diagnostics,
            **self.outcome.diagnostics,
        }


class Differences(Mapping[str, torch.Tensor]):
    """p − reference by parameter name, formed one tensor at a time as they are asked for.

    Args:
        parameters: Name → parameter.
        reference: Name → tensor of the same shape, on any device.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor]
    ) -> None:
        self._parameters, self._reference = parameters, reference

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = self._parameters[name].detach()
        return parameter - self._reference[name].to(parameter.device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)


def snapshot(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies in host memory: an accelerator has better use for its own."""
    return {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}


class WeightChange:
    """‖W−W₀‖/‖W₀‖ against a snapshot of the healthy weights, in host memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.healthy = snapshot(dict(model.named_parameters()))
        self._norm = _norm(self.healthy)

    def delta(self, model: torch.nn.Module) -> Differences:
        """W−W₀ by parameter name."""
        return Differences(dict(model.named_parameters()), self.healthy)

    def relative(self, model: torch.nn.Module) -> float:
        """The ratio of norms over all parameters."""
        return _norm(self.delta(model)) / self._norm


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    norms = (torch.linalg.vector_norm(t, dtype=torch.float64) for t in tensors.values())
    return math.sqrt(sum(float(norm) ** 2 for norm in norms))


def gradient_step(
    optimizer: torch.optim.Optimizer,
    objective: torch.Tensor,
    change_gradients: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Backward and optimiser step of one scalar objective; not taken where it is not finite.

    Args:
        optimizer: Takes the step.
        objective: What is descended.
        change_gradients: Called between backward and step.
    """
    optimizer.zero_grad()
    objective.backward()  # type: ignore[no-untyped-call]
    change_gradients()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    finite = math.isfinite(norm) and bool(torch.isfinite(objective))
    if finite:
        optimizer.step()
    return StepOutcome(float(objective.detach()), norm, finite)


def warm_second_moment(
    optimizer: torch.optim.Optimizer, model: PreTrainedModel, clean_batches: Iterable[torch.Tensor]
) -> None:
    """Let AdamW's second moment see clean gradients without moving the weights.

    The steps are taken at learning rate 0. Where clean text has little gradient the second moment
    stays small, and AdamW then takes long steps there. The first moment is set anew by
    :func:`prime_first_moment`.

    Args:
        optimizer: AdamW without weight decay.
        model: The healthy model.
        clean_batches: Windows (batch, tokens) of clean text.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for batch in clean_batches:
        gradient_step(optimizer, next_token_loss(model, batch))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def prime_first_moment(optimizer: torch.optim.Optimizer, arm: Arm) -> None:
    """Make AdamW's first moment that of the attack's own gradient g instead of clean text's.

    m = (1−β₁ᴷ)·g after K warm-up steps, so that the bias-corrected moment of the first attack step
    is g. Clearing it instead would shrink the first steps tenfold: its bias correction is spent.
    """
    optimizer.zero_grad()
    arm.give_gradients()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                gradient = parameter.grad
                state["exp_avg"].zero_()
                if gradient is not None:
                    share = 1.0 - group["betas"][0] ** float(state["step"])
                    state["exp_avg"].add_(gradient, alpha=share)
    optimizer.zero_grad()


def run_attack(
    loaded: LoadedModel,
    arm: Arm,
    config: AttackConfig,
    probe: Probe,
    healthy: Measurement,
    change: WeightChange,
    warmup: Iterable[torch.Tensor] = (),
) -> Iterator[AttackRecord]:
    """Attack a model in place, yielding a record at step 0, every interval and the last step.

    The attack ends with its budget, when the effective rank on the probe fell by
    ``target_rank_reduction`` (arms that stop early), or at the first step that is not finite.

    Args:
        loaded: The healthy model; changed in place.
        arm: What to feed or add.
        config: Resolved configuration.
        probe: Clean probe.
        healthy: Measurement of the model as it comes.
        change: Snapshot of the model as it comes.
        warmup: Clean batches for :func:`warm_second_moment`.
    """
    model = loaded.model
    total = 0 if config.arm == "none" else int(config.attack_steps)
    rate = float(config.attack_lr)
    optimizer = make_optimizer(config.attack_optimizer, model.parameters(), rate)
    warm_second_moment(optimizer, model, warmup)
    if optimizer.state:
        prime_first_moment(optimizer, arm)
    yield AttackRecord(0, healthy, StepOutcome(), 0.0, arm.diagnostics())
    target = healthy.effective_rank * (1.0 - config.target_rank_reduction)
    for step in range(1, total + 1):
        watched = step % config.measurement_interval == 0 or step == total
        outcome = arm.advance(optimizer, step, total, watched=watched)
        if outcome.finite and not watched:
            continue
        measurement = probe.measure(model)
        yield AttackRecord(step, measurement, outcome, change.relative(model), arm.diagnostics())
        reached = arm.stops_early and measurement.effective_rank <= target
        if reached or not outcome.finite:
            return
