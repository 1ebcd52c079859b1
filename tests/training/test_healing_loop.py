"""The healing loop against a bare loop written out here, and its treatment of bad steps."""

from __future__ import annotations

import math

import pytest
import torch

from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.data.windows import batches
from healing.measurements.probe import Probe
from healing.models.loading import load_model, state_digest
from healing.randomness import named_generator
from healing.training.healing_loop import heal
from healing.training.trainer import MAX_CONSECUTIVE_NONFINITE_STEPS, Trainer


def settings(**changes) -> HealConfig:
    values = {"model": "nano", "healing_steps": 5, "measurement_interval": 2, "batch_size": 4,
              "sequence_length": 64, "seed": 0}  # fmt: skip
    return resolve_from_presets(HealConfig(**(values | changes)))


@pytest.fixture
def windows(corpus, nano):
    return corpus.windows("train", nano.tokenizer, 64)


@pytest.fixture
def small_probe(probe) -> Probe:
    return Probe(probe.windows[:4])


QKV = "query_key_value.bias"


def run(loaded, windows, probe, config):
    collapsed = probe.measure(loaded.model)
    return list(heal(loaded, config, windows, probe, collapsed, named_generator(0, "sft")))


@pytest.mark.parametrize(("name", "rate"), [("adamw", 1e-3), ("sgd", 0.1)])
def test_healing_is_plain_fine_tuning(nano, windows, small_probe, name, rate):
    """The same weights as a bare loop of transformers' logits over the same batches."""
    config = settings(healing_optimizer=name, healing_lr=rate)
    run(nano, windows, small_probe, config)
    bare = load_model("nano").model
    optimizer = (
        torch.optim.AdamW(bare.parameters(), lr=rate, weight_decay=0.0)
        if name == "adamw"
        else torch.optim.SGD(bare.parameters(), lr=rate)
    )
    stream = batches(windows, 4, named_generator(0, "sft"))
    for _ in range(5):
        ids = next(stream)
        logits = bare(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # Softmax ignores what is added to all keys: a key bias has no gradient but rounding, which
    # AdamW turns into whole steps. Elsewhere it takes sums in another order, 1e-9 of a gradient.
    healed = nano.model.named_parameters()
    pairs = [(a, b) for a, (n, b) in zip(bare.parameters(), healed, strict=True) if QKV not in n]
    ends = [torch.cat([p.detach().flatten() for p in end]) for end in zip(*pairs, strict=True)]
    apart = (ends[0] - ends[1]).abs()
    assert float((apart > 2e-6).double().mean()) <= 1e-3
    assert int((apart > 0.2 * rate).sum()) <= 3  # a gradient that is nearly zero by chance


def test_trajectory_has_step_zero_every_interval_and_the_last_step(nano, windows, small_probe):
    records = run(nano, windows, small_probe, settings())
    assert [r.step for r in records] == [0, 2, 4, 5]
    assert [r.tokens for r in records] == [0, 512, 1024, 1280]
    assert math.isnan(records[0].train_loss)
    assert all(r.tokens_per_second > 0 for r in records[1:])


def test_no_steps_is_only_the_collapsed_state(nano, windows, small_probe):
    digest = state_digest(nano.model.state_dict())
    records = run(nano, windows, small_probe, settings(healing_steps=0))
    assert [r.step for r in records] == [0]
    assert state_digest(nano.model.state_dict()) == digest


def test_same_generator_same_bits_other_generator_other_bits(windows, small_probe):
    digests = []
    for name in ("a", "a", "b"):
        loaded = load_model("nano")
        measured = small_probe.measure(loaded.model)
        list(heal(loaded, settings(), windows, small_probe, measured, named_generator(0, name)))
        digests.append(state_digest(loaded.model.state_dict()))
    assert digests[0] == digests[1] != digests[2]


def test_clipping_bounds_the_step(nano, windows):
    config = settings(healing_optimizer="sgd", healing_lr=1.0, gradient_clip=0.01)
    before = torch.cat([p.detach().flatten().clone() for p in nano.model.parameters()])
    _, norm = Trainer(nano.model, config).step(windows[:4])
    after = torch.cat([p.detach().flatten() for p in nano.model.parameters()])
    assert norm > 0.01
    assert float((after - before).norm()) == pytest.approx(0.01, rel=1e-3)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(nano, windows, small_probe):
    with torch.no_grad():
        nano.model.get_output_embeddings().weight[0] = math.nan
    digest = state_digest(nano.model.state_dict())
    records = run(nano, windows, small_probe, settings(healing_steps=50, measurement_interval=20))
    assert state_digest(nano.model.state_dict()) == digest
    assert records[-1].step == records[-1].nonfinite_steps == MAX_CONSECUTIVE_NONFINITE_STEPS
    assert math.isnan(records[-1].train_loss)
    assert math.isnan(records[-1].measurement.loss)
