"""Descent from perturbed weights: does it leave the state?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from healing.curvature.flat_weights import put_weights, restoring_weights, weights_of
from healing.progress import counted, tick


@dataclass(frozen=True)
class Descent:
    """Gradient descent from a point near a state.

    Attributes:
        initial_distance: To the state, before the first step.
        final_distance: To the state, after the last.
        initial_loss: On the batch that is descended, nats per token.
        final_loss: The same after the last step.
        final_heldout_loss: On other text, after the last step.
    """

    initial_distance: float
    final_distance: float
    initial_loss: float
    final_loss: float
    final_heldout_loss: float

    @property
    def finite(self) -> bool:
        """Whether the model could compute all the way."""
        return math.isfinite(self.initial_loss) and math.isfinite(self.final_loss)

    def escaped_from(self, loss: float) -> bool:
        """Whether it left a state of this loss: twice as far away as it began, and lower than
        the state by more than the perturbation itself changed the loss.
        """
        further = self.final_distance > 2 * self.initial_distance
        return further and loss - self.final_loss > abs(self.initial_loss - loss)


@dataclass(frozen=True)
class Escape:
    """What follows small random perturbations of a state, downhill.

    Attributes:
        loss: Of the state itself on the batch that is descended, nats per token.
        heldout_loss: Of the state itself on other text.
        step_size: Of gradient descent.
        unperturbed: Descent from the state itself: what the gradient alone does.
        perturbed: One descent per perturbation.
        reason: Why nothing was tried; empty otherwise.
    """

    loss: float
    heldout_loss: float
    step_size: float
    unperturbed: Descent | None = None
    perturbed: tuple[Descent, ...] = ()
    reason: str = ""

    @property
    def escaped(self) -> int:
        """Number of perturbations that led away."""
        return sum(descent.escaped_from(self.loss) for descent in self.perturbed)

    @property
    def loss_drop(self) -> float:
        """Mean of L(state) - L(end) over perturbations, nats; NaN where nothing was tried."""
        return _mean([self.loss - descent.final_loss for descent in self.perturbed])

    @property
    def heldout_loss_drop(self) -> float:
        """The same on other text: what of the drop is more than fitting one batch."""
        return _mean([self.heldout_loss - d.final_heldout_loss for d in self.perturbed])

    @property
    def distance_ratio(self) -> float:
        """Mean of final over initial distance to the state; NaN where nothing was tried."""
        return _mean([d.final_distance / d.initial_distance for d in self.perturbed])

    @property
    def finite(self) -> bool:
        """Whether every descent could be followed to its end."""
        return bool(self.perturbed) and all(d.finite for d in self.perturbed)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def perturbation(model: nn.Module, radius: float, generator: torch.Generator) -> Tensor:
    """A Gaussian direction in which every tensor moves by `radius` times its own norm, `(n,)`.

    Its norm is then `radius·‖W‖`; tensors that are zero stay so.
    """
    parts = []
    for parameter in model.parameters():
        draw = torch.randn(parameter.shape, generator=generator).to(parameter)
        scale = torch.linalg.vector_norm(parameter.detach()) / torch.linalg.vector_norm(draw)
        parts.append((radius * scale * draw).reshape(-1))
    return torch.cat(parts)


def escape(
    model: nn.Module,
    loss: Callable[[], float],
    heldout_loss: Callable[[], float],
    gradient: Callable[[], Tensor],
    generator: torch.Generator,
    *,
    step_size: float,
    steps: int,
    radius: float,
    perturbations: int,
) -> Escape:
    """Perturb the current state and follow plain gradient descent; the weights are put back.

    With step size 1/λ_max descent is stable in every direction of positive curvature, and a
    component along a direction of curvature -μ grows by 1 + μ/λ_max per step.

    Args:
        model: At the state in question.
        loss: Loss at the current weights, nats per token.
        heldout_loss: Loss there on other text.
        gradient: Gradient of `loss` there, shape `(n,)`.
        generator: Draws the perturbations.
        step_size: 1/λ_max of that state.
        steps: Gradient-descent steps.
        radius: Norm of a perturbation relative to the weights'.
        perturbations: How many.
    """
    with restoring_weights(model) as centre:
        level, heldout = loss(), heldout_loss()
        if not (math.isfinite(step_size) and step_size > 0):
            reason = "no positive curvature to take the step size from"
            return Escape(level, heldout, math.nan, reason=reason)

        def descend(start: Tensor) -> Descent:
            put_weights(model, start)
            begin = loss()
            for _ in range(steps):
                tick()
                put_weights(model, weights_of(model) - step_size * gradient())
            distances = [torch.linalg.vector_norm(w - centre).item()
                         for w in (start, weights_of(model))]  # fmt: skip
            return Descent(distances[0], distances[1], begin, loss(), heldout_loss())

        unperturbed = descend(centre)
        found = []
        for _ in counted(range(perturbations), perturbations):
            put_weights(model, centre)
            found.append(descend(centre + perturbation(model, radius, generator)))
    return Escape(level, heldout, step_size, unperturbed, tuple(found))
