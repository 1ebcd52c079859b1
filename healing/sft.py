"""Healing: supervised fine-tuning on clean text, as a generator of records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from healing.config import HealConfig
from healing.corpora import batches
from healing.heads import training_loss
from healing.lockout import FORWARD, GRADIENT, UPDATE, WEIGHTS, Control, Failure
from healing.lora import adapted
from healing.models import LoadedModel, training_mode
from healing.optimizers import make_optimizer
from healing.precision import (
    Precision,
    diagnose,
    first_nonfinite_parameter,
    forward_failure,
    gradient_norm,
)
from healing.probe import Measurement, Probe
from healing.randomness import named_generator

LOCKOUT_STEPS = 10
"""Consecutive steps without a finite loss and gradient after which healing ends."""


@dataclass(frozen=True)
class HealRecord:
    """One point of the healing trajectory.

    Attributes:
        step: Optimiser steps done.
        tokens: Training tokens seen.
        measurement: On the probe, in float32.
        train_loss: Mean over the finite steps since the last record, nats per token.
        grad_norm: Before clipping, mean over the same steps.
        tokens_per_second: Of training alone since the last record.
        nonfinite_steps: Steps so far whose loss or gradient was not finite; they change nothing.
        scaler_skipped_steps: Steps so far that the gradient scaler skipped to lower its scale; not
            among the former.
        headroom: Per block, max|h| over the largest finite number of the run's format: from 1 on
            the format cannot hold the block's output; what is inside it may overflow before.
        failure: First step that could not be taken, or whose update broke the weights.
        stalled: Training cannot go on: the weights are not finite, :data:`LOCKOUT_STEPS` steps in a
            row could not be taken, none could so far, or the final model is not finite.
    """

    step: int
    tokens: int
    measurement: Measurement
    train_loss: float = math.nan
    grad_norm: float = math.nan
    tokens_per_second: float = math.nan
    nonfinite_steps: int = 0
    scaler_skipped_steps: int = 0
    headroom: tuple[float, ...] = ()
    failure: Failure | None = None
    stalled: bool = False

    def metrics(self) -> dict[str, float]:
        """All numbers under the names of the MLflow contract."""
        return {
            **self.measurement.metrics(),
            "train_loss": self.train_loss,
            "grad_norm": self.grad_norm,
            "tokens": float(self.tokens),
            "tokens_per_second": self.tokens_per_second,
            "nonfinite_steps": float(self.nonfinite_steps),
            "scaler_skipped_steps": float(self.scaler_skipped_steps),
            **{f"layers/headroom_{i:02d}": share for i, share in enumerate(self.headroom)},
        }


class Trainer:
    """Takes the fine-tuning steps of one model and keeps count of those that it cannot take.

    Args:
        model: In the weights of the configuration's precision (:meth:`Precision.weights`).
        config: Resolved configuration.
        optimizer: Over the model's parameters; ``None`` = the configuration's.

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
    ) -> None:
        self.model, self.clip = model, config.gradient_clip
        self.precision = Precision(config.precision, config.precision_mode)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer or make_optimizer(
            config.healing_optimizer, trained, float(config.healing_lr)
        )
        self.optimizer.zero_grad()
        self.scaler = self.precision.scaler(next(model.parameters()).device)
        self.steps = self.taken = self.nonfinite = self.scaler_skipped = 0
        self.failure: Failure | None = None
        self._sound_at_first = not first_nonfinite_parameter(model)
        self._first_skipped: Failure | None = None
        self._streak: Failure | None = None
        self._in_a_row, self._broken = 0, False

    @property
    def must_stop(self) -> bool:
        """No further step makes sense."""
        return self._broken or self._in_a_row == LOCKOUT_STEPS

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
        scale = self.scaler.get_scale()
        with training_mode(self.model):
            with self.precision.forward(batch.device):
                # The labels are shifted there; shifting them here too would train on t+2.
                loss = training_loss(self.model, batch)
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        both = torch.stack([loss.detach().float(), gradient_norm(self.model, self.clip).float()])
        value, norm = both.tolist()  # one wait for the device
        if math.isfinite(value) and math.isfinite(norm):
            self.scaler.step(self.optimizer)
            self._after_update()
        else:
            self._count(batch, value, scale)
        self.scaler.update()
        self.optimizer.zero_grad()  # measuring and the next forward pass have their room
        return value, norm

    def _after_update(self) -> None:
        self.taken, self._in_a_row = self.taken + 1, 0
        self._streak = None
        broken = first_nonfinite_parameter(self.model)
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def adapter_draws(data_order: torch.Generator) -> torch.Generator:
    """Stream of the adapters' start: another one for every data order, which it leaves as it is."""
    return named_generator(data_order.initial_seed(), "adapters")


