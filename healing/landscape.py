"""The loss around and between states of a model: gradient, straight paths, distances, escape.

A state is a flat vector `(n,)` of all parameters in the order of `model.parameters()`. Everything
here is defined for non-finite states too: numbers become NaN, and nothing is decomposed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Columns of the gradients that are widened to float64 at once.
_COLUMNS_PER_BLOCK = 2**20


def weights_of(model: nn.Module) -> Tensor:
    """A copy of all parameters as one flat vector, shape `(n,)`."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()])


@torch.no_grad()
def put_weights(model: nn.Module, vector: Tensor) -> None:
    """Copy a flat vector `(n,)` into the parameters, in place, in their dtype.

    Raises:
        ValueError: If `vector` has not as many entries as the model has parameters.
    """
    sizes = [parameter.numel() for parameter in model.parameters()]
    if vector.shape != (sum(sizes),):
        raise ValueError(f"expected shape ({sum(sizes)},), got {tuple(vector.shape)}")
    for parameter, part in zip(model.parameters(), vector.split(sizes), strict=True):
        parameter.copy_(part.view_as(parameter))


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[Tensor]:
    """Yield the current weights, `(n,)`, and put them back, bit by bit, at exit."""
    saved = weights_of(model)
    try:
        yield saved
    finally:
        put_weights(model, saved)


@dataclass(frozen=True)
class GradientStatistics:
    """The gradient of a loss, as far as b independent batches tell it.

    With G the gradient of the expected loss and g₁ … g_b those of the batches:

    Attributes:
        norm: ‖ḡ‖, of the mean over batches; biased upwards by the noise.
        squared_norm: Unbiased estimate of ‖G‖²: mean of gᵢ·gⱼ over i ≠ j. Can be negative.
        standard_error: Of `squared_norm`, by the jackknife over batches. Where G = 0 it is too
            large (the statistic is degenerate there), which errs towards "not significant".
        noise: Squared standard error of ḡ: Σ‖gᵢ - ḡ‖²/(b(b - 1)) = ‖ḡ‖² - `squared_norm`.
        batches: b.
    """

    norm: float
    squared_norm: float
    standard_error: float
    noise: float
    batches: int

    @property
    def snr(self) -> float:
        """Signal to noise of ḡ: `squared_norm / noise`; NaN where both are 0."""
        if self.noise == 0:
            return math.nan if self.squared_norm == 0 else math.inf
        return self.squared_norm / self.noise

    @property
    def finite(self) -> bool:
        """Whether every batch had a finite gradient."""
        return math.isfinite(self.squared_norm)


def gradient_statistics(gradients: Sequence[Tensor]) -> GradientStatistics:
    """Norm of the mean gradient and what of it is signal, from b gradients of shape `(n,)`.

    All of it follows from the inner products gᵢ·gⱼ, which are summed in float64.

    Raises:
        ValueError: With fewer than three batches, which the jackknife needs.

    Source:
        Hoeffding 1948 (U-statistics); Efron & Stein 1981, Ann. Stat. 9(3) (jackknife variance).
    """
    count = len(gradients)
    if count < 3:
        raise ValueError(f"need at least three batches, got {count}")
    gram = torch.zeros(count, count, dtype=torch.float64)
    for parts in zip(*(g.split(_COLUMNS_PER_BLOCK) for g in gradients), strict=True):
        block = torch.stack(parts).double()
        gram += (block @ block.T).cpu()
    total, trace, rows, own = gram.sum(), gram.trace(), gram.sum(1), gram.diagonal()
    pairs = total - trace
    squared = pairs / (count * (count - 1))
    # Without batch i: its row and its column leave the sum over pairs.
    without = (pairs - 2 * (rows - own)) / ((count - 1) * (count - 2))
    variance = (count - 1) / count * ((without - without.mean()) ** 2).sum()
    noise = ((trace - total / count) / (count * (count - 1))).clamp(min=0)
    norm = (total.clamp(min=0).sqrt() / count).item()
    return GradientStatistics(norm, squared.item(), variance.sqrt().item(), noise.item(), count)


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
    with weights_kept(model):
        for alpha in positions:
            put_weights(model, _between(start, end, alpha))
            losses.append(loss())
    return LossPath(positions, tuple(losses))


def _between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
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
    with weights_kept(model) as centre:
        level, heldout = loss(), heldout_loss()
        if not (math.isfinite(step_size) and step_size > 0):
            reason = "no positive curvature to take the step size from"
            return Escape(level, heldout, math.nan, reason=reason)

        def descend(start: Tensor) -> Descent:
            put_weights(model, start)
            begin = loss()
            for _ in range(steps):
                put_weights(model, weights_of(model) - step_size * gradient())
            distances = [torch.linalg.vector_norm(w - centre).item()
                         for w in (start, weights_of(model))]  # fmt: skip
            return Descent(distances[0], distances[1], begin, loss(), heldout_loss())

        unperturbed = descend(centre)
        found = []
        for _ in range(perturbations):
            put_weights(model, centre)
            found.append(descend(centre + perturbation(model, radius, generator)))
    return Escape(level, heldout, step_size, unperturbed, tuple(found))
