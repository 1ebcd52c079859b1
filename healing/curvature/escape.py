"""Descent from a state and from points beside it: does it find a lower held-out loss?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from healing.curvature.flat_weights import put_weights, restoring_weights, weights_of
from healing.progress import counted, tick

STANDARD_ERRORS = 3.0
"""What exceeds so many of its standard errors is not chance."""

SMALL_GAIN = 0.01
"""Nats per token: the smallest fall of the loss that counts."""

FLOOR_SHARE = 0.1
"""A perturbation treats a tensor as having at least this share of the root mean square of all
tensors with as many axes: tensors that are zero (biases, adapters) move too."""


@dataclass(frozen=True)
class Descent:
    """Gradient descent from a state or from a point near it.

    Attributes:
        initial_distance: To the state, before the first step.
        final_distance: To the state, after the last.
        loss_drop: L(state) - L(end) on the batch of the curvature, nats per token.
        heldout_drop: The same on held-out text.
        heldout_error: Standard error of `heldout_drop` over windows, each compared with itself;
            NaN with fewer than two windows.
    """

    initial_distance: float
    final_distance: float
    loss_drop: float
    heldout_drop: float
    heldout_error: float

    @property
    def finite(self) -> bool:
        """Whether the model could compute at the end."""
        return math.isfinite(self.loss_drop) and math.isfinite(self.heldout_drop)

    @property
    def least_gain(self) -> float:
        """Held-out drop less three standard errors; NaN where there is no error."""
        return self.heldout_drop - STANDARD_ERRORS * self.heldout_error

    @property
    def most_gain(self) -> float:
        """Held-out drop and three standard errors; NaN where there is no error."""
        return self.heldout_drop + STANDARD_ERRORS * self.heldout_error

    @property
    def escaped(self) -> bool:
        """Whether it lowered the held-out loss by more than the smallest gain that counts."""
        return self.least_gain > SMALL_GAIN


@dataclass(frozen=True)
class Escape:
    """Where descent leads from a state.

    Attributes:
        loss: Of the state itself on the batch of the curvature, nats per token.
        heldout_loss: Of the state itself on held-out text.
        step_size: Of gradient descent.
        weight_norm: ‖W‖ of the state.
        unperturbed: Descent from the state itself: what the gradient alone does.
        perturbed: One descent per random perturbation.
        along: Both ways along the direction of lowest curvature, where that is negative.
        reason: Why nothing was tried; empty otherwise.
    """

    loss: float
    heldout_loss: float
    step_size: float
    weight_norm: float
    unperturbed: Descent | None = None
    perturbed: tuple[Descent, ...] = ()
    along: tuple[Descent, ...] = ()
    reason: str = ""

    @property
    def descents(self) -> tuple[Descent, ...]:
        """All that were tried, the unperturbed one first."""
        own = (self.unperturbed,) if self.unperturbed else ()
        return (*own, *self.perturbed, *self.along)

    @property
    def best(self) -> Descent | None:
        """The one with the largest bound of the held-out drop, of those that could be followed."""
        known = [d for d in self.descents if d.finite]
        return max(known, key=lambda d: d.least_gain, default=None)

    @property
    def escaped(self) -> int:
        """Number of random perturbations that led to a lower held-out loss."""
        return sum(descent.escaped for descent in self.perturbed)

    @property
    def loss_drop(self) -> float:
        """Mean over perturbations of the drop on the batch, nats; NaN where nothing was tried."""
        return _mean([descent.loss_drop for descent in self.perturbed])

    @property
    def heldout_loss_drop(self) -> float:
        """The same on held-out text."""
        return _mean([descent.heldout_drop for descent in self.perturbed])

    @property
    def distance_ratio(self) -> float:
        """Mean of final over initial distance to the state; NaN where nothing was tried."""
        return _mean([d.final_distance / d.initial_distance for d in self.perturbed])

    @property
    def finite(self) -> bool:
        """Whether every descent could be followed to its end."""
        return bool(self.descents) and all(d.finite for d in self.descents)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Direction:
    """A direction of negative curvature.

    Attributes:
        curvature: Its Rayleigh quotient, below 0.
        vector: Of unit length, `(n,)`.
    """

    curvature: float
    vector: Tensor


def perturbation(model: nn.Module, radius: float, generator: torch.Generator) -> Tensor:
    """A Gaussian direction in which every tensor moves by `radius` times its own norm, `(n,)`.

    A tensor whose root mean square is less than a tenth of that of all tensors with as many axes
    (of all tensors, where those are zero too; 1, where all are) moves as if it had that: one that
    is zero, as biases and adapters begin, would stay so, and what hides there would not be seen.
    """
    parameters = [parameter.detach() for parameter in model.parameters()]
    parts = []
    for parameter in parameters:
        draw = torch.randn(parameter.shape, generator=generator).to(parameter)
        alike = _root_mean_square([p for p in parameters if p.ndim == parameter.ndim])
        floor = FLOOR_SHARE * (alike or _root_mean_square(parameters) or 1.0)
        size = max(_root_mean_square([parameter]), floor) * math.sqrt(parameter.numel())
        parts.append((radius * size / torch.linalg.vector_norm(draw) * draw).reshape(-1))
    return torch.cat(parts)


def _root_mean_square(tensors: Sequence[Tensor]) -> float:
    total = sum(float(torch.linalg.vector_norm(t)) ** 2 for t in tensors)
    return math.sqrt(total / sum(t.numel() for t in tensors))


def escape(
    model: nn.Module,
    loss: Callable[[], float],
    heldout_losses: Callable[[], Tensor],
    gradient: Callable[[int], Tensor],
    generator: torch.Generator,
    *,
    step_size: float,
    steps: int,
    radius: float,
    perturbations: int,
    lowest: Direction | None = None,
) -> Escape:
    """Follow plain gradient descent from the current state, from random perturbations of it, and
    both ways along a direction of negative curvature; the weights are put back.

    With step size 1/λ_max descent is stable in every direction of positive curvature, and a
    component along a direction of curvature -μ grows by 1 + μ/λ_max per step: hardly, where
    μ ≪ λ_max. So the descents along `lowest` take steps of 1/μ in that direction, in which the
    component doubles, but at most by as much as it has come already (or began with), since beyond
    its neighbourhood the state's curvature says nothing.

    Args:
        model: At the state in question.
        loss: Loss at the current weights on the batch of the curvature, nats per token.
        heldout_losses: Losses there of the windows of other text, float64 `(windows,)`: what a
            descent is judged by, since fitting the text that it follows proves nothing.
        gradient: Gradient at the current weights for a step's number, shape `(n,)`: of the same
            text at every step, or better of fresh text each time.
        generator: Draws the perturbations.
        step_size: 1/λ_max of that state.
        steps: Gradient-descent steps.
        radius: Norm of a perturbation relative to the weights'.
        perturbations: How many random ones.
        lowest: Direction of negative curvature; ``None`` where there is none.
    """
    with restoring_weights(model) as centre:
        level, heldout = loss(), heldout_losses()
        size = torch.linalg.vector_norm(centre).item()
        if not (math.isfinite(step_size) and step_size > 0):
            reason = "no curvature to take the step size from"
            return Escape(level, float(heldout.mean()), math.nan, size, reason=reason)

        def descend(start: Tensor, along: Direction | None = None) -> Descent:
            put_weights(model, start)
            began = torch.linalg.vector_norm(start - centre).item()
            for step in range(steps):
                tick()
                slope, at = gradient(step), weights_of(model)
                move = step_size * slope
                if along is not None:
                    reach = max(abs(torch.dot(at - centre, along.vector).item()), began)
                    part = torch.dot(slope, along.vector).item()
                    own = max(-reach, min(reach, part / -along.curvature))
                    move += (own - step_size * part) * along.vector
                put_weights(model, at - move)
            drops = heldout - heldout_losses()
            error = drops.std().item() / math.sqrt(len(drops)) if len(drops) > 1 else math.nan
            final = torch.linalg.vector_norm(weights_of(model) - centre).item()
            return Descent(began, final, level - loss(), drops.mean().item(), error)

        unperturbed = descend(centre)
        found = []
        for _ in counted(range(perturbations), perturbations):
            put_weights(model, centre)
            found.append(descend(centre + perturbation(model, radius, generator)))
        sides: list[Descent] = []
        if lowest is not None:
            reach = radius * (size or math.sqrt(len(centre))) * lowest.vector
            sides += (descend(side, lowest) for side in (centre + reach, centre - reach))
    mean = float(heldout.mean())
    return Escape(level, mean, step_size, size, unperturbed, tuple(found), tuple(sides))
