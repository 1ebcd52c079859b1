"""Which runs count, and what a summary says of pace, variance, bootstrap and tokens."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.reporting.cautions import CAUSES, all_notes
from healing.reporting.contrasts import comparison_gaps, half_recovery_sentence
from healing.reporting.html import render
from healing.reporting.markdown import markdown
from healing.reporting.plain_data import as_json, group_rows
from healing.reporting.tables import text_table
from healing.statistics.heal_runs import HealRun
from healing.tracking.run_files import plain
from tests.statistics.test_summary import make_run, pool


def nested(finals, **changes):
    """One run per value: checkpoint → its replicates' final rank recoveries."""
    return [
        make_run(v, seed=c, run_id=f"{changes.get('arm', 'haep')}{c}{r}", **changes)
        for c, values in enumerate(finals)
        for r, v in enumerate(values)
    ]


def test_variance_components_are_those_of_a_one_way_anova():
    finals = [(8.0, 12.0, 10.0), (33.0, 25.0, 29.0), (14.0, 18.0, 22.0)]
    (group,) = pool(nested(finals)).groups
    found = group.variance["rank_recovery_pct"]
    within = np.mean([np.var(v, ddof=1) for v in finals])
    # Balanced: F = MSB/MSW, and the moment estimator of the variance between is (MSB − MSW)/n.
    f = scipy_stats.f_oneway(*finals).statistic
    assert found.within == pytest.approx(within)
    assert found.between == pytest.approx((f - 1) * within / 3)
    assert found.icc == pytest.approx((f - 1) / (f + 2))
    text = markdown(pool(nested(finals)))
    assert f"| nano | HAEP | rank | 3 (9) | {found.between:.1f} | {within:.1f} | " in text
    assert as_json(pool(nested(finals)))["groups"][0]["variance_components"]["rank_recovery_pct"][
        "icc"
    ] == pytest.approx((f - 1) / (f + 2))


def test_one_replicate_each_determines_no_variance_and_says_so():
    summary = pool([make_run(10.0 + i, seed=i) for i in range(4)])
    assert math.isnan(summary.groups[0].variance["rank_recovery_pct"].icc)
    assert "Where the variance comes from" not in markdown(summary)
    assert any(
        "TooFewCheckpointsWarning: variance_components: 4 values of 4" in note
        and note.endswith("(rank_recovery_pct, loss_recovery_pct)")
        for note in summary.groups[0].notes
    )


def half_at(step: float) -> dict:
    """Straight to 50 % at a step of (0, 20), for both endpoints."""
    path = (0.0, 50.0 * 20 / step)
    names = ("rank_recovery_pct", "loss_recovery_pct")
    return {
        "steps": (0, 20),
        "trajectory": dict.fromkeys(names, path),
        "final": {**dict.fromkeys(names, path[-1]), "ppl_improvement_pct": 9.0},
    }


def test_log_rank_is_scipys_and_exact_where_there_are_few_splits():
    haep, noise = [4.0, 6.0, 9.0, 50.0], [8.0, 12.0, 15.0, 40.0]  # the last ones are censored
    runs = [make_run(1.0, seed=i, **half_at(t)) for i, t in enumerate(haep)]
    runs += [make_run(1.0, seed=i, arm="gaussian_noise", **half_at(t)) for i, t in enumerate(noise)]
    summary = pool(runs)
    found = summary.contrast("nano", "gaussian_noise").half_recovery_test["rank_recovery_pct"]
    sides = [scipy_stats.CensoredData(uncensored=t[:3], right=[20.0]) for t in (haep, noise)]
    theirs = scipy_stats.logrank(*sides)
    assert found.statistic == pytest.approx(theirs.statistic)
    assert found.p_asymptotic == pytest.approx(theirs.pvalue)
    assert (found.n, found.n_events, found.method) == ((4, 4), (3, 3), "exact permutation")
    for text in (
        markdown(summary),
        half_recovery_sentence(summary.contrast("nano", "gaussian_noise")),
    ):
        assert f"rank z = {theirs.statistic:.2f}, exact p = {found.p_value:.2f}" in text
        assert "HAEP sooner; 4 and 4 checkpoints, 3 and 3 of them reached half" in text
    stored = as_json(summary)["contrasts"][0]["half_recovery_logrank"]
    assert stored["loss_recovery_pct"]["p_value"] == found.p_value


def test_log_rank_counts_checkpoints_not_runs_and_only_matched_noise():
    haep = [make_run(1.0, seed=i, **half_at(4.0 + i)) for i in range(4)]
    noise = [
        make_run(1.0, seed=i, arm="gaussian_noise", reference=f"haep{i}", **half_at(9.0 + i))
        for i in range(4)
    ]
    stranger = make_run(1.0, seed=7, arm="gaussian_noise", reference="other", **half_at(2.0))
    twice = [*haep, *(replace(r, run_id=r.run_id + "b") for r in haep), *noise, stranger]
    alone, more = pool([*haep, *noise]), pool(twice)
    for endpoint in ("rank_recovery_pct", "loss_recovery_pct"):
        assert (
            more.contrast("nano", "gaussian_noise").half_recovery_test[endpoint]
            == alone.contrast("nano", "gaussian_noise").half_recovery_test[endpoint]
        )


