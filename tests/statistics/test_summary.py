"""Pooling and report: checkpoint means, nothing dropped silently, settings kept apart."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.reporting.contrasts import comparison_gaps, comparison_sentence
from healing.reporting.markdown import markdown
from healing.reporting.phrases import interval_text
from healing.reporting.plain_data import as_json, group_rows
from healing.reporting.tables import text_table
from healing.stages.summarize import description
from healing.statistics.heal_runs import HealRun
from healing.statistics.intervals import Interval, cluster_means, t_interval
from healing.statistics.summary import _slopes, summarize_runs
from healing.statistics.warning_collector import WarningCollector
from healing.tracking.run_files import plain


def make_run(final: float, /, *, seed: int = 0, arm: str = "haep", model: str = "nano", **changes):
    steps = (0, 10, 20)
    rank = (0.0, final / 2, final) if math.isfinite(final) else (math.nan,) * 3
    loss = (0.0, 40.0 + seed, 80.0 + seed)
    values = {
        "run_id": f"{arm}{seed}", "name": f"{model} {arm} {seed}", "finished": True,
        "model": model, "arm": arm, "settings": "s", "checkpoint": f"{arm}{seed}",
        "seed": str(seed), "n_params": {"nano": 300_000, "micro": 1_300_000}.get(model, 0),
        "final": {"rank_recovery_pct": final, "loss_recovery_pct": loss[-1],
                  "ppl_improvement_pct": 99.0 + 0.1 * seed},
        "steps": steps, "trajectory": {"rank_recovery_pct": rank, "loss_recovery_pct": loss},
        "spectral_state": "collapsed",
        "undefined_reason": "" if math.isfinite(final) else "too small a change",
    }  # fmt: skip
    return HealRun(**(values | changes))


def noise_contrast(summary):
    return summary.contrast("nano", "gaussian_noise").comparison


def pool(runs):
    return summarize_runs(runs, 0.95, np.random.default_rng(0))


def test_interval_is_scipys_t_interval_of_the_checkpoint_means():
    values = [1.0, 1.4, 2.5, 0.9] * 4
    (group,) = pool([make_run(v, seed=i) for i, v in enumerate(values)]).groups
    low, high = scipy_stats.t.interval(0.95, 15, np.mean(values), scipy_stats.sem(values))
    found = group.intervals["rank_recovery_pct"]
    assert (found.low, found.high) == pytest.approx((low, high))
    assert group.verdict == "irreversible pathology"
    assert pool([make_run(v, seed=i) for i, v in enumerate(values[:5])]).groups[0].verdict == (
        "too few checkpoints"
    )


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
    assert group.verdict == "too few checkpoints"
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


def test_runs_that_could_not_compute_are_counted_by_status():
    statuses = ["lockout", "format_overflow", "format_overflow", "optimiser_artifact", "diverged",
                "nonfinite_steps", "ok"]  # fmt: skip
    runs = [make_run(10.0, seed=i, status=s) for i, s in enumerate(statuses)]
    summary = pool(runs)
    assert summary.groups[0].n_lockout == 1
    assert (
        "7 collapsed (1 locked out, 2 overflowed the format, 1 optimiser artefact, 1 diverged, "
        "1 with non-finite steps)"
    ) in text_table(summary)
    (row,) = group_rows(summary)
    counted = {s: row[s] for s in set(statuses) - {"ok"}}
    assert counted == {s: statuses.count(s) for s in counted}
    assert as_json(summary)["groups"][0]["statuses"]["format_overflow"] == 2
    assert "7 collapsed " in text_table(pool([make_run(10.0, seed=i) for i in range(7)]))
    assert "(1 locked" not in text_table(pool(runs[1:]))


def test_other_settings_are_not_pooled():
    summary = pool([make_run(10.0), make_run(90.0, seed=1, settings="other")])
    assert len(summary.groups) == 2
    assert "HAEP #s" in text_table(summary)


def test_haep_against_noise_is_paired_by_seed():
    noise = [make_run(v, seed=i, arm="gaussian_noise") for i, v in enumerate([50.0, 61.0, 45.0])]
    haep = [make_run(v, seed=i) for i, v in enumerate([20.0, 30.0, 16.0])]
    summary = pool([*noise, *haep])
    differences = np.array([-30.0, -31.0, -29.0])
    expected = scipy_stats.t.interval(0.95, 2, differences.mean(), scipy_stats.sem(differences))
    rank = noise_contrast(summary).endpoints[0].superiority.interval
    assert (rank.low, rank.high) == pytest.approx(expected)
    assert "HAEP minus Gaussian noise" in comparison_sentence(
        summary.contrast("nano", "gaussian_noise")
    )
    assert not pool([*noise, make_run(1.0, seed=9)]).contrasts


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
    assert "| nano | HAEP |" in markdown(summary)


def test_interval_text():
    assert interval_text(Interval(1.04, 2.0, 3.0, 3, "t")) == "2.0 [1.0, 3.0]"
    assert interval_text(Interval(math.nan, 2.0, math.nan, 2, "t")) == "2.0 [no interval]"
    assert interval_text(Interval(math.nan, math.nan, math.nan, 0, "t")) == "undefined"


def test_slope_is_that_of_one_mean_per_size():
    runs = [
        make_run(v, seed=i, model=m, n_params=n, checkpoint=f"{m}{i}")
        for m, n, values in [("nano", 10**5, (8.0, 12.0)), ("micro", 10**6, (19.0, 22.0, 25.0)),
                             ("nano2", 10**7, (21.0, 41.0))]
        for i, v in enumerate(values)
    ]  # fmt: skip
    slope = pool(runs).slopes["haep"]
    theirs = scipy_stats.linregress([5, 6, 7], [10.0, 22.0, 31.0])
    half_width = scipy_stats.t.ppf(0.975, 1) * theirs.stderr
    assert slope.slope.n == 3
    assert slope.slope.point == pytest.approx(theirs.slope)
    assert slope.slope.high - slope.slope.point == pytest.approx(half_width)


def test_slope_covers_although_sizes_deviate_from_the_line():
    """True slope −5 per decade; sizes deviate by 10 points, their checkpoints by 3."""
    template = pool([make_run(v, seed=i) for i, v in enumerate([10.0, 14.0, 12.0])]).groups[0]
    rng, sizes, covered = np.random.default_rng(0), np.array([5.0, 6.0, 7.0, 8.5]), 0
    for _ in range(1000):
        groups = []
        for size, shift in zip(sizes, rng.normal(0, 10, 4), strict=True):
            values = 80 - 5 * size + shift + rng.normal(0, 3, 3)
            rank = {"rank_recovery_pct": t_interval(values)}
            means = {"rank_recovery_pct": cluster_means(values, range(3))}
            change = {"model": f"{size}", "n_params": 10**size}
            groups.append(replace(template, **change, intervals=rank, means=means))
        slope = _slopes(groups, 0.95, WarningCollector())["haep"].slope
        covered += slope.low <= -5 <= slope.high
    # Binomial standard error 0.7 %; with one point per checkpoint 64 % would be covered.
    assert 0.92 < covered / 1000 < 0.98


def test_sizes_that_are_not_known_get_no_slope():
    runs = [make_run(v, model=m, n_params=n) for v, m, n in
            [(10.0, "nano", 10**5), (20.0, "micro", 10**6), (30.0, "x", 0)]]  # fmt: skip
    assert pool(runs).slopes == {}


def test_paired_differences_stay_in_the_record():
    noise = [make_run(v, seed=i, arm="gaussian_noise") for i, v in enumerate([50.0, 61.0, 45.0])]
    haep = [make_run(v, seed=i) for i, v in enumerate([20.0, 30.0, math.nan])]
    rank = noise_contrast(pool([*noise, *haep])).endpoints[0]
    assert rank.differences == pytest.approx((-30.0, -31.0, math.nan), nan_ok=True)


def test_plans_only_for_what_is_not_decided():
    values = [5.0, 9.0, 1.0]
    summary = pool([make_run(v, seed=i) for i, v in enumerate(values)])
    (group,) = summary.groups
    assert group.verdict == "too few checkpoints"
    plan = group.plans["rank_recovery_pct"]
    assert (plan.mean, plan.sd) == (pytest.approx(5.0), pytest.approx(4.0))
    assert plan.n_checkpoints > 14
    assert f" {plan.n_checkpoints} " in markdown(summary)
    decided = pool([make_run(2.0 + 0.1 * i, seed=i) for i in range(20)]).groups[0]
    assert "rank_recovery_pct" not in decided.plans
    # Two fifths of such checkpoints recover more than that: no number of them would decide.
    (wide,) = pool([make_run(v, seed=i) for i, v in enumerate([5.0, 30.0, 14.0])]).groups
    assert wide.plans["rank_recovery_pct"].n_checkpoints is None


def test_runs_that_were_never_trained_can_be_summarized():
    zero = {"steps": (0,), "trajectory": {"rank_recovery_pct": (0.0,), "loss_recovery_pct": (0.0,)}}
    (group,) = pool([make_run(0.0, seed=i, **zero) for i in range(3)]).groups
    assert math.isnan(group.half_recovery["rank_recovery_pct"].point)


def test_names_cannot_break_the_markdown_table():
    text = markdown(pool([make_run(1.0, model="a|b\n<img>", n_params=5)]))
    assert "a\\|b &lt;img>" in text
    assert "<img>" not in text


def test_fits_and_plans_are_in_the_json():
    runs = [make_run(v, seed=i) for i, v in enumerate([5.0, 9.0, 1.0])]
    (group,) = json.loads(json.dumps(plain(as_json(pool(runs)))))["groups"]
    assert group["approach"]["rank_recovery_pct"]["converged"] is False
    assert group["required_checkpoints"]["rank_recovery_pct"]["n_checkpoints"] > 3
    assert group["half_times"]["rank_recovery_pct"]["censored"] == [True, True, True]
    assert group["half_times"]["loss_recovery_pct"]["curve"]["not_recovered"][-1] == 0.0


def test_a_long_summary_is_described_in_whole_lines():
    long = pool([make_run(v, seed=i, settings=f"{i}") for i, v in enumerate([10.0, 50.0] * 20)])
    text, whole = description(long), markdown(long)
    assert len(text) <= 8000 < len(whole)
    body = text.removesuffix("\n\nThe rest is in `summary.md`.")
    assert body != text
    first, title, rest = body.partition("# Recovery summary")
    assert whole.startswith(title + rest + "\n")
    assert [line.split("**")[1] for line in first.split("\n\n")[:3]] == [
        f"nano, HAEP #{number}" for number in (0, 1, 10)
    ]
    assert first.strip().endswith("37 more groups below.")
    short = pool([make_run(1.0)])
    assert description(short).endswith("%.\n\n" + markdown(short))


def test_noise_is_compared_with_the_attacks_it_was_matched_to_alone():
    attacks = [make_run(10.0 + i, seed=i, checkpoint=f"state{i}") for i in range(4)]
    own = [
        make_run(30.0 + 2 * i, seed=i, arm="gaussian_noise", reference=f"state{i}")
        for i in range(4)
    ]
    other = [replace(run, reference="elsewhere") for run in own]
    assert noise_contrast(pool([*attacks, *own])).endpoints[0].superiority.interval.n == 4
    assert not pool([*attacks, *other]).contrasts


def test_a_raised_rank_is_not_subtracted_from_a_lowered_one():
    attacks = [make_run(10.0 + i, seed=i) for i in range(4)]
    raised = [
        make_run(30.0 + 2 * i, seed=i, arm="gaussian_noise", spectral_state="inflated")
        for i in range(4)
    ]
    rank, loss = noise_contrast(pool([*attacks, *raised])).endpoints
    assert rank.n_undefined == 4
    assert math.isnan(rank.superiority.interval.point)
    assert loss.n_undefined == 0


def test_a_run_that_could_not_be_trained_does_not_cut_the_others_short():
    healed = [make_run(80.0 + i, seed=i) for i in range(3)]
    nan = (math.nan, math.nan)
    broken = replace(
        make_run(math.nan, seed=3, status="diverged"),
        steps=(0, 10),
        trajectory={"rank_recovery_pct": nan, "loss_recovery_pct": nan},
        final={"rank_recovery_pct": math.nan, "loss_recovery_pct": math.nan},
    )
    twin = replace(broken, run_id="twin", checkpoint=healed[0].checkpoint)
    (alone,) = pool(healed).groups
    (group,) = pool([*healed, broken, twin]).groups
    assert group.bands["rank_recovery_pct"].steps == (0, 10, 20)
    times = [h.time for h in group.half_times["rank_recovery_pct"].times]
    assert times[:3] == [h.time for h in alone.half_times["rank_recovery_pct"].times]
    assert group.statuses == {"diverged": 2, "ok": 3}


def test_a_raised_rank_has_no_recovery_and_no_verdict():
    raised = [make_run(85.0 + i, seed=i, spectral_state="inflated") for i in range(4)]
    summary = pool(raised)
    assert summary.groups[0].verdict == "undefined"
    assert math.isnan(summary.groups[0].intervals["rank_recovery_pct"].point)
    assert {r.undefined_reason for r in summary.undefined} == {
        "the attack raised the effective rank: nothing had collapsed"
    }


def test_arms_that_are_not_compared_are_named():
    runs = [make_run(10.0 + i, seed=i) for i in range(3)]
    runs += [make_run(30.0 + i, seed=i, arm="gaussian_noise") for i in range(3)]
    assert comparison_gaps(pool(runs)) == []
    twice = [replace(r, settings="other", run_id=r.run_id + "b") for r in runs[3:]]
    (line,) = comparison_gaps(pool([*runs, *twice]))
    assert line.startswith(
        "nano: HAEP and Gaussian noise are not compared (secondary): an arm has several"
    )
    strangers = [replace(r, seed="9" + r.seed) for r in runs[3:]]
    (line,) = comparison_gaps(pool([*runs[:3], *strangers]))
    assert "no run of Gaussian noise shares a seed" in line
