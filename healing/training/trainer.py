"""Fine-tuning steps of one model, with count of those that cannot be taken."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import torch

from healing.config.heal import HealConfig
from healing.measurements.diagnosis import FORWARD, GRADIENT, UPDATE, WEIGHTS, Failure
from healing.models.blocks import training_mode
from healing.models.sharing import ALONE, Share
from healing.models.token_loss import training_loss
from healing.training.nonfinite import diagnose, first_nonfinite_parameter, forward_failure
from healing.training.optimizers import make_optimizer
from healing.training.precision import Precision, gradient_norm
from healing.training.rate_schedule import rate_factor

MAX_CONSECUTIVE_NONFINITE_STEPS = 10
"""Consecutive steps without a finite loss and gradient after which healing ends."""

_COUNTS = (
    "steps", "taken", "nonfinite", "scaler_skipped", "failure",
    "_sound_at_first", "_first_skipped", "_streak", "_in_a_row", "_broken",
)  # fmt: skip
"""What a trainer knows of the steps that it tried."""


class Trainer:
    """Takes the fine-tuning steps of one model and keeps count of those that it cannot take.

    Args:
        model: In the weights of the configuration's precision (:meth:`Precision.weights`).
        config: Resolved configuration.
        optimizer: Over the model's parameters; ``None`` = the configuration's.
        share: Of every batch, that this process passes through the model; its gradients are then
            the means over all ranks.

    Attributes:
        steps: Tried.
        taken: With an update.
        nonfinite: Without one, since loss or gradient was not finite.
        scaler_skipped: Without one, to lower the gradient scaler's scale. From a scale of 1 down it
            is the gradient itself that the format cannot hold: such a step counts as not finite.
        failure: The step whose failure ended the run (the first of its last streak, or the one
            whose update broke the weights); as long as it goes on, the first that was not taken.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        config: HealConfig,
        optimizer: torch.optim.Optimizer | None = None,
        share: Share = ALONE,
    ) -> None:
        self.model, self.clip, self.share = model, config.gradient_clip, share
        self.precision = Precision(config.precision, config.precision_mode)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or make_optimizer(
            config.healing_optimizer, trained, float(config.healing_lr), config.healing_momentum
        )
        self._rates = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._schedule = functools.partial(
            rate_factor,
            total=int(config.healing_steps),
            warmup=config.healing_warmup,
            decay=config.healing_decay,
        )
        self.optimizer.zero_grad()
        self.scaler = self.precision.scaler(next(model.parameters()).device)
        self.steps = self.taken = self.nonfinite = self.scaler_skipped = 0
        self.failure: Failure | None = None
        self._sound_at_first = not first_nonfinite_parameter(model, share)
        self._first_skipped: Failure | None = None
        self._streak: Failure | None = None
        self._in_a_row, self._broken = 0, False

    @property
    def must_stop(self) -> bool:
        """No further step makes sense."""
        return self._broken or self._in_a_row == MAX_CONSECUTIVE_NONFINITE_STEPS

    @property
    def stalled(self) -> bool:
        """Training cannot go on, or never began."""
        return self.must_stop or (self.steps > 0 and not self.taken)

    @property
    def first_failure(self) -> Failure | None:
        """As ``failure``; where the scaler skipped every step, the first of those."""
        return self.failure or (None if self.taken else self._first_skipped)

    def step(self, batch: torch.Tensor) -> tuple[float, float]:
        """One step on one batch (windows, tokens); not taken where loss or gradient is not finite.

        Returns:
            Loss before the step (nats per token) and gradient norm before clipping.
        """
        self.steps += 1
        self._set_rate()
        scale = self.scaler.get_scale()
        with training_mode(self.model):
            with self.precision.forward(batch.device):
                # The labels are shifted there; shifting them here too would train on t+2.
                loss = training_loss(self.model, batch[self.share.rows(len(batch))])
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        norm_before = gradient_norm(self.model, self.clip).float()
        # The shares are of one size, so that the mean of their means is the batch's.
        mean = self.share.total(loss.detach().float()) / self.share.ranks
        both = torch.stack([mean, norm_before])
        value, norm = both.tolist()  # one wait for the device
        if math.isfinite(value) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self._after_update()
        else:
            self._count(batch, value, scale)
        self.scaler.update()
        self.optimizer.zero_grad()  # measuring and the next forward pass have their room
        return value, norm

    def _set_rate(self) -> None:
        """The rate of this step. Torch's schedulers count the updates taken, and complain where the
        first was not; here the budget goes on.
        """
        factor = self._schedule(self.steps)
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = factor * rate

    def _after_update(self) -> None:
        self.taken, self._in_a_row = self.taken + 1, 0
        self._streak = None
        broken = first_nonfinite_parameter(self.model, self.share)
        if broken:
            self._broken = True
            origin = UPDATE if self._sound_at_first else WEIGHTS
            self.failure = self._streak = Failure(self.steps, origin, broken)

    def _count(self, batch: torch.Tensor, loss: float, scale: float) -> None:
        """Count a step that was not taken, and look into the first one of its kind."""
        skipped = self.scaler.is_enabled() and math.isfinite(loss) and scale > 1.0
        if skipped:
            self.scaler_skipped += 1
            self._first_skipped = self._first_skipped or self._explain(batch, loss, scale)
            return
        self.nonfinite, self._in_a_row = self.nonfinite + 1, self._in_a_row + 1
        if self._streak is None:
            self._streak = self._explain(batch, loss, scale)
        # What ends a run is the failure that its last streak began with, not one it got over.
        self.failure = self._streak if self.must_stop else self.failure or self._streak

    def _explain(self, batch: torch.Tensor, loss: float, scale: float) -> Failure:
        found = diagnose(self.model, batch, self.steps, self.precision, scale)
        # Kernels that sum in another order each time may not fail twice.
        origin = GRADIENT if math.isfinite(loss) else FORWARD
        return found or Failure(self.steps, origin, "not found again")

    def forward_failure(self, windows: torch.Tensor) -> str:
        """First module whose output is not finite on some windows; empty where there is none."""
        return forward_failure(self.model, windows)

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on, weights included, in the format that they are trained in:
        the tensors themselves, not copies.
        """
        return self.state_of(self.model.state_dict(), self.optimizer.state_dict())

    def state_of(self, weights: Mapping[str, Any], optimizer: Mapping[str, Any]) -> dict[str, Any]:
        """The same, with weights and optimiser as they are said to be."""
        return {
            "weights": weights,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "counts": {name: getattr(self, name) for name in _COUNTS},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a trainer with the same configuration."""
        self.model.load_state_dict(state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.load_counts(state)

    def load_counts(self, state: Mapping[str, Any]) -> None:
        """Of a state all but weights and optimiser."""
        self.scaler.load_state_dict(state["scaler"])
        for name, value in state["counts"].items():
            setattr(self, name, value)