def test_an_undetermined_log_rank_is_nan_with_its_named_warning():
    haep = [make_run(30.0 + i, seed=i) for i in range(3)]  # never half of the rank
    noise = [make_run(40.0 + i, seed=i, arm="gaussian_noise") for i in range(3)]
    summary = pool([*haep, *noise])
    found = summary.contrast("nano", "gaussian_noise").half_recovery_test["rank_recovery_pct"]
    assert math.isnan(found.p_value)
    assert math.isnan(found.statistic)
    assert "rank undefined (3 and 3 checkpoints with a time)" in markdown(summary)
    assert (
        "nano, HAEP against Gaussian noise",
        "AllCensoredWarning: log-rank: every time is censored (rank_recovery_pct)",
    ) in summary.notes
    assert any("AllCensoredWarning: log-rank" in note for _, note in all_notes(summary))
    assert CAUSES["AllCensoredWarning"] in markdown(summary)
    undefined = [make_run(math.nan, seed=i, arm="gaussian_noise") for i in range(3)]
    notes = [note for _, note in pool([*haep, *undefined]).notes]
    assert any("TooFewCheckpointsWarning: log-rank: groups of 3 and 0 units" in n for n in notes)


def test_arms_healed_for_different_budgets_are_not_compared():
    haep = [make_run(30.0 + i, seed=i) for i in range(3)]
    noise = [make_run(40.0 + i, seed=i, arm="gaussian_noise") for i in range(3)]
    longer = [replace(r, steps=(0, 10, 40)) for r in noise]
    (line,) = comparison_gaps(pool([*haep, *longer]))
    assert line.endswith("not compared (secondary): they were healed for 20 and 40 steps.")
    tokens = [replace(r, tokens_per_step=512) for r in noise]
    wider = [replace(r, tokens_per_step=1024) for r in haep]
    (line,) = comparison_gaps(pool([*wider, *tokens]))
    assert line.endswith("their healing steps have 1024 and 512 tokens.")
    assert comparison_gaps(pool([*haep, *tokens])) == []
    # A run that could not be trained ends early, which is no other budget.
    stalled = [replace(r, steps=(0, 10, 11), status="lockout") for r in noise]
    assert comparison_gaps(pool([*haep, *stalled])) == []


def test_bootstrap_stands_beside_the_t_interval_only_where_there_is_one():
    runs = [make_run(10.0 + i * i, seed=i) for i in range(10)]
    (few,), (many,) = group_rows(pool(runs[:9])), group_rows(pool(runs))
    assert "rank_recovery_bca_low_pct" not in few
    theirs = scipy_stats.bootstrap(
        ([10.0 + i * i for i in range(10)],), np.mean, method="BCa", n_resamples=20_000,
        rng=np.random.default_rng(9),
    ).confidence_interval  # fmt: skip
    # The resamples differ: Monte Carlo error of the bounds under 1 point.
    assert many["rank_recovery_bca_low_pct"] == pytest.approx(theirs.low, abs=1.0)
    assert many["rank_recovery_bca_high_pct"] == pytest.approx(theirs.high, abs=1.0)
    assert "Bootstrap beside the t interval" in markdown(pool(runs))
    assert "Bootstrap beside" not in markdown(pool(runs[:9]))
    undefined = [*runs[:9], make_run(math.nan, seed=9)]
    text = markdown(pool(undefined))
    assert "| nano | HAEP | loss | 10 |" in text
    bootstrap = text.split("## Bootstrap beside the t interval")[1].split("##")[0]
    assert "| rank |" not in bootstrap


def test_half_recovery_is_given_in_tokens_where_a_run_knows_them():
    runs = [make_run(80.0 + i, seed=i, tokens_per_step=1024) for i in range(3)]
    summary = pool(runs)
    (group,), (row,) = summary.groups, group_rows(summary)
    steps = group.half_recovery["rank_recovery_pct"]
    tokens = group.half_recovery_tokens["rank_recovery_pct"]
    assert (tokens.point, tokens.low) == (1024 * steps.point, 1024 * steps.low)
    assert tokens.high == steps.high == math.inf
    assert row["half_rank_recovery_tokens"] == 1024 * row["half_rank_recovery_steps"]
    assert f"({1024 * steps.point:,.0f} [" in markdown(summary)
    stored = as_json(summary)["groups"][0]
    half = stored["half_times"]["rank_recovery_pct"]
    assert half["tokens"] == [1024 * t for t in half["step"]]
    mean = scipy_stats.gmean(half["step"])
    assert half["geometric_mean_tokens"]["point"] == pytest.approx(1024 * mean)
    unknown = pool([*runs[:2], replace(runs[2], tokens_per_step=0)])
    assert unknown.groups[0].half_recovery_tokens == {}
    assert "half_rank_recovery_tokens" not in group_rows(unknown)[0]
    assert "| unknown |" in markdown(unknown)
    assert as_json(unknown)["groups"][0]["tokens_per_step"] is None


