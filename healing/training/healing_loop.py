"""Healing: supervised fine-tuning on clean text, as a generator of records."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from healing.config.heal import HealConfig
from healing.data.windows import batches
from healing.measurements.diagnosis import FORWARD, Failure, HealthyReplay
from healing.measurements.probe import Measurement, Probe
from healing.models.loading import LoadedModel
from healing.progress import Safe, during, phase, without_safe_points
from healing.randomness import named_generator
from healing.registry import METHODS
from healing.training.norm_reset import reset_norms
from healing.training.precision import Precision
from healing.training.trainer import Trainer


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
        stalled: Training cannot go on: the weights are not finite,
            :data:`MAX_CONSECUTIVE_NONFINITE_STEPS` steps in a row could not be taken, none could so
            far, or the final model is not finite.
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


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def adapter_draws(data_order: torch.Generator) -> torch.Generator:
    """Stream of the adapters' start: another one for every data order, which it leaves as it is."""
    return named_generator(data_order.initial_seed(), "adapters")


def adapted(
    model: PreTrainedModel, config: HealConfig, data_order: torch.Generator
) -> AbstractContextManager[None]:
    """The model prepared by the configured healing method; its plain architecture afterwards.

    Args:
        model: A causal language model, changed in place.
        config: Says the method and its options.
        data_order: Of the run; see :func:`adapter_draws`.

    Raises:
        ConfigError: The method, or a library that it needs, is not there.
    """
    method = METHODS.load(config.healing_method)
    found: AbstractContextManager[None] = method.adapted(model, config, adapter_draws(data_order))
    return found


def heal(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    probe: Probe,
    collapsed: Measurement,
    generator: torch.Generator,
) -> Iterator[HealRecord]:
    """As :func:`heal_events`, for those who want the records alone."""
    return without_safe_points(heal_events(loaded, config, windows, probe, collapsed, generator))


def heal_events(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    probe: Probe,
    collapsed: Measurement,
    generator: torch.Generator,
    kept: Mapping[str, Any] | None = None,
    trainer_of: Callable[[PreTrainedModel, HealConfig], Trainer] = Trainer,
) -> Iterator[HealRecord | Safe]:
    """Fine-tune a model in place, yielding a record at step 0, every interval and the last step,
    and a safe point after every step, from whose state the same steps and records follow.

    The model is measured in float32 whatever it trains in, and with its adapters where it has
    them; it is in float32 and its plain architecture again when the iterator is exhausted.

    Args:
        loaded: The collapsed model, in float32.
        config: Resolved configuration.
        windows: Training windows (windows, tokens) of the ``train`` split.
        probe: Clean probe.
        collapsed: Measurement of the model as it comes.
        generator: Draws the data order.
        kept: State of a safe point to go on from; what came before it is not yielded again.
        trainer_of: Makes what takes the steps.

    Ends early after :data:`MAX_CONSECUTIVE_NONFINITE_STEPS` consecutive steps that are not finite,
    and at once where an update leaves weights that are not.
    """
    model, total = loaded.model, int(config.healing_steps)
    precision = Precision(config.precision, config.precision_mode)
    stream = batches(windows, int(config.batch_size), generator)
    if kept is None:
        yield HealRecord(0, 0, collapsed, headroom=precision.headroom(collapsed.peaks))
    if config.reset_norms and total:
        reset_norms(model)
    with adapted(model, config, generator), precision.weights(model):
        trainer = trainer_of(model, config)
        losses: list[float] = []
        norms: list[float] = []
        if kept is not None:
            trainer.load_state_dict(kept["trainer"])
            losses, norms = list(kept["losses"]), list(kept["norms"])
            for _ in range(trainer.steps):  # the order's generator is where it was
                next(stream)
        seconds, since, done = 0.0, 0, trainer.steps
        tokens_per_step = int(config.batch_size) * config.sequence_length
        if done == total or trainer.must_stop:
            return
        for step in phase("healing", range(done + 1, total + 1), total, begin=done):
            begin = time.perf_counter()
            loss, norm = trainer.step(next(stream).to(loaded.device))
            seconds += time.perf_counter() - begin
            since += 1
            if math.isfinite(loss) and math.isfinite(norm):
                losses.append(loss)
                norms.append(norm)
            last = step == total or trainer.must_stop
            if step % config.measurement_interval == 0 or last:
                with precision.measuring(model), during("measurement"):
                    measurement = probe.measure(model)
                    failure = trainer.first_failure
                    unsound = last and measurement.nonfinite_tokens > 0
                    if unsound and not failure:
                        module = trainer.forward_failure(probe.windows) or "probe"
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
            yield Safe(step, state=functools.partial(_state, trainer, losses, norms))
            if last:
                return


def _state(trainer: Trainer, losses: list[float], norms: list[float]) -> dict[str, Any]:
    """What a run goes on from after a step."""
    return {"trainer": trainer.state_dict(), "losses": list(losses), "norms": list(norms)}


def replay_healthy(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    generator: torch.Generator,
    steps: int,
    trainer_of: Callable[[PreTrainedModel, HealConfig], Trainer] = Trainer,
) -> HealthyReplay:
    """The first steps of :func:`heal` on another model, changed in place, up to its first failure.

    Args:
        loaded: The healthy model, in float32.
        config: Of the run that failed.
        windows: Of the run that failed.
        generator: In the state in which the failed run's began.
        steps: Steps to try.
        trainer_of: Makes what takes them.
    """
    model = loaded.model
    stream = batches(windows, int(config.batch_size), generator)
    precision = Precision(config.precision, config.precision_mode)
    if config.reset_norms:
        reset_norms(model)
    with adapted(model, config, generator), precision.weights(model):
        trainer = trainer_of(model, config)
        for _ in range(steps):
            trainer.step(next(stream).to(loaded.device))
            if trainer.failure:
                break
        return HealthyReplay(steps, trainer.first_failure)
