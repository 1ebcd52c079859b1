"""Arms that descend an objective: what is fed differs, the step is the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import AlignmentBaselines, gradients_of
from healing.attacks.base import StepOutcome
from healing.attacks.catalyst_search import Catalyst
from healing.attacks.loop import LoopArm, gradient_step
from healing.attacks.weight_change import Differences, WeightChange, snapshot
from healing.curvature.subspaces import LowCurvatureSubspace
from healing.models.blocks import block_matrices


class ObjectiveArm(LoopArm):
    """Gradient descent on an objective that the arm defines.

    Args:
        model: The model under attack.
        objective: The next step's objective; may draw data.
        fixed_objective: The same on fixed data, for diagnostics: measuring must not draw from the
            attack's own stream.
        baselines: What the gradient's alignment is compared with; ``None`` = neither it nor κ is
            measured.
        change: Snapshot of the healthy weights.
        projection: N where the optimiser is given P_N of the gradient instead of the gradient;
            parameters outside the matrices then stay.
        catalyst: The search that the objective's tokens come from, if there was one.
        draw: Draws what one call of the objective draws; ``None`` = it draws nothing, or nobody
            knows, in which case an attack that was cut begins anew.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Callable[[], torch.Tensor],
        fixed_objective: Callable[[], torch.Tensor],
        baselines: AlignmentBaselines | None,
        change: WeightChange,
        *,
        projection: LowCurvatureSubspace | None = None,
        catalyst: Catalyst | None = None,
        draw: Callable[[], object] | None = None,
    ) -> None:
        self.model, self.objective, self.fixed_objective = model, objective, fixed_objective
        self.baselines, self.change, self.projection = baselines, change, projection
        self.catalyst, self._draw = catalyst, draw
        # An objective that is its own fixed one draws nothing.
        self.resumable = draw is not None or objective is fixed_objective

    def pass_over(self, steps: int) -> None:
        """Draw what the objective drew."""
        for _ in range(steps):
            if self._draw is not None:
                self._draw()

    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """One optimiser step on the objective; a watched one says how it treats N (κ)."""
        matrices = block_matrices(self.model)
        baselines = self.baselines if watched else None
        before = snapshot(matrices) if baselines else {}
        outcome = gradient_step(optimizer, self.objective(), self._project_gradients)
        if baselines and outcome.finite:
            gradients = {n: p.grad for n, p in matrices.items() if p.grad is not None}
            update = Differences(matrices, before)
            numbers = baselines.subspace.amplification(gradients, update)
            if self.projection:
                del numbers["kappa"]  # there is no gradient outside N to compare with
            outcome = replace(outcome, diagnostics=numbers)
        optimizer.zero_grad()  # measuring and the next forward pass have their room
        return outcome

    def give_gradients(self) -> None:
        """Gradients of the objective on its fixed data, as the optimiser is given them."""
        self.fixed_objective().backward()  # type: ignore[no-untyped-call]
        self._project_gradients()

    def _project_gradients(self) -> None:
        subspace = self.projection
        if subspace is None:
            return
        named = dict(self.model.named_parameters())
        gradients = {n: named[n].grad for n in subspace.names}
        inside = subspace.project({n: g for n, g in gradients.items() if g is not None})
        for name, parameter in named.items():
            parameter.grad = inside.get(name)

    def diagnostics(self) -> dict[str, float]:
        """ρ of the objective's gradient and of the weight change."""
        if self.baselines is None:
            return {}
        own = self.baselines.subspace.alignment(gradients_of(self.model, self.fixed_objective()))
        return {
            "alignment": float(own),
            **self.baselines.of_change(self.change.delta(self.model)),
        }

    def baselines_now(self) -> dict[str, float]:
        """ρ of other gradients."""
        return {} if self.baselines is None else self.baselines.metrics(self.model)
