"""What is measured again and what is not: by everything that a measurement depends on."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.measurements import kept_measurements
from healing.measurements.kept_measurements import forget, measured
from healing.measurements.probe import Probe
from healing.models.checkpoints import save_checkpoint
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.cells.heal import heal_cell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import resolve_from_model


@pytest.fixture
def calls(monkeypatch) -> list[bool]:
    """Measurements made, and whether each was one with an error."""
    made: list[bool] = []
    plain = Probe.measure

    def counted(self, model, error_generator=None):
        made.append(error_generator is not None)
        return plain(self, model, error_generator)

    monkeypatch.setattr(Probe, "measure", counted)
    return made


@pytest.fixture
def small(probe) -> Probe:
    return Probe(probe.windows[:4])


def test_the_same_state_is_measured_once(nano, small, calls):
    first = measured(small, nano, 0, nano.digest)
    assert measured(small, nano, 0, nano.digest) is first
    assert measured(Probe(small.windows.clone()), nano, 0) is first  # hashed here: the same weights
    assert calls == [True]
    direct = small.measure(nano.model, named_generator(0, "bootstrap"))
    assert direct.metrics() == first.metrics()
    assert direct.rank_standard_error == first.rank_standard_error


def other_weights(probe, loaded):
    with torch.no_grad():
        next(loaded.model.parameters())[5, 3] += 1.0
    return probe, loaded, 0


def other_tokenizer(probe, loaded):
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(9)
    return probe, LoadedModel("nano", loaded.model, tokenizer, loaded.digest), 0


def another_thread(probe, loaded):
    torch.set_num_threads(2)
    return probe, loaded, 0


@pytest.mark.parametrize(
    "changed",
    [
        other_weights,
        other_tokenizer,
        another_thread,
        lambda probe, loaded: (Probe(probe.windows.flip(0)), loaded, 0),
        lambda probe, loaded: (Probe(probe.windows.view(8, -1)), loaded, 0),
        lambda probe, loaded: (Probe(probe.windows, extra=("accuracy",)), loaded, 0),
        lambda probe, loaded: (probe, loaded, 1),
    ],
)
def test_whatever_else_it_depends_on_is_measured_again(nano, small, calls, changed):
    measured(small, nano, 0)
    measured(*changed(small, nano))
    assert calls == [True, True]


def test_above_the_bootstraps_size_seeds_share_what_is_measured(nano, small, calls, monkeypatch):
    for module in ("kept_measurements", "probe"):
        monkeypatch.setattr(f"healing.measurements.{module}.BOOTSTRAP_MAX_DIMENSION", 16)
    assert measured(small, nano, 0) is measured(small, nano, 1)
    other = small.measure(nano.model, named_generator(7, "bootstrap"))
    assert other.rank_standard_error == measured(small, nano, 0).rank_standard_error
    assert calls == [True, True]


def test_a_probe_that_remembers_a_state_measures_anew(nano, small, calls):
    """The same weights are as far from the healthy ones as those were remembered to be."""
    probe = Probe(small.windows, extra=("weight_distance",))
    at_home = measured(probe.remembering("healthy", nano.model), nano, 0, nano.digest)
    assert at_home.extra == {"extra/weight_distance_healthy": 0.0}
    away = copy.deepcopy(nano.model)
    with torch.no_grad():
        for parameter in away.parameters():
            parameter.mul_(2.0)
    far = measured(probe.remembering("healthy", away), nano, 0, nano.digest)
    assert far.extra == {"extra/weight_distance_healthy": pytest.approx(0.5)}
    assert calls == [True, True]


def test_the_oldest_are_dropped(nano, small, calls, monkeypatch):
    monkeypatch.setattr(kept_measurements, "MOST", 2)
    for seed in (0, 1, 0, 2, 0, 1):  # 1 is the least recently used when 2 comes
        measured(small, nano, seed)
    assert len(calls) == 4


@pytest.mark.slow
def test_an_attack_its_sham_and_its_healing_measure_each_state_once(calls, tmp_path):
    small = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 4,
             "measurement_interval": 100}  # fmt: skip
    only = {"arm": "random_tokens", "attack_steps": 2, "trajectory_interval": 0}
    attacked = outcome_of(attack_cell(resolve_from_model(AttackConfig(**small, **only))))
    assert calls == [True, False, True]  # healthy, the last step, collapsed with its error
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, attacked.loaded.model, 2, "x", {"model": "nano"})
    config = resolve_from_model(HealConfig(**small, healing_steps=1))
    sham, _ = outcome_of(heal_cell(HealCell(replace(config, arm="none"), "")))
    healed, _ = outcome_of(heal_cell(HealCell(config, str(path))))
    assert calls == [True, False, True, False, False]  # the end of each healing alone
    assert healed.healthy is sham.healthy is attacked.healthy
    assert healed.records[0].measurement is attacked.collapsed
    assert sham.records[0].measurement is attacked.healthy
    forget()
    again, _ = outcome_of(heal_cell(HealCell(config, str(path))))
    assert calls[5:] == [True, True, False]
    assert str(again.summary()) == str(healed.summary())  # NaN included


def test_a_state_that_is_compared_with_more_is_measured_again(nano, small, calls):
    """The collapsed state ends an attack, compared with the healthy one, and begins its healing,
    compared with itself too.
    """
    compared = replace(small, extra=("weight_distance",)).remembering("healthy", nano.model)
    first = measured(compared, nano, 0, nano.digest)
    again = measured(compared.remembering("collapsed", nano.model), nano, 0, nano.digest)
    assert set(first.extra) == {"extra/weight_distance_healthy"}
    assert again.extra["extra/weight_distance_collapsed"] == 0.0
    assert len(calls) == 2
