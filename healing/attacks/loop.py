"""The attack loop: one function, one optimiser, one budget and one probe for every arm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from healing.attacks.base import Arm, AttackRecord, StepOutcome
from healing.attacks.catalyst_search import Catalyst
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.measurements.probe import Measurement, Probe
from healing.models.blocks import next_token_loss
from healing.models.loading import LoadedModel
from healing.progress import Safe, during, phase
from healing.training.optimizers import make_optimizer


def gradient_step(
    optimizer: torch.optim.Optimizer,
    objective: torch.Tensor,
    change_gradients: Callable[[], None] = lambda: None,
) -> StepOutcome:
    """Backward and optimiser step of one scalar objective; not taken where it is not finite.

    Args:
        optimizer: Takes the step.
        objective: What is descended.
        change_gradients: Called between backward and step.
    """
    optimizer.zero_grad()
    objective.backward()  # type: ignore[no-untyped-call]
    change_gradients()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    finite = math.isfinite(norm) and bool(torch.isfinite(objective))
    if finite:
        optimizer.step()
    return StepOutcome(float(objective.detach()), norm, finite)


def warm_second_moment(
    optimizer: torch.optim.Optimizer, model: PreTrainedModel, clean_batches: Iterable[torch.Tensor]
) -> None:
    """Let AdamW's second moment see clean gradients without moving the weights.

    The steps are taken at learning rate 0. Where clean text has little gradient the second moment
    stays small, and AdamW then takes long steps there. The first moment is set anew by
    :func:`prime_first_moment`.

    Args:
        optimizer: AdamW without weight decay.
        model: The healthy model.
        clean_batches: Windows (batch, tokens) of clean text.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for batch in phase("warm-up", clean_batches):
        gradient_step(optimizer, next_token_loss(model, batch))
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def prime_first_moment(optimizer: torch.optim.Optimizer, arm: Arm) -> None:
    """Make AdamW's first moment that of the attack's own gradient g instead of clean text's.

    m = (1−β₁ᴷ)·g after K warm-up steps, so that the bias-corrected moment of the first attack step
    is g. Clearing it instead would shrink the first steps tenfold: its bias correction is spent.
    """
    optimizer.zero_grad()
    arm.give_gradients()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if state:
                gradient = parameter.grad
                state["exp_avg"].zero_()
                if gradient is not None:
                    share = 1.0 - group["betas"][0] ** float(state["step"])
                    state["exp_avg"].add_(gradient, alpha=share)
    optimizer.zero_grad()


class Diagnosable(Protocol):
    """What an arm says of its weights."""

    def diagnostics(self) -> dict[str, float]:
        """Its own numbers."""

    def baselines_now(self) -> dict[str, float]:
        """What they are compared with."""


def diagnosed(
    arm: Diagnosable, config: AttackConfig, number: int | None, *, last: bool
) -> dict[str, float]:
    """Diagnostics of one record, with their baselines where it is their turn.

    Args:
        arm: At the weights of the record.
        config: Says how often baselines are taken.
        number: Of the record among those that decide, from 0; ``None`` = it decides nothing.
        last: Whether the attack ends with it.
    """
    interval = config.baseline_interval
    own_turn = number is not None and interval > 0 and number % interval == 0
    compared = last or number == 0 or own_turn
    return {**arm.diagnostics(), **(arm.baselines_now() if compared else {})}


def run_attack(
    loaded: LoadedModel,
    arm: Arm,
    config: AttackConfig,
    probe: Probe,
    healthy: Measurement,
    change: WeightChange,
    warmup: Iterable[torch.Tensor] = (),
    kept: Mapping[str, Any] | None = None,
) -> Iterator[AttackRecord | Safe]:
    """Attack a model in place, yielding a record at step 0, every interval and the last step, and
    a safe point after every step; of a resumable arm it has the state from which the same steps
    and records follow.

    The attack ends with its budget, when the effective rank on the probe fell by
    ``target_rank_reduction`` (arms that stop early), or at the first step that is not finite. The
    rank decides at every ``measurement_interval``-th step alone: further records, one every
    ``trajectory_interval`` steps, are looked at by readers only, and no result depends on them.

    Args:
        loaded: The healthy model; changed in place.
        arm: What to feed or add.
        config: Resolved configuration.
        probe: Clean probe.
        healthy: Measurement of the model as it comes.
        change: Snapshot of the model as it comes.
        warmup: Clean batches for :func:`warm_second_moment`.
        kept: State of a safe point to go on from; what came before it is not yielded again.
    """
    model = loaded.model
    total = arm.steps(config)
    rate = float(config.attack_lr)
    optimizer = make_optimizer(config.attack_optimizer, model.parameters(), rate)
    done = measured = 0
    if kept is None:
        warm_second_moment(optimizer, model, warmup)
        if optimizer.state:
            prime_first_moment(optimizer, arm)
        with during("measurement"):
            numbers = diagnosed(arm, config, 0, last=False)
        yield AttackRecord(0, healthy, StepOutcome(), 0.0, numbers)
    else:
        model.load_state_dict(kept["weights"])
        optimizer.load_state_dict(kept["optimizer"])
        done, measured = kept["step"], kept["measured"]
        if kept["over"]:
            return
        arm.pass_over(done)

    def safe(step: int, *, over: bool) -> Safe:
        if not arm.resumable:
            return Safe(step)
        return Safe(
            step, state=functools.partial(_state, model, optimizer, step, measured, over=over)
        )

    target = healthy.effective_rank * (1.0 - config.target_rank_reduction)
    for step in phase("attack", range(done + 1, total + 1), total, begin=done):
        decides = _due(step, config.measurement_interval) or step == total
        shown = decides or _due(step, int(config.trajectory_interval))
        outcome = arm.advance(optimizer, step, total, watched=shown)
        decides = decides or not outcome.finite
        if not (shown or decides):
            yield safe(step, over=False)
            continue
        with during("measurement"):
            measurement = probe.measure(model)
            measured += decides
            reached = decides and arm.stops_early and measurement.effective_rank <= target
            last = reached or not outcome.finite or step == total
            numbers = diagnosed(arm, config, measured if decides else None, last=last)
            moved = change.relative(model)
        yield AttackRecord(step, measurement, outcome, moved, numbers)
        yield safe(step, over=last)
        if last:
            return


def _due(step: int, interval: int) -> bool:
    """Whether a step is one of every so many; none is of every 0."""
    return interval > 0 and step % interval == 0


def _state(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    step: int,
    measured: int,
    *,
    over: bool,
) -> dict[str, Any]:
    """What an attack goes on from after a step: the tensors themselves, not copies."""
    return {
        "weights": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "step": step,
        "measured": measured,
        "over": over,
    }


class LoopArm(Arm):
    """An arm of the common loop: its own are ``advance``, ``diagnostics``, ``give_gradients``, and
    ``baselines_now`` where its diagnostics have any.
    """

    stops_early = True
    resumable = False
    catalyst: Catalyst | None = None

    def steps(self, config: AttackConfig) -> int:
        """The configured budget."""
        return int(config.attack_steps)

    def baselines_now(self) -> dict[str, float]:
        """None."""
        return {}

    def pass_over(self, steps: int) -> None:
        """Draws nothing per step."""

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
        """As :func:`run_attack`."""
        return run_attack(loaded, self, config, probe, healthy, change, warmup, kept)