def heal(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    probe: Probe,
    collapsed: Measurement,
    generator: torch.Generator,
) -> Iterator[HealRecord]:
    """Fine-tune a model in place, yielding a record at step 0, every interval and the last step.

    The model is measured in float32 whatever it trains in, and with its adapters where it has
    them; it is in float32 and its plain architecture again when the iterator is exhausted.

    Args:
        loaded: The collapsed model, in float32.
        config: Resolved configuration.
        windows: Training windows (windows, tokens) of the ``train`` split.
        probe: Clean probe.
        collapsed: Measurement of the model as it comes.
        generator: Draws the data order.

    Ends early after :data:`LOCKOUT_STEPS` consecutive steps that are not finite, and at once where
    an update leaves weights that are not.
    """
    model, total = loaded.model, config.healing_steps
    precision = Precision(config.precision, config.precision_mode)
    stream = batches(windows, int(config.batch_size), generator)
    yield HealRecord(0, 0, collapsed, headroom=precision.headroom(collapsed.peaks))
    with adapted(model, config, adapter_draws(generator)), precision.weights(model):
        trainer = Trainer(model, config)
        losses: list[float] = []
        norms: list[float] = []
        seconds, since = 0.0, 0
        tokens_per_step = int(config.batch_size) * config.sequence_length
        for step in range(1, total + 1):
            begin = time.perf_counter()
            loss, norm = trainer.step(next(stream).to(loaded.device))
            seconds += time.perf_counter() - begin
            since += 1
            if math.isfinite(loss) and math.isfinite(norm):
                losses.append(loss)
                norms.append(norm)
            last = step == total or trainer.must_stop
            if step % config.measurement_interval == 0 or last:
                with precision.measuring(model):
                    measurement = probe.measure(model)
                    failure = trainer.first_failure
                    unsound = last and measurement.nonfinite_tokens > 0
                    if unsound and not failure:
                        module = forward_failure(model, probe.windows) or "probe"
                        failure = Failure(step + 1, FORWARD, module)
                yield HealRecord(
                    step,
                    step * tokens_per_step,
                    measurement,
                    _mean(losses),
                    _mean(norms),
                    since * tokens_per_step / seconds,
                    trainer.nonfinite,
                    trainer.scaler_skipped,
                    precision.headroom(measurement.peaks),
                    failure,
                    trainer.stalled or unsound,
                )
                losses, norms, seconds, since = [], [], 0.0, 0
            if last:
                return


def control_run(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    generator: torch.Generator,
    steps: int,
) -> Control:
    """The first steps of :func:`heal` on another model, changed in place, up to its first failure.

    Args:
        loaded: The healthy model, in float32.
        config: Of the run that failed.
        windows: Of the run that failed.
        generator: In the state in which the failed run's began.
        steps: Steps to try.
    """
    model = loaded.model
    stream = batches(windows, int(config.batch_size), generator)
    precision = Precision(config.precision, config.precision_mode)
    with adapted(model, config, adapter_draws(generator)), precision.weights(model):
        trainer = Trainer(model, config)
        for _ in range(steps):
            trainer.step(next(stream).to(loaded.device))
            if trainer.failure:
                break
        return Control(steps, trainer.first_failure)
