"""The attack loop: one function, one optimiser, one budget and one probe for every arm."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from healing.config import AttackConfig
from healing.models import LoadedModel
from healing.probe import Measurement, Probe


class Arm(Protocol):
    """What an arm decides: what is fed or added, and nothing else."""

    stops_early: bool
    """Whether reaching the target rank reduction ends the attack."""

    def advance(self, optimizer: torch.optim.Optimizer, step: int, total: int) -> StepOutcome:
        """Do step ``step`` (from 1) of ``total``."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers of the arm's own at the current weights (alignment and its baselines)."""


@dataclass(frozen=True)
class StepOutcome:
    """What one step did.

    Attributes:
        objective: The arm's own objective before the step (nats for language-model losses).
        grad_norm: Gradient norm; NaN for arms without one.
        finite: Whether the step could be taken.
    """

    objective: float = math.nan
    grad_norm: float = math.nan
    finite: bool = True


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
        return {**self.measurement.metrics(), **own, **self.diagnostics}


class WeightChange:
    """‖W−W₀‖/‖W₀‖ against a snapshot of the healthy weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.healthy = {k: p.detach().clone() for k, p in model.named_parameters()}
        self._norm = math.sqrt(sum(float(p.double().square().sum()) for p in self.healthy.values()))

    def delta(self, model: torch.nn.Module) -> dict[str, torch.Tensor]:
        """W−W₀ by parameter name."""
        return {k: p.detach() - self.healthy[k] for k, p in model.named_parameters()}

    def relative(self, model: torch.nn.Module) -> float:
        """The ratio of norms over all parameters."""
        squares = sum(float(d.double().square().sum()) for d in self.delta(model).values())
        return math.sqrt(squares) / self._norm


def gradient_step(optimizer: torch.optim.Optimizer, objective: torch.Tensor) -> StepOutcome:
    """Backward and optimiser step of one scalar objective; not taken where it is not finite."""
    optimizer.zero_grad()
    objective.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    finite = math.isfinite(norm) and bool(torch.isfinite(objective))
    if finite:
        optimizer.step()
    return StepOutcome(float(objective.detach()), norm, finite)


def run_attack(
    loaded: LoadedModel,
    arm: Arm,
    config: AttackConfig,
    probe: Probe,
    healthy: Measurement,
    change: WeightChange,
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
    """
    model = loaded.model
    total = 0 if config.arm == "none" else int(config.attack_steps)
    # No weight decay: it would shrink the weights even where the arm's gradient is zero.
    optimizer = torch.optim.AdamW(model.parameters(), lr=float(config.attack_lr), weight_decay=0.0)
    yield AttackRecord(0, healthy, StepOutcome(), 0.0, arm.diagnostics())
    target = healthy.effective_rank * (1.0 - config.target_rank_reduction)
    for step in range(1, total + 1):
        outcome = arm.advance(optimizer, step, total)
        if step % config.measurement_interval and step != total and outcome.finite:
            continue
        measurement = probe.measure(model)
        yield AttackRecord(step, measurement, outcome, change.relative(model), arm.diagnostics())
        reached = arm.stops_early and measurement.effective_rank <= target
        if reached or not outcome.finite:
            return
