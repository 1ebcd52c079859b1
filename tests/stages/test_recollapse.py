"""Attacks repeated on healed weights, at states whose answer is known."""

from __future__ import annotations

import json
import math
import pathlib
from types import SimpleNamespace

import pytest
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.errors import CheckpointError, ConfigError
from healing.models.checkpoints import HEALED_KIND, HEALED_NAME, Checkpoint, read_checkpoint
from healing.models.loading import load_model
from healing.stages.attack import attack, recollapse_sentence
from healing.stages.cells.recollapse import (
    Start,
    read_healed,
    repeated,
    resolve_from_healed,
    target_rank,
)
from healing.stages.heal import heal
from tests.rewritten import rewritten

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 4,
         "verbosity": "quiet"}  # fmt: skip


def healed(**made) -> Checkpoint:
    config = {
        "attack_steps_done": 9,
        "attack_rank": 27.0,
        "attack": {"arm": "haep", "attack_lr": 0.02, "seed": 3, "measurements": "accuracy"},
    }
    return Checkpoint(60, {}, "", config | made, HEALED_KIND)


def state(rank: float) -> SimpleNamespace:
    return SimpleNamespace(effective_rank=rank, loss=5.0)


def start(rank: float, wanted: float = 26.0) -> Start:
    return Start(healed(), state(rank), wanted)


def test_the_rank_to_reach_is_the_first_ones_target_or_where_it_ended():
    config = AttackConfig(target_rank_reduction=0.35)
    assert target_rank(config, state(40.0), healed(attack_rank=25.0)) == pytest.approx(26.0)
    assert target_rank(config, state(40.0), healed(attack_rank=30.0)) == 30.0  # out of steps


def test_the_loop_stops_at_that_rank_seen_from_the_healed_one():
    config = AttackConfig(attack_steps=40)
    found = repeated(config, start(39.0))
    assert 39.0 * (1 - found.target_rank_reduction) == pytest.approx(26.0)
    assert found.attack_steps == 40
    for rank in (26.0, 20.0, math.nan):
        assert repeated(config, start(rank)).attack_steps == 0


def test_steps_are_undefined_above_the_rank():
    assert start(39.0).summary(7, 25.9)["recollapse_steps"] == 7
    assert math.isnan(start(39.0).summary(40, 26.1)["recollapse_steps"])
    assert math.isnan(start(39.0).summary(40, math.nan)["recollapse_steps"])
    said = start(39.0).summary(7, 25.9) | {"healthy_effective_rank": 42.0}
    assert recollapse_sentence(said) == (
        "from the healed rank 39.0 down to 26.0 after 7 steps, from the healthy 42.0 after 9"
    )
    said["recollapse_steps"] = math.nan
    assert "down to 26.0 not, from the healthy" in recollapse_sentence(said)


def test_the_attack_is_the_first_one_and_nothing_else_is_taken():
    found = resolve_from_healed(AttackConfig(measurements="cka", output_dir="x"), healed())
    assert (found.arm, found.attack_lr, found.seed) == ("haep", 0.02, 3)
    assert (found.measurements, found.output_dir) == ("cka", "x")
    assert resolve_from_healed(AttackConfig(attack_lr=0.02), healed()).attack_lr == 0.02
    with pytest.raises(ConfigError, match=r"--attack-lr is 0\.02 as in the first attack: leave it"):
        resolve_from_healed(AttackConfig(attack_lr=0.01), healed())


@pytest.mark.slow
def test_known_outcomes_of_attacking_again(store):
    """On the healthy weights the attack is the first one, bit by bit; what did not heal needs no
    step.
    """
    settings = {**SMALL, "arm": "random_tokens", "attack_steps": 8, "measurement_interval": 1,
                "target_rank_reduction": 0.1}  # fmt: skip
    first_id, collapsed = attack(AttackConfig(**settings))
    first = read_checkpoint(collapsed)
    assert 1 < first.step < 8  # reached its target on the way
    heal(HealConfig(**SMALL, collapsed_checkpoint=str(collapsed), healing_steps=1,
                    healing_lr=1e-9))  # fmt: skip
    (path,) = store.rglob(f"raw_data/*/checkpoints/{HEALED_NAME}")
    # Nothing healed: it is below the rank already.
    _, again = attack(AttackConfig(start_checkpoint=str(path), verbosity="quiet"))
    summary = json.loads((again.parents[1] / "attack_summary.json").read_text())
    assert (summary["recollapse_steps"], summary["first_attack_steps"]) == (0.0, first.step)
    assert summary["start_effective_rank"] == summary["collapsed_effective_rank"]
    # Healed all the way: the healthy weights under a healed checkpoint's name.
    healthy = {"model_state_dict": load_model("nano").model.state_dict()}
    rewritten(path, store / "whole.pt", lambda data: data.update(healthy))
    run_id, again = attack(AttackConfig(start_checkpoint=str(store / "whole.pt"),
                                        verbosity="quiet"))  # fmt: skip
    second, client = read_checkpoint(again), MlflowClient()
    assert (second.step, second.digest) == (first.step, first.digest)
    assert second.config["fingerprint"] != first.config["fingerprint"]
    run = client.get_run(run_id)
    assert run.data.metrics["summary/recollapse_steps"] == first.step
    assert run.data.params["attack.seed"] == "0"
    assert run.data.tags["start"] == "healed"
    assert "Attacked again after healing" in run.data.tags["mlflow.note.content"]
    ranks = [[m.value for m in client.get_metric_history(r, "effective_rank")]
             for r in (first_id, run_id)]  # fmt: skip
    assert ranks[0] == ranks[1]
    _refused(path, collapsed, store)


def _refused(path: pathlib.Path, collapsed: pathlib.Path, store: pathlib.Path) -> None:
    with pytest.raises(CheckpointError, match="is not a healed checkpoint"):
        read_healed(str(collapsed))
    rewritten(path, store / "old.pt", lambda data: data["config"].pop("attack_rank"))
    with pytest.raises(CheckpointError, match=r"does not say how it was attacked .attack_rank is"):
        read_healed(str(store / "old.pt"))
    noise = {"arm": "gaussian_noise"}
    rewritten(path, store / "noise.pt", lambda data: data["config"]["attack"].update(noise))
    with pytest.raises(ConfigError, match="--arm gaussian_noise does not stop at"):
        attack(AttackConfig(start_checkpoint=str(store / "noise.pt"), verbosity="quiet"))
    other = {"healthy_digest": "0" * 16}
    rewritten(path, store / "other.pt", lambda data: data["config"].update(other))
    with pytest.raises(CheckpointError, match="was made from other weights of nano"):
        attack(AttackConfig(start_checkpoint=str(store / "other.pt"), verbosity="quiet"))
