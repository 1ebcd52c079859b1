"""Known outcomes on the embedded models at the default presets: the instrument's own controls."""

from __future__ import annotations

import math

import pytest

from healing.config import AttackConfig, HealConfig, resolve
from healing.experiment.attack import attack_cell
from healing.experiment.healing_cell import HealCell, HealOutcome, heal_cell
from healing.models import save_checkpoint

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("model", ["nano", "micro"])
def test_haep_collapses_the_embedded_models(model, seed):
    outcome = attack_cell(AttackConfig(model=model, arm="haep", seed=seed))
    summary = outcome.summary()
    assert summary["rank_reduction_pct"] >= 30
    assert summary["perplexity_ratio"] >= 10
    assert outcome.damage.spectral_state == "collapsed"
    assert outcome.catalyst is not None
    # Found or failed is a result, not a promise; what it rests on is there either way.
    assert outcome.catalyst.status in ("found", "failed")
    assert outcome.catalyst.alignment > outcome.catalyst.history[0]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> dict[str, HealOutcome]:
    """Arm → healing of nano, seed 0, at the sweep's budget."""
    folder = tmp_path_factory.mktemp("checkpoints")
    found = {}
    for arm in ("haep", "spectral", "none"):
        attacked = attack_cell(AttackConfig(model="nano", arm=arm))
        path = folder / f"{arm}.pt"
        save_checkpoint(path, attacked.loaded.model, 0, arm, {"model": "nano", "arm": arm})
        config = resolve(HealConfig(model="nano", healing_steps=60))
        found[arm] = heal_cell(HealCell(config, str(path)))
    return found


def test_at_least_two_verdicts_occur_and_the_sham_is_undefined(outcomes):
    verdicts = {arm: outcome.summary()["verdict"] for arm, outcome in outcomes.items()}
    assert verdicts["none"] == "undefined"
    assert math.isnan(outcomes["none"].summary()["rank_recovery_pct"])
    assert verdicts["spectral"] == "irreversible pathology"
    assert len(set(verdicts.values())) >= 2


def test_healing_lowers_the_perplexity_of_every_collapsed_model(outcomes):
    for arm in ("haep", "spectral"):
        summary = outcomes[arm].summary()
        assert summary["ppl_improvement_pct"] > 50
        assert summary["loss_recovery_pct"] > 20
