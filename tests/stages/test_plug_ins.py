"""An arm of another distribution, from the attack to the summary, there and gone again."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys

import numpy as np
import pytest
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError
from healing.models.checkpoints import read_checkpoint
from healing.reporting.plots.style import UNKNOWN, arm_style
from healing.stages.attack import attack
from healing.stages.cells.attack import attack_fingerprint
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.cells.sweep_plan import plan
from healing.stages.dry_run.stage import predictions
from healing.stages.heal import heal
from healing.stages.summarize import summarize
from healing.statistics.summary import summarize_runs
from healing.tracking.page_text import plain_tags
from tests.conftest import ROOT, forget_plug_ins
from tests.summaries import simulated_run

pytestmark = pytest.mark.slow

GUIDE = ROOT / "docs" / "plug_ins.md"
SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 1024, "batch_size": 4,
         "measurement_interval": 4, "verbosity": "quiet"}  # fmt: skip
PRUNING = re.search(r"```python\n(.*?)```", GUIDE.read_text(), re.DOTALL)[1]
"""The arm of the guide."""


def test_a_plug_in_arm_is_attacked_healed_summarized_and_still_known_when_it_is_gone(
    store, plug_ins, monkeypatch
):
    path = plug_ins("pruning", PRUNING)
    config = AttackConfig(arm="pruning", attack_steps=8, **SMALL)
    run_id, checkpoint = attack(config)
    state = read_checkpoint(checkpoint).state
    for weight in state.values():
        if weight.ndim == 2:  # more than half only where weights tie
            assert 0.5 <= float((weight == 0).double().mean()) < 0.501
    tags = plain_tags(MlflowClient().get_run(run_id).data.tags)
    assert (tags["arm"], tags["arm_role"], tags["arm_label"]) == (
        "pruning", "treatment", "weight pruning",
    )  # fmt: skip
    assert MlflowClient().get_metric_history(run_id, "zeros")[-1].step == 8
    heal(HealConfig(collapsed_checkpoint=str(checkpoint), healing_steps=4, **SMALL))
    here = summarize(SummarizeConfig(verbosity="quiet"))
    (group,) = here.groups
    assert (group.role, group.label) == ("treatment", "weight pruning")
    assert arm_style("pruning") == ("#117733", "h")
    (first,) = (store / "experiments/results/summaries").iterdir()

    monkeypatch.setattr(importlib.metadata, "entry_points", lambda **_: ())
    path.unlink()
    sys.modules.pop("plug_in_0", None)
    forget_plug_ins()
    with pytest.raises(ConfigError, match="--arm must be one of haep"):
        AttackConfig(arm="pruning")
    assert arm_style("pruning") == UNKNOWN
    gone = summarize(SummarizeConfig(verbosity="quiet"))
    assert (gone.groups[0].role, gone.groups[0].label) == ("treatment", "weight pruning")
    (second,) = {*(store / "experiments/results/summaries").iterdir()} - {first}
    for name in ("summary.md", "summary.json", "summary.csv", "paper/recovery_macros.tex"):
        assert (first / name).read_text() == (second / name).read_text(), name
    assert "weight pruning" in (second / "summary.md").read_text()
    assert (second / "figures" / "mean_recovery.png").stat().st_size > 10_000
    assert json.loads((second / "summary.json").read_text())["groups"][0]["arm"] == "pruning"
    # It can also still be healed: nothing of the arm is needed for that.
    (again,) = heal(HealConfig(collapsed_checkpoint=str(checkpoint), healing_steps=2, **SMALL))
    assert again.records[-1].step == 2


def test_a_changed_plug_in_is_another_experiment(plug_ins):
    path = plug_ins("pruning", PRUNING)
    own, other = (resolve_from_model(AttackConfig(arm=arm, **SMALL)) for arm in ("pruning", "haep"))
    before = [attack_fingerprint(config, "model", {}) for config in (own, other)]
    path.write_text(path.read_text().replace("zero, in", "nought, in"))
    forget_plug_ins()
    assert [attack_fingerprint(config, "model", {}) for config in (own, other)] == before
    path.write_text(path.read_text().replace("SHARE = 0.5", "SHARE = 0.6"))
    forget_plug_ins()
    after = [attack_fingerprint(config, "model", {}) for config in (own, other)]
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_memory_is_not_predicted_for_plug_ins(plug_ins):
    plug_ins("pruning", PRUNING)
    plug_ins("slow", '"""X."""\n', "llm_healing.methods")
    with pytest.raises(
        ConfigError, match="not predicted for plug-in arms: pruning is of plug_in_0"
    ):
        predictions(AttackConfig(model="nano", arm="pruning"))
    with pytest.raises(ConfigError, match="not predicted for plug-in healing methods: slow is of"):
        predictions(HealConfig(model="nano", healing_method="slow"))


def test_the_sweep_matches_noise_to_every_treatment(plug_ins):
    plug_ins("pruning", PRUNING)
    (chain,) = plan(
        SweepConfig(models="nano", arms="gaussian_noise,pruning,spectral,haep", seeds="0")
    )
    assert [(cell.arm, cell.matched_to) for cell in chain] == [
        ("none", ""), ("pruning", ""), ("spectral", ""), ("haep", ""),
        ("gaussian_noise", "pruning"), ("gaussian_noise", "haep"),
    ]  # fmt: skip
    (chain,) = plan(SweepConfig(models="nano", arms="gaussian_noise", seeds="0", sham=False))
    assert [(cell.arm, cell.matched_to) for cell in chain] == [("gaussian_noise", "")]


def test_two_treatments_are_each_compared_with_the_noise_matched_to_them():
    """Noise of 20 and 50 points under attacks of 30: differences of 10 and of −20."""
    rng, runs = np.random.default_rng(0), []
    for seed in range(4):
        for arm, noise in (("haep", 20.0), ("pruning", 50.0)):
            tags = {"role": "treatment", "label": {"haep": "HAEP"}.get(arm, "weight pruning")}
            attacked = simulated_run(rng, "nano", arm, seed, 30.0, 60.0, **tags)
            matched = simulated_run(
                rng, "nano", "gaussian_noise", seed, noise, 60.0, settings=f"to {arm}",
                run_id=f"noise {arm} {seed}", checkpoint=f"noise {arm} {seed}",
                reference=attacked.checkpoint, noise_match="loss",
            )  # fmt: skip
            runs += [attacked, matched]
    found = summarize_runs(runs, 0.95, np.random.default_rng(0))
    assert not found.gaps
    keys = ["nano, HAEP against Gaussian noise", "nano, weight pruning against Gaussian noise"]
    assert [c.pair.title for c in found.contrasts] == keys
    points = [c.comparison.endpoints[0].superiority.interval.point for c in found.contrasts]
    # Limits scatter with a standard deviation of 4 per checkpoint, 2.8 per mean difference.
    assert points == [pytest.approx(10.0, abs=7.0), pytest.approx(-20.0, abs=7.0)]
