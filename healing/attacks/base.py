"""What an arm is to the attack loop, and what the loop yields."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from healing.measurements.probe import Measurement


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
