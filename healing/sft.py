"""Healing: supervised fine-tuning on clean text, as a generator of records."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from healing.config import HealConfig
from healing.corpora import batches
from healing.models import LoadedModel, training_mode
from healing.probe import Measurement, Probe

LOCKOUT_STEPS = 10
"""Consecutive steps without a finite loss and gradient after which healing ends."""


@dataclass(frozen=True)
class HealRecord:
    """One point of the healing trajectory.

    Attributes:
        step: Optimiser steps done.
        tokens: Training tokens seen.
        measurement: On the probe.
        train_loss: Mean over the finite steps since the last record, nats per token.
        grad_norm: Before clipping, mean over the same steps.
        tokens_per_second: Of training alone since the last record.
        nonfinite_steps: Steps so far whose loss or gradient was not finite; they change nothing.
    """

    step: int
    tokens: int
    measurement: Measurement
    train_loss: float = math.nan
    grad_norm: float = math.nan
    tokens_per_second: float = math.nan
    nonfinite_steps: int = 0

    def metrics(self) -> dict[str, float]:
        """All numbers under the names of the MLflow contract."""
        return {
            **self.measurement.metrics(),
            "train_loss": self.train_loss,
            "grad_norm": self.grad_norm,
            "tokens": float(self.tokens),
            "tokens_per_second": self.tokens_per_second,
            "nonfinite_steps": float(self.nonfinite_steps),
        }


def make_optimizer(model: torch.nn.Module, config: HealConfig) -> torch.optim.Optimizer:
    """AdamW or plain SGD at a constant rate, without weight decay or momentum.

    Decay would move the weights where the clean text gives no gradient, which is not healing.
    """
    rate = float(config.healing_lr)
    if config.healing_optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), lr=rate)
    return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)


def sft_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: torch.Tensor,
    gradient_clip: float,
) -> tuple[float, float]:
    """One step on one batch (windows, tokens); not taken where loss or gradient is not finite.

    Returns:
        Loss before the step (nats per token) and gradient norm before clipping.
    """
    with training_mode(model):
        # The model shifts the labels itself; shifting them here too would train on token t+2.
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_clip or math.inf)
    value, norm_value = float(loss.detach()), float(norm)
    if math.isfinite(value) and math.isfinite(norm_value):
        optimizer.step()
    return value, norm_value


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def heal(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    probe: Probe,
    collapsed: Measurement,
    generator: torch.Generator,
) -> Iterator[HealRecord]:
    """Fine-tune a model in place, yielding a record at step 0, every interval and the last step.

    Args:
        loaded: The collapsed model.
        config: Resolved configuration.
        windows: Training windows (windows, tokens) of the ``train`` split.
        probe: Clean probe.
        collapsed: Measurement of the model as it comes.
        generator: Draws the data order.

    Ends early after :data:`LOCKOUT_STEPS` consecutive steps that are not finite.
    """
    model, total = loaded.model, config.healing_steps
    optimizer = make_optimizer(model, config)
    stream = batches(windows, int(config.batch_size), generator)
    yield HealRecord(0, 0, collapsed)
    losses: list[float] = []
    norms: list[float] = []
    seconds, since, bad, bad_in_a_row = 0.0, 0, 0, 0
    tokens_per_step = int(config.batch_size) * config.sequence_length
    for step in range(1, total + 1):
        begin = time.perf_counter()
        loss, norm = sft_step(
            model, optimizer, next(stream).to(loaded.device), config.gradient_clip
        )
        seconds += time.perf_counter() - begin
        since += 1
        if math.isfinite(loss) and math.isfinite(norm):
            bad_in_a_row = 0
            losses.append(loss)
            norms.append(norm)
        else:
            bad, bad_in_a_row = bad + 1, bad_in_a_row + 1
        locked = bad_in_a_row == LOCKOUT_STEPS
        if step % config.measurement_interval == 0 or step == total or locked:
            speed = since * tokens_per_step / seconds
            yield HealRecord(
                step,
                step * tokens_per_step,
                probe.measure(model),
                _mean(losses),
                _mean(norms),
                speed,
                bad,
            )
            losses, norms, seconds, since = [], [], 0.0, 0
        if locked:
            return
