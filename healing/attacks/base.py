"""What an arm is to the attack loop, and what the loop yields."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from healing.attacks.catalyst_search import Catalyst
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.measurements.probe import Measurement, Probe
from healing.models.loading import LoadedModel
from healing.progress import Safe


class Arm(Protocol):
    """What an arm decides: what is fed or added, and nothing else.

    :class:`healing.attacks.loop.LoopArm` has the common loop; an arm inherits it and overrides what
    is its own.
    """

    stops_early: bool
    """Whether reaching the target rank reduction ends the attack."""
    resumable: bool
    """Whether its next step depends on nothing but weights, optimiser, step and what
    :meth:`pass_over` brings back: an attack that was cut then goes on from its last safe point,
    otherwise from its beginning.
    """
    catalyst: Catalyst | None
    """The search of the tokens that it trains on, if there was one."""

    def steps(self, config: AttackConfig) -> int:
        """Budget in optimiser steps."""

    def run(
        self,
        loaded: LoadedModel,
        config: AttackConfig,
        probe: Probe,
        healthy: Measurement,
        change: WeightChange,
        warmup: Iterable[torch.Tensor] = (),
        kept: Mapping[str, Any] | None = None,
    ) -> Iterator[AttackRecord | Safe]:
        """Change the model in place, yielding a record at step 0 and at every measured one, and a
        safe point after every step; or what follows the safe point whose state was kept.
        """

    @abstractmethod
    def pass_over(self, steps: int) -> None:
        """Draw from the arm's random streams what so many steps draw."""

    @abstractmethod
    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """Do step ``step`` (from 1) of ``total``; a watched one is also diagnosed."""

    @abstractmethod
    def diagnostics(self) -> dict[str, float]:
        """Numbers of the arm's own at the current weights, asked for at every record."""

    @abstractmethod
    def baselines_now(self) -> dict[str, float]:
        """Numbers at the current weights that ``diagnostics`` are compared with: asked for at the
        first and the last record, and at every ``baseline_interval``-th.
        """

    @abstractmethod
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


@dataclass(frozen=True)
class Preparation:
    """An arm ready to run, and what was found while it was made.

    Attributes:
        arm: What is run.
        curvature_metrics: Curvature at the healthy weights.
        solver_statuses: How the iterations behind these numbers ended.
    """

    arm: Arm
    curvature_metrics: Mapping[str, float] = field(default_factory=dict)
    solver_statuses: Mapping[str, str] = field(default_factory=dict)

    @property
    def catalyst(self) -> Catalyst | None:
        """The search of the tokens that the arm trains on, if there was one."""
        return self.arm.catalyst
