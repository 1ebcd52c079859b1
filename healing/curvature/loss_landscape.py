"""The loss around and between states of a model: gradient, straight paths, distances, escape.

A state is a flat vector `(n,)` of all parameters in the order of `model.parameters()`. Everything
here is defined for non-finite states too: numbers become NaN, and nothing is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from healing.curvature.flat_weights import put_weights, restoring_weights
from healing.progress import counted


@dataclass(frozen=True)
class LossPath:
    """Loss along a straight path between two states.

    Attributes:
        positions: α from 0 (start) to 1 (end).
        losses: Nats per token; NaN where the model cannot compute.
    """

    positions: tuple[float, ...]
    losses: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether the loss is finite at every point."""
        return all(math.isfinite(loss) for loss in self.losses)

    @property
    def reason(self) -> str:
        """Why there is no barrier to speak of; empty where there is."""
        bad = [p for p, loss in zip(self.positions, self.losses, strict=True)
               if not math.isfinite(loss)]  # fmt: skip
        return f"the loss is not finite at {100 * bad[0]:.0f} % of the path" if bad else ""

    @property
    def excess(self) -> tuple[float, ...]:
        """L(α) - [(1 - α)·L(0) + α·L(1)] at every point."""
        first, last = self.losses[0], self.losses[-1]
        pairs = zip(self.positions, self.losses, strict=True)
        return tuple(loss - ((1 - a) * first + a * last) for a, loss in pairs)

    @property
    def barrier(self) -> float:
        """Largest excess in nats, at least 0 (its value at both ends); NaN if not finite."""
        return max(0.0, *self.excess[1:-1]) if self.finite else math.nan

    @property
    def barrier_position(self) -> float:
        """α of the barrier; NaN where there is none."""
        if not self.barrier > 0:
            return math.nan
        return self.positions[self.excess.index(self.barrier)]

    @property
    def climb(self) -> float:
        """Highest loss on the path above the loss at its start, in nats; NaN if not finite.

        What a walker along the path has to climb. A convex-up descent has a barrier by the
        definition above and nothing to climb.
        """
        return max(self.losses) - self.losses[0] if self.finite else math.nan


def loss_path(
    model: nn.Module, start: Tensor, end: Tensor, points: int, loss: Callable[[], float]
) -> LossPath:
    """Loss at evenly spaced points of the straight path between two states, ends included.

    Each point is (1 - α)·start + α·end, formed in float64 and rounded once; the ends are the
    states themselves. The model's weights are put back.

    Args:
        model: Its parameters are walked along the path.
        start: Flat weights, shape `(n,)`.
        end: Flat weights, shape `(n,)`.
        points: Number of points, at least 3.
        loss: Loss of the model at its current weights, nats per token.

    Raises:
        ValueError: With fewer than three points.

    Source:
        Frankle et al. 2020, arXiv 1912.05671 (linear mode connectivity; barrier as there, but
        above the interpolated loss, as in Entezari et al. 2022, arXiv 2110.06296).
    """
    if points < 3:
        raise ValueError(f"a path needs at least three points, got {points}")
    positions = tuple(index / (points - 1) for index in range(points))
    losses = []
    with restoring_weights(model):
        for alpha in counted(positions, points):
            put_weights(model, _interpolate(start, end, alpha))
            losses.append(loss())
    return LossPath(positions, tuple(losses))


def _interpolate(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    if alpha in (0.0, 1.0):  # 0·∞ would be NaN
        return start if alpha == 0.0 else end
    return ((1 - alpha) * start.double() + alpha * end.double()).to(start.dtype)


@dataclass(frozen=True)
class Displacement:
    """How far the states lie apart, with a = W_collapsed - W_healthy, h = W_healed - W_collapsed.

    Attributes:
        healthy_norm: ‖W_healthy‖.
        attack_norm: ‖a‖.
        healing_norm: ‖h‖.
        remaining_norm: ‖W_healed - W_healthy‖ = ‖a + h‖.
        return_cosine: cos(h, -a): 1 = straight back, 0 = sideways; NaN where a step is zero.
        reason: Why the cosine is NaN; empty where it is not.
    """

    healthy_norm: float
    attack_norm: float
    healing_norm: float
    remaining_norm: float
    return_cosine: float
    reason: str = ""

    @property
    def return_share(self) -> float:
        """Share of the attack step that healing took back: -h·a/‖a‖²; NaN with the cosine."""
        if self.attack_norm == 0:
            return math.nan
        return self.return_cosine * self.healing_norm / self.attack_norm


def displacement(healthy: Tensor, collapsed: Tensor, healed: Tensor) -> Displacement:
    """Norms and angle of the attack step and the healing step, from flat weights, in float64."""
    first, second, third = healthy.double(), collapsed.double(), healed.double()
    attack, healing = second - first, third - second
    whole, attacked, healed_by, left = (
        torch.linalg.vector_norm(v).item() for v in (first, attack, healing, third - first)
    )
    reason = ""
    if not all(map(math.isfinite, (whole, attacked, healed_by, left))):
        reason = "the weights of a state are not finite"
    elif attacked == 0:
        reason = "the collapsed state is the healthy one"
    elif healed_by == 0:
        reason = "the healed state is the collapsed one"
    cosine = math.nan
    if not reason:
        cosine = -torch.dot(attack, healing).item() / (attacked * healed_by)
        cosine = max(-1.0, min(1.0, cosine))
    return Displacement(whole, attacked, healed_by, left, cosine, reason)
