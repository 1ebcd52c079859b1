"""The learning rate of healing against torch's own schedulers and values worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.training.rate_schedule import rate_factor
from healing.training.trainer import Trainer


def torch_factors(total: int, rising: int, decay: str) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    falling = (
        CosineAnnealingLR(optimizer, T_max=total - rising)
        if decay == "cosine"
        else LinearLR(optimizer, 1.0, 0.0, total_iters=total - rising)
    )
    rise = LinearLR(optimizer, 1 / (rising + 1), 1.0, total_iters=rising)
    schedule = SequentialLR(optimizer, [rise, falling], milestones=[rising])
    found = []
    for _ in range(total):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step()`")
@pytest.mark.parametrize("decay", ["cosine", "linear"])
@pytest.mark.parametrize(("total", "share", "rising"), [(20, 0.25, 5), (7, 0.1, 1), (240, 0.1, 24)])
def test_the_schedule_is_the_one_of_torch(total, share, rising, decay):
    own = [rate_factor(step, total, share, decay) for step in range(1, total + 1)]
    assert own == pytest.approx(torch_factors(total, rising, decay), abs=1e-9)


def test_values_by_hand():
    rise = [rate_factor(step, 8, 0.375) for step in range(1, 9)]
    assert rise == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert [rate_factor(step, 4, 0.0, "linear") for step in (1, 2, 3, 4)] == [1, 0.75, 0.5, 0.25]
    cosine = [rate_factor(step, 4, 0.0, "cosine") for step in (1, 2, 3, 4)]
    half = math.sqrt(0.5)
    assert cosine == pytest.approx([1, (1 + half) / 2, 0.5, (1 - half) / 2])


@pytest.mark.parametrize("decay", ["constant", "cosine", "linear"])
def test_a_run_that_only_warms_up_never_divides_by_what_is_left(decay):
    assert rate_factor(4, 4, 1.0, decay) == 0.8


def config(**changes) -> HealConfig:
    small = {"model": "nano", "healing_steps": 4, "healing_optimizer": "sgd", "healing_lr": 0.5}
    return resolve_from_presets(HealConfig(**(small | changes)))


def test_the_trainer_follows_it_over_its_horizon(nano):
    ids = torch.arange(64).reshape(2, 32)
    trainer = Trainer(nano.model, config(healing_warmup=0.25, healing_decay="linear"))
    rates = []
    for _ in range(4):
        trainer.step(ids)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.25, 0.5, 1 / 3, 1 / 6])


def test_a_step_that_is_not_taken_uses_up_its_rate(nano):
    """The budget is counted in tokens: the rate falls with them."""
    ids = torch.arange(64).reshape(2, 32)
    trainer = Trainer(nano.model, config(healing_decay="linear"))
    gain = nano.model.gpt_neox.final_layer_norm.weight
    healthy = gain.detach().clone()
    gain.data.fill_(math.inf)
    trainer.step(ids)
    gain.data.copy_(healthy)
    trainer.step(ids)
    assert (trainer.nonfinite, trainer.taken) == (1, 1)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.375


def test_without_a_schedule_the_rate_is_the_given_one_to_the_last_bit(nano):
    plain = config(healing_lr=0.1)
    trainer = Trainer(nano.model, replace(plain))
    trainer.step(torch.arange(64).reshape(2, 32))
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1
