"""Extra measurements by hand, and what asking for them changes: nothing else."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import nn

from healing.config.attack import AttackConfig
from healing.config.fingerprint import fingerprint
from healing.config.heal import HealConfig
from healing.errors import ConfigError
from healing.measurements.extra import accuracy, token_loss
from healing.measurements.extra_metrics import ProbeState
from healing.measurements.probe import Probe
from healing.stages.attack import attack
from healing.stages.heal import heal


class Table(nn.Module):
    """Logits are the row of a table that the token names."""

    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.rows[input_ids])


def state(model=None, windows=None, losses=None) -> ProbeState:
    return ProbeState(model, windows, losses, ())


def test_accuracy_by_hand():
    rows = [[0.0] * 8 for _ in range(8)]
    rows[0] = [9, 8, 7, 6, 5, 4, 3, 2]  # 0: the best is 0, then 1, 2, 3, 4
    rows[1] = [2, 2, 0, 0, 0, 0, 0, 0]  # 1: 0 and 1 tie
    rows[2] = [math.inf, 9, 0, 0, 0, 0, 0, 0]  # 2: cannot be computed
    windows = torch.tensor([[0, 0, 4, 7], [0, 5, 0, 1], [1, 1, 2, 1]])
    # Predicted pairs: 0→0 first, 0→4 fifth, 4→7 tie of all; 0→5 sixth, 5→0 tie, 0→1 second;
    # 1→1 tie, 1→2 third, 2→1 not computed.
    found = accuracy.measure(state(Table(rows), windows))
    assert found == {"top1": pytest.approx(100 * 4 / 9), "top5": pytest.approx(100 * 7 / 9)}
    assert set(found) == set(accuracy.UNITS)


def test_accuracy_of_nano_is_that_of_all_logits_at_once(nano, corpus):
    windows = corpus.windows("probe", nano.tokenizer, 64)[:8]
    with torch.no_grad():
        best = nano.model(input_ids=windows).logits[:, :-1].argmax(-1)
    expected = 100.0 * float((best == windows[:, 1:]).double().mean())
    measured = Probe(windows, extra=("accuracy",)).measure(nano.model)
    assert measured.metrics()["extra/accuracy_top1"] == pytest.approx(expected)
    assert 5.0 < expected < 90.0
    assert measured.extra["extra/accuracy_top5"] > expected


def test_quantiles_are_numpys():
    losses = torch.linspace(0.0, 3.0, 41).square()[torch.randperm(41)]
    found = token_loss.measure(state(losses=losses))
    expected = np.quantile(losses.double().numpy(), [0.5, 0.9])
    assert [found["median"], found["q90"]] == pytest.approx(expected.tolist())


def test_tokens_that_cannot_be_computed_count_as_the_worst():
    losses = torch.tensor([1.0, 2.0, 3.0, math.nan, math.inf])
    found = token_loss.measure(state(losses=losses))
    assert found["median"] == 3.0
    assert math.isnan(found["q90"])


def test_the_other_numbers_stay_as_they_are(nano, probe):
    plain = probe.measure(nano.model)
    more = Probe(probe.windows, extra=("token_loss", "accuracy")).measure(nano.model)
    own = {k: v for k, v in more.metrics().items() if not k.startswith("extra/")}
    assert own == plain.metrics()
    assert len(more.metrics()) == len(own) + 4
    assert not nano.model.training


def test_no_extra_measurement_leaves_fingerprints_as_they_were():
    config = AttackConfig(model="nano")
    assert fingerprint(config) == fingerprint(_without(config, "measurements"))
    assert fingerprint(config) != fingerprint(AttackConfig(model="nano", measurements="accuracy"))


def _without(config, name: str):
    """The same configuration, of a class that never had the field."""
    kept = [f for f in dataclasses.fields(config) if f.name != name]
    made = dataclasses.make_dataclass(
        "Older",
        [(f.name, f.type, dataclasses.field(metadata=f.metadata)) for f in kept],
        frozen=True,
        kw_only=True,
    )
    return made(**{f.name: getattr(config, f.name) for f in kept})


@pytest.mark.slow
def test_they_are_logged_at_every_measured_step(store):
    small = {
        "model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 4,
        "measurement_interval": 2, "verbosity": "quiet",
        "measurements": "accuracy,cka,agreement,weight_distance",
    }  # fmt: skip
    run_id, checkpoint = attack(AttackConfig(arm="random_tokens", attack_steps=4, **small))
    (outcome,) = heal(HealConfig(collapsed_checkpoint=str(checkpoint), healing_steps=2, **small))
    history = MlflowClient().get_metric_history(run_id, "extra/accuracy_top1")
    assert [point.step for point in history] == [0, 1, 2, 3, 4]
    assert history[0].value > history[-1].value
    # Of the collapsed state both stages say the same.
    first, last = outcome.records[0].measurement.extra, outcome.records[-1].measurement.extra
    assert first["extra/accuracy_top1"] == history[-1].value
    # Those that compare have the same healthy state in both.
    metrics = MlflowClient().get_run(run_id).data.metrics
    for name in ("cka_mean", "agreement_kl", "agreement_top1", "weight_distance_healthy"):
        assert first[f"extra/{name}"] == pytest.approx(metrics[f"extra/{name}"], rel=1e-6)
    (start, *_) = MlflowClient().get_metric_history(run_id, "extra/agreement_kl")
    assert (start.step, start.value) == (0, 0.0)
    # What the attack itself says of its weights, by other code.
    assert metrics["extra/weight_distance_healthy"] == pytest.approx(metrics["weight_change"])
    assert "extra/weight_distance_collapsed" not in metrics
    assert first["extra/weight_distance_collapsed"] == 0.0 < last["extra/weight_distance_collapsed"]


def test_a_name_that_no_metric_can_have_is_refused(nano, probe, plug_ins):
    text = '"""X."""\ndef measure(state):\n    return {"a b": 1.0}\n'
    plug_ins("odd", text, "llm_healing.measurements")
    with pytest.raises(ConfigError, match="measurement 'odd' names a number 'a b'"):
        Probe(probe.windows, extra=("odd",)).measure(nano.model)