def test_a_repeated_run_counts_once_and_is_named():
    runs = [make_run(10.0 + i, seed=i, fingerprint=f"f{i}") for i in range(3)]
    old = replace(runs[0], run_id="old")
    summary = pool([old, *runs])
    assert summary.groups[0].n_runs == 3
    assert plain(as_json(summary)["groups"]) == plain(as_json(pool(runs))["groups"])
    (repeat,) = summary.repeats
    assert (repeat.run.run_id, repeat.kept.run_id) == ("old", "haep0")
    assert repeat.why == "repeats nano haep 0 (haep0), which is counted; same final numbers"
    text = markdown(summary)
    assert "## Repeated runs (1)" in text
    assert "- nano haep 0 (old): repeats nano haep 0 (haep0)" in text
    assert as_json(summary)["repeats"][0]["counted_run_id"] == "haep0"
    # Without a fingerprint nothing is known, and a failed repeat replaces nothing.
    assert not pool([replace(r, fingerprint="") for r in (old, *runs)]).repeats
    late = HealRun("late", "x", finished=False, fingerprint="f0", failure="gone")
    assert pool([*runs, late]).groups[0].n_runs == 3


def test_a_repeat_with_other_numbers_is_news():
    run = make_run(10.0, fingerprint="f")
    other = replace(run, run_id="b", final={**run.final, "rank_recovery_pct": 12.5})
    (repeat,) = pool([other, run]).repeats
    assert "their final numbers differ by up to 2.5 points" in repeat.why
    undefined = replace(run, run_id="b", final={**run.final, "rank_recovery_pct": math.nan})
    (repeat,) = pool([undefined, run]).repeats
    assert "only one of the two has a defined recovery: not reproducible" in repeat.why


def test_a_running_run_is_not_called_failed():
    heard = "last heard of at 2026-11-28 05:00:00 UTC"
    running = HealRun("r", "slow one", finished=False, running=True, heard=heard)
    summary = pool([make_run(10.0), running])
    assert (summary.failed, summary.running) == ((), (running,))
    text = markdown(summary)
    assert "Failed runs" not in text
    assert "## Still running (1)" in text
    assert f"- slow one (r): {heard}" in text
    assert "killed so hard" in text
    assert as_json(summary)["running"] == [{"run_id": "r", "name": "slow one", "why": heard}]
    assert heard in render(summary, {})


def test_one_undefined_replicate_leaves_its_checkpoint_in_the_fits():
    steps = tuple(range(0, 101, 10))

    def curve(limit: float) -> tuple[float, ...]:
        return tuple(limit * -math.expm1(-t / 15.0) for t in steps)

    def path(values):
        return {
            "steps": steps,
            "trajectory": {"rank_recovery_pct": values, "loss_recovery_pct": curve(90.0)},
            "final": {"rank_recovery_pct": values[-1], "loss_recovery_pct": 90.0},
        }

    runs = [make_run(1.0, seed=i, **path(curve(40.0 + i))) for i in range(3)]
    # Defined in the collapsed state, where recovery is 0 by definition, and nowhere else.
    broken = (0.0, *(math.nan for _ in steps[1:]))
    twin = make_run(math.nan, seed=0, run_id="twin", **path(broken))
    (alone,), (group,) = pool(runs).groups, pool([*runs, twin]).groups
    fitted = group.asymptotes["rank_recovery_pct"]
    assert fitted.n_checkpoints == 3
    assert fitted.asymptote == alone.asymptotes["rank_recovery_pct"].asymptote
    assert group.half_recovery == alone.half_recovery
    assert group.bands["rank_recovery_pct"] == alone.bands["rank_recovery_pct"]


def test_n_is_the_n_of_the_interval_and_undefined_checkpoints_stand_beside_it():
    summary = pool([make_run(v, seed=i) for i, v in enumerate([10.0, 14.0, 12.0, math.nan])])
    (group,), (row,) = summary.groups, group_rows(summary)
    assert group.intervals["rank_recovery_pct"].n == row["rank_recovery_n"] == 3
    assert group.undefined_checkpoints("rank_recovery_pct") == 1
    assert (row["rank_recovery_undefined_checkpoints"], row["loss_recovery_n"]) == (1, 4)
    assert "(n = 3, 1 undefined)" in text_table(summary)
    assert "n = 3, 1 checkpoint undefined" in markdown(summary).replace("\u00a0", " ")


@pytest.mark.filterwarnings("ignore")
def test_no_run_is_compared_with_every_other(monkeypatch):
    """A run has hundreds of numbers: comparing each with each is most of the time of 10,000."""
    compared: list[str] = []

    def noted(self: HealRun, other: object) -> bool:
        compared.append(self.run_id)
        return self is other

    monkeypatch.setattr(HealRun, "__eq__", noted)
    arms = ("haep", "random_tokens", "gaussian_noise")
    runs = [run for arm in arms for run in nested([(20.0 + c,) * 2 for c in range(8)], arm=arm)]
    summary = pool([*runs, make_run(math.nan, seed=9, run_id="undefined")])
    assert [group.n_runs for group in summary.groups] == [16, 17, 16]
    assert summary.contrasts
    assert len(compared) < 2 * len(runs)
