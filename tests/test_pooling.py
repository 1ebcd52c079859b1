"""Pooling and report: checkpoint means, nothing dropped silently, settings kept apart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.experiment.files import plain
from healing.pooling import HealRun, summarize_runs
from healing.report import (
    as_json,
    comparison_sentence,
    group_rows,
    markdown,
    text_table,
)
from healing.stats import Interval
from healing.wording import interval_text


def make_run(final: float, *, seed: int = 0, arm: str = "haep", model: str = "nano", **changes):
    steps = (0, 10, 20)
    rank = (0.0, final / 2, final) if math.isfinite(final) else (math.nan,) * 3
    loss = (0.0, 40.0 + seed, 80.0 + seed)
    values = {
        "run_id": f"{arm}{seed}", "name": f"{model} {arm} {seed}", "finished": True,
        "model": model, "arm": arm, "settings": "s", "checkpoint": f"{arm}{seed}",
        "seed": str(seed), "n_params": {"nano": 300_000, "micro": 1_300_000}[model],
        "final": {"rank_recovery_pct": final, "loss_recovery_pct": loss[-1],
                  "ppl_improvement_pct": 99.0 + 0.1 * seed},
        "steps": steps, "trajectory": {"rank_recovery_pct": rank, "loss_recovery_pct": loss},
        "spectral_state": "collapsed",
        "undefined_reason": "" if math.isfinite(final) else "too small a change",
    }  # fmt: skip
    return HealRun(**(values | changes))


def pool(runs):
    return summarize_runs(runs, 0.95, np.random.default_rng(0))


def test_interval_is_scipys_t_interval_of_the_checkpoint_means():
    values = [10.0, 14.0, 12.5, 9.0]
    (group,) = pool([make_run(v, seed=i) for i, v in enumerate(values)]).groups
    low, high = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
    found = group.intervals["rank_recovery_pct"]
    assert (found.low, found.high) == pytest.approx((low, high))
    assert group.verdict == "irreversible pathology"


def test_replicates_are_averaged_before_anything_else():
    runs = []
    for seed, (a, b) in enumerate([(8.0, 12.0), (13.0, 15.0), (12.0, 13.0)]):
        runs += [make_run(v, seed=seed, run_id=f"{seed}{v}") for v in (a, b)]
    (group,) = pool(runs).groups
    assert (group.n_runs, group.n_checkpoints) == (6, 3)
    expected = scipy_stats.t.interval(
        0.95, 2, np.mean([10, 14, 12.5]), scipy_stats.sem([10, 14, 12.5])
    )
    found = group.intervals["rank_recovery_pct"]
    assert (found.low, found.high) == pytest.approx(expected)


def test_two_checkpoints_have_no_interval():
    (group,) = pool([make_run(10.0), make_run(12.0, seed=1)]).groups
    assert not group.intervals["rank_recovery_pct"].defined
    assert group.verdict == "inconclusive"
    assert any("2" in note for note in group.notes)


def test_undefined_and_failed_runs_are_listed():
    failed = HealRun("f", "broken", finished=False, failure="out of memory")
    summary = pool([*(make_run(math.nan, seed=i) for i in range(3)), failed])
    assert summary.groups[0].verdict == "undefined"
    assert summary.groups[0].n_undefined == 3
    assert [r.run_id for r in summary.failed] == ["f"]
    text = markdown(summary)
    assert "out of memory" in text
    assert "too small a change" in text
    assert "Failed runs (1)" in text


def test_other_settings_are_not_pooled():
    summary = pool([make_run(10.0), make_run(90.0, seed=1, settings="other")])
    assert len(summary.groups) == 2
    assert "haep #s" in text_table(summary)


def test_haep_against_noise_is_paired_by_seed():
    noise = [make_run(v, seed=i, arm="gaussian_noise") for i, v in enumerate([50.0, 61.0, 45.0])]
    haep = [make_run(v, seed=i) for i, v in enumerate([20.0, 30.0, 16.0])]
    summary = pool([*noise, *haep])
    differences = np.array([-30.0, -31.0, -29.0])
    expected = scipy_stats.t.interval(0.95, 2, differences.mean(), scipy_stats.sem(differences))
    rank = summary.comparisons["nano"].endpoints[0].superiority.interval
    assert (rank.low, rank.high) == pytest.approx(expected)
    assert "HAEP minus Gaussian noise" in comparison_sentence("nano", summary)
    assert not pool([*noise, make_run(1.0, seed=9)]).comparisons


def test_band_is_the_interval_at_every_step():
    (group,) = pool([make_run(v, seed=i) for i, v in enumerate([10.0, 14.0, 12.0])]).groups
    band = group.bands["rank_recovery_pct"]
    assert band.steps == (0, 10, 20)
    assert [i.point for i in band.intervals] == pytest.approx([0.0, 6.0, 12.0])
    expected = scipy_stats.t.interval(0.95, 2, 6.0, scipy_stats.sem([5, 7, 6]))
    assert (band.intervals[1].low, band.intervals[1].high) == pytest.approx(expected)


def test_steps_that_not_all_runs_measured_are_left_out():
    short = make_run(10.0, seed=1, steps=(0, 20),
                     trajectory={"rank_recovery_pct": (0.0, 10.0),
                                 "loss_recovery_pct": (0.0, 80.0)})  # fmt: skip
    (group,) = pool([make_run(12.0), short]).groups
    assert group.bands["rank_recovery_pct"].steps == (0, 20)


def test_half_recovery_keeps_censored_runs():
    runs = [make_run(80.0, seed=0), make_run(90.0, seed=1), make_run(30.0, seed=2)]
    (group,) = pool(runs).groups
    # 50 % is crossed at 10 + 10·(50−40)/40 = 12.5 and at 10 + 10·(50−45)/45 = 11.1; one never.
    assert group.half_recovery["rank_recovery_pct"].point == pytest.approx(12.5)


def test_bootstrap_only_from_ten_checkpoints():
    runs = [make_run(10.0 + i, seed=i) for i in range(10)]
    assert not pool(runs[:9]).groups[0].bootstrap
    assert pool(runs).groups[0].bootstrap["rank_recovery_pct"].defined


def test_tables_and_json():
    summary = pool([make_run(v, seed=i) for i, v in enumerate([10.0, 14.0, math.nan])])
    (row,) = group_rows(summary)
    assert row["undefined"] == 1
    assert row["rank_recovery_mean_pct"] == pytest.approx(12.0)
    text = json.dumps(plain(as_json(summary)), allow_nan=False)
    assert '"checkpoint_means"' in text
    assert "| nano | haep |" in markdown(summary)


def test_interval_text():
    assert interval_text(Interval(1.04, 2.0, 3.0, 3, "t")) == "2.0 [1.0, 3.0]"
    assert interval_text(Interval(math.nan, 2.0, math.nan, 2, "t")) == "2.0 [no interval]"
    assert interval_text(Interval(math.nan, math.nan, math.nan, 0, "t")) == "undefined"
