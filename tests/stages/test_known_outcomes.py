"""Known outcomes on the embedded models at the default presets: the instrument's own controls."""

from __future__ import annotations

import math

import pytest

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.errors import MatchError
from healing.models.checkpoints import save_checkpoint
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.cells.heal import heal_cell
from healing.stages.cells.heal_outcome import HealCell, HealOutcome
from healing.stages.cells.inputs import resolve_from_model

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("model", ["nano", "micro"])
def test_haep_collapses_the_embedded_models(model, seed):
    outcome = outcome_of(
        attack_cell(resolve_from_model(AttackConfig(model=model, arm="haep", seed=seed)))
    )
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
        attacked = outcome_of(attack_cell(resolve_from_model(AttackConfig(model="nano", arm=arm))))
        path = folder / f"{arm}.pt"
        save_checkpoint(path, attacked.loaded.model, 0, arm, {"model": "nano", "arm": arm})
        config = resolve_from_presets(HealConfig(model="nano", healing_steps=60))
        found[arm] = outcome_of(heal_cell(HealCell(config, str(path))))[0]
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


def healed(folder, name: str, steps: int, **attack) -> dict:
    """Summary of healing nano after an attack of the given settings."""
    attacked = outcome_of(attack_cell(resolve_from_model(AttackConfig(model="nano", **attack))))
    path = folder / f"{name}.pt"
    save_checkpoint(path, attacked.loaded.model, 0, name, {"model": "nano"})
    config = resolve_from_presets(HealConfig(model="nano", healing_steps=steps))
    return outcome_of(heal_cell(HealCell(config, str(path))))[0].summary()


def test_positive_control_small_weight_noise_heals(tmp_path):
    """Noise of 0.3 standard deviations: loss 3.0 → 4.8 nats. It leaves the rank as it is, so the
    rank says nothing, and the loss heals.
    """
    found = healed(tmp_path, "noise", 60, arm="gaussian_noise", noise_scale=0.3, attack_steps=1)
    assert found["loss_recovery_pct"] > 70
    assert found["verdict_loss"] == "acute structural failure"
    assert found["spectral_state"] == "unchanged"
    assert found["verdict"] == "undefined"


def test_positive_control_a_shallow_collapse_of_the_rank_heals(tmp_path):
    """The arm that collapses for good when pushed, pushed gently: its rank comes back."""
    found = healed(
        tmp_path, "shallow", 60, arm="spectral", attack_lr=1e-3, target_rank_reduction=0.1
    )
    assert found["spectral_state"] == "collapsed"
    assert found["rank_recovery_pct"] > 70
    assert found["verdict"] == "acute structural failure"


def test_negative_control_rank_one_and_a_tiny_budget_do_not_heal(tmp_path):
    found = healed(
        tmp_path, "deep", 10, arm="spectral", attack_steps=100, target_rank_reduction=1.0
    )
    assert found["collapsed_rank"] < 1.5
    assert found["rank_recovery_pct"] < 20
    assert found["verdict"] == "irreversible pathology"


@pytest.fixture(scope="module")
def haep(tmp_path_factory) -> tuple[str, float]:
    """Checkpoint of nano after haep, seed 0, and its rank."""
    attacked = outcome_of(attack_cell(resolve_from_model(AttackConfig(model="nano", arm="haep"))))
    path = tmp_path_factory.mktemp("reference") / "haep.pt"
    save_checkpoint(path, attacked.loaded.model, 0, "haep", {"model": "nano", "arm": "haep"})
    return str(path), attacked.collapsed.effective_rank


@pytest.mark.parametrize(
    ("arm", "options"),
    [
        ("low_rank_noise", {}),
        ("low_rank_noise", {"noise_rank": 4}),
        ("sharpened_spectrum", {}),
    ],
)
def test_structured_controls_reach_the_rank_of_haep(haep, arm, options):
    path, rank = haep
    config = AttackConfig(model="nano", arm=arm, match="rank", reference_checkpoint=path, **options)
    outcome = outcome_of(attack_cell(resolve_from_model(config)))
    # The cell measures once more when the search is over.
    assert outcome.collapsed.effective_rank == pytest.approx(rank, rel=0.02)
    # At that rank they do a fraction of haep's loss (20.3), whatever the knowledge lost.
    assert 6.0 < outcome.collapsed.loss < 12.0


@pytest.mark.parametrize("arm", ["gaussian_noise", "rotated_change"])
def test_changes_without_a_direction_reach_it_at_no_strength(haep, arm):
    path, rank = haep
    config = AttackConfig(model="nano", arm=arm, match="rank", reference_checkpoint=path)
    with pytest.raises(MatchError, match="the rank stays between 3") as refused:
        outcome_of(attack_cell(resolve_from_model(config)))
    lowest = float(str(refused.value).split("between ")[1].split()[0])
    assert lowest > 1.2 * rank


def test_the_untrained_model_has_more_rank_than_any_collapsed_one_and_knows_nothing():
    """Rank alone is no health: 37.9 of the healthy 42.9, at the loss of a uniform guess."""
    config = resolve_from_model(AttackConfig(model="nano", arm="reinitialised"))
    outcome = outcome_of(attack_cell(config))
    assert outcome.collapsed.effective_rank > 0.8 * outcome.healthy.effective_rank
    assert outcome.collapsed.loss == pytest.approx(math.log(2048), abs=0.05)
