"""The predecessor's files: formulas by hand, their own tables as oracle, every malformed line."""

from __future__ import annotations

import csv
import datetime
import json
import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from healing.predecessor import records as legacy
from healing.predecessor.records import (
    LegacyError,
    find_folders,
    legacy_effective_rank,
    read_run,
    rederive,
)
from healing.predecessor.summary import (
    LegacyResult,
    distinct,
    group_rows,
    healing_sentence,
    markdown,
    summarize_legacy,
    text,
)
from tests.conftest import SHARED_DATA
from tests.legacy_folders import (
    AFTER,
    BEFORE,
    CONFIG,
    attack_rows,
    heal_rows,
    healing_summary,
    write_run,
)

RECORDED = SHARED_DATA / "neuroentropy"
needs_records = pytest.mark.skipif(
    not RECORDED.is_dir(), reason=f"the predecessor's records are not at {RECORDED}"
)


def test_legacy_rank_drops_small_values_and_keeps_the_weights_of_the_rest():
    expected = math.exp(-(0.5 * math.log(0.5) + 0.3 * math.log(0.3)))
    assert legacy_effective_rank([0.5, 0.3, *[0.002] * 100]) == pytest.approx(expected, rel=1e-12)
    assert legacy_effective_rank([1.0] * 50) == pytest.approx(50.0)
    # 200 equal directions, each 0.005: all are dropped, and the "rank" of 200 dimensions is 1.
    assert legacy_effective_rank([1.0] * 200) == 1.0
    assert legacy_effective_rank([0.02, 0.01]) == legacy_effective_rank([2.0, 1.0])


def test_rederived_numbers_are_those_of_the_definitions():
    sigma = np.array([3.0, 2.0, 1.0, 0.001])
    found = rederive(sigma[::-1])
    energy = sigma**2
    assert found.effective_rank == pytest.approx(math.exp(scipy_stats.entropy(sigma)))
    assert found.participation_ratio == pytest.approx(energy.sum() ** 2 / (energy**2).sum())
    assert found.stable_rank == pytest.approx(energy.sum() / 9.0)
    assert found.spectral_gap == pytest.approx(9.0 / 4.0)
    assert rederive([2.0]).spectral_gap == math.inf


def test_threshold_can_turn_a_fall_into_a_rise(tmp_path):
    """What the predecessor's instrument does to the sign: weight moves from many small directions
    to a few large ones, and its rank rises."""
    before, after = [0.5, 0.1, *[0.004] * 100], [0.5, 0.1, *[0.1] * 2, *[0.004] * 50]
    run = read_run(write_run(tmp_path / "s" / "a_fp16", attack_rows(
        legacy_effective_rank(before), legacy_effective_rank(after), values=(before, after)
    )), tmp_path)  # fmt: skip
    assert run.rank_change_pct > 10.0
    assert run.rederived_change_pct < -10.0


def test_attack_run_is_read_whole(tmp_path):
    folder = write_run(tmp_path / "study" / "pythia_70m_run01_fp16", attack_rows())
    run = read_run(folder, tmp_path)
    assert (run.kind, run.model, run.arm, run.optimizer, run.precision) == (
        "attack", "70m", "haep", "adamw", "fp16",
    )  # fmt: skip
    assert run.name == "study/pythia_70m_run01_fp16"
    moment = datetime.datetime(2026, 1, 2, 3, 4, 0, 500_000, tzinfo=datetime.UTC)
    assert run.start_ms == moment.timestamp() * 1000
    assert run.end_ms == run.start_ms + 3000
    assert [p.step for p in run.points] == [0, 10, 100, 101]
    assert run.points[1].metrics == {"treatment_effective_rank": 2.2, "treatment_iteration": 10.0}
    assert run.points[2].metrics == {}
    assert run.params["attack.learning_rate"] == 1e-4
    assert run.rank_change_pct == pytest.approx(25.0)
    ratio = math.exp(scipy_stats.entropy(AFTER)) / math.exp(scipy_stats.entropy(BEFORE))
    assert run.rederived_change_pct == pytest.approx(100.0 * (ratio - 1.0))
    assert run.undefined_reason == ""


@pytest.mark.parametrize(
    ("prefix", "arm"),
    [("control_gaussian", "gaussian_noise"), ("control_random_text", "random_text")],
)
def test_arms_are_told_by_what_was_recorded(tmp_path, prefix, arm):
    folder = write_run(tmp_path / "s" / "x_fp16", attack_rows(prefix=prefix))
    assert read_run(folder, tmp_path).arm == arm


def test_optimizer_and_precision(tmp_path):
    quantized = {**CONFIG, "model": {**CONFIG["model"], "use_quantization": True}}
    first = read_run(write_run(tmp_path / "s" / "x_fp16_sgd", attack_rows()), tmp_path)
    other = read_run(write_run(tmp_path / "s" / "x_4bit", attack_rows(), quantized), tmp_path)
    assert (first.optimizer, first.precision) == ("sgd", "fp16")
    assert (other.optimizer, other.precision) == ("adamw", "4bit")


def test_same_numbers_at_another_time_are_the_same_results(tmp_path):
    one, two, other = (
        read_run(write_run(tmp_path / "s" / name, rows), tmp_path)
        for name, rows in (
            ("a", attack_rows()), ("b", attack_rows(second=9)), ("c", attack_rows(after=2.6))
        )
    )  # fmt: skip
    assert one.results == two.results
    assert one.fingerprint != two.fingerprint
    assert one.results != other.results


@pytest.mark.parametrize(
    ("original", "collapsed", "reason"),
    [
        (1.6, 1.7, "the attack raised the rank by 6.2 %"),
        (
            1.6,
            1.55,
            "the attack changed the effective rank by -0.05, below the detection threshold of 0.08",
        ),
        (1.6, 1.2, ""),
    ],
)
def test_healing_run_says_when_recovery_is_undefined(tmp_path, original, collapsed, reason):
    summary = healing_summary(original, collapsed, final=1.5)
    run = read_run(write_run(tmp_path / "p5" / "h", heal_rows(), summary=summary), tmp_path)
    assert run.kind == "heal"
    assert run.undefined_reason.startswith(reason)
    assert bool(run.undefined_reason) == bool(reason)
    expected = 100.0 * (1.5 - collapsed) / (original - collapsed)
    assert run.unclamped_recovery_pct == pytest.approx(expected)
    # 1e10 is what was written where no loss was computed.
    assert [p.metrics.get("healing_loss") for p in run.points] == [None, 11.0, 11.0]
    assert math.isnan(run.rederived_change_pct)


def broken(rows, number, **changes):
    return [{**row, **changes} if i == number else row for i, row in enumerate(rows, 1)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (broken(attack_rows(), 2, step=-1), r"metrics.jsonl:2: step -1 is not a whole number"),
        (broken(attack_rows(), 2, step=True), r"metrics.jsonl:2: step True is not a whole"),
        (broken(attack_rows(), 2, step=2**70), r"metrics.jsonl:2: step \d+ is not a whole"),
        (broken(attack_rows(), 3, timestamp="noon"), r"jsonl:3: timestamp 'noon' is not an ISO"),
        (broken(attack_rows(), 3, timestamp=5), r"jsonl:3: timestamp 5 is not an ISO"),
        (broken(attack_rows(), 3, timestamp="0001-01-01"), r"jsonl:3: .* before any recorded"),
        (broken(attack_rows(), 1, baseline_singular_values="x"), r"jsonl:1: baseline_singular"),
        (broken(attack_rows(), 1, baseline_singular_values=[]), r"jsonl:1: baseline_singular"),
        (broken(attack_rows(), 1, baseline_singular_values=[0, 0]), r"jsonl:1: baseline_singular"),
        (broken(attack_rows(), 4, post_attack_singular_values=[1.0, math.nan]), r"jsonl:4: post"),
        (broken(attack_rows(), 4, post_attack_singular_values=[1.0, -2.0]), r"jsonl:4: post_att"),
        (attack_rows()[:2], r"metrics.jsonl: no effective rank before and after the attack"),
        (broken(attack_rows(), 1, baseline_effective_rank=0), r"no effective rank before and"),
        (broken(attack_rows(), 2, control_gaussian_loss=1.0), r"of exactly one of .*; found 2"),
        ([attack_rows()[0], attack_rows()[3]], r"exactly one of treatment, .*; found 0"),
        (heal_rows(), r"no healing_summary.json, and metrics.jsonl is of a healing run"),
        ([], r"metrics.jsonl: empty"),
    ],
)
def test_malformed_metrics_are_named(tmp_path, rows, message):
    folder = write_run(tmp_path / "s" / "a_fp16", rows)
    with pytest.raises(LegacyError, match=message):
        read_run(folder, tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", '{"step": 0}\n{"step"', r"metrics.jsonl:1: timestamp None|jsonl:2: not"),
        ("metrics.jsonl", "\n\n[1, 2]\n", r"metrics.jsonl:3: a JSON object is needed, not list"),
        ("metrics.jsonl", '\n{"step": 1, "x"}\n', r"metrics.jsonl:2: not JSON"),
        ("config.json", '{\n  "model": {\n', r"config.json:3: not JSON"),
        ("config.json", '{"model": "nano"}', r"config.json: model.name is None, not a Pythia"),
        ("config.json", '{"model": {"name": "gpt2"}}', r"model.name is 'gpt2', not a Pythia"),
        ("healing_summary.json", "{}", r"healing_summary.json: original_rank is not a number"),
    ],
)
def test_malformed_files_are_named_with_their_line(tmp_path, name, content, message):
    folder = write_run(tmp_path / "s" / "a_fp16", attack_rows())
    (folder / name).write_text(content)
    with pytest.raises(LegacyError, match=message):
        read_run(folder, tmp_path)


def test_missing_and_unreadable_files(tmp_path):
    folder = write_run(tmp_path / "s" / "a_fp16", attack_rows())
    (folder / "metrics.jsonl").write_bytes(b"\xff\xfe{}")
    with pytest.raises(LegacyError, match=r"metrics.jsonl: not UTF-8 text \(byte 0\)"):
        read_run(folder, tmp_path)
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(LegacyError, match=r"a_fp16: no metrics.jsonl"):
        read_run(folder, tmp_path)


def test_file_that_cannot_be_opened(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "s" / "a_fp16", attack_rows())

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(folder), "read_bytes", refuse)
    with pytest.raises(LegacyError, match=r"config.json: cannot be read \(Permission denied\)"):
        read_run(folder, tmp_path)


def test_folders_are_found_by_their_files(tmp_path):
    write_run(tmp_path / "b" / "run", attack_rows())
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    assert find_folders(tmp_path) == [tmp_path / "a", tmp_path / "b" / "run"]
    with pytest.raises(LegacyError, match="is not a folder: name the predecessor's results"):
        find_folders(tmp_path / "none")
    with pytest.raises(LegacyError, match=r"below .*: nothing to import"):
        find_folders(tmp_path / "notes")


def result(change: float, number: int, **changes) -> LegacyResult:
    values = {
        "run_id": str(number), "name": f"s/run{number:02d}", "kind": "attack", "model": "70m",
        "arm": "haep", "optimizer": "adamw", "precision": "fp16", "results": str(number),
        "healthy_rank": 2.0, "collapsed_rank": 2.0 + change / 50, "change_pct": change,
        "rederived_change_pct": -change,
    }  # fmt: skip
    return LegacyResult(**(values | changes))


def test_signs_are_kept_and_repeats_count_once():
    changes = [4.0, -1.0, 6.0, 2.0]
    runs = [result(c, i) for i, c in enumerate(changes)]
    twin = result(4.0, 9, results="0")
    (group,) = summarize_legacy([*runs, twin], 0.9).groups
    assert (group.n_recorded, group.n_distinct, group.n_up, group.n_down) == (5, 4, 3, 1)
    assert group.absolute_pct == pytest.approx(3.25)
    low, high = scipy_stats.t.interval(0.9, 3, np.mean(changes), scipy_stats.sem(changes))
    assert (group.change.low, group.change.high) == pytest.approx((low, high))
    assert group.change.point == pytest.approx(2.75)
    assert (group.rederived.low, group.rederived.high) == pytest.approx((-high, -low))
    assert group.rederived_up == 1
    assert [r.run_id for r in distinct([*runs, twin])] == ["0", "1", "2", "3"]


def test_two_distinct_runs_have_no_interval():
    runs = [result(4.0, 0), result(2.0, 1), result(2.0, 2, results="1")]
    summary = summarize_legacy(runs, 0.95)
    assert not summary.groups[0].change.defined
    assert "3.0 [no interval]" in markdown(summary)


def test_groups_are_ordered_by_size_and_kept_apart():
    runs = [
        result(1.0, 0, model="1b"), result(1.0, 1, model="160m"), result(1.0, 2),
        result(1.0, 3, arm="gaussian_noise"), result(1.0, 4, precision="4bit"),
        result(1.0, 5, optimizer="sgd"), result(1.0, 6, model="9000b"),
    ]  # fmt: skip
    groups = summarize_legacy(runs, 0.95).groups
    assert [(g.model, g.arm, g.optimizer, g.precision) for g in groups] == [
        ("70m", "gaussian_noise", "adamw", "fp16"), ("70m", "haep", "adamw", "4bit"),
        ("70m", "haep", "adamw", "fp16"), ("70m", "haep", "sgd", "fp16"),
        ("160m", "haep", "adamw", "fp16"), ("1b", "haep", "adamw", "fp16"),
        ("9000b", "haep", "adamw", "fp16"),
    ]  # fmt: skip
    assert [row["model"] for row in group_rows(summarize_legacy(runs, 0.95))][-1] == "9000b"


def test_healing_sentence_counts_each_case():
    rose = result(3.0, 0, kind="heal", undefined_reason="the attack raised the rank by 3.0 %")
    small = result(-3.0, 1, kind="heal", undefined_reason="less than")
    defined = result(-30.0, 2, kind="heal", recovery_pct=12.0, published_recovery_pct=12.0)
    summary = summarize_legacy([rose, small, defined], 0.95)
    assert not summary.groups
    sentence = healing_sentence(summary)
    assert sentence.startswith("Of 3 healing runs the attack had raised the rank in 1: ")
    assert "in 1 the rank had fallen by less than can be told" in sentence
    assert sentence.endswith("in 1 it is defined.")
    assert "undefined: the attack raised the rank by 3.0 %" in text(summary)
    nothing = summarize_legacy([result(1.0, 0)], 0.95)
    assert healing_sentence(nothing) == "No healing run was recorded."


@needs_records
def test_bug_compatible_rank_is_the_recorded_one_in_every_run():
    runs = [read_run(f, RECORDED) for f in find_folders(RECORDED)]
    states = 0
    for run in runs:
        for state, prefix in legacy.STATES.items():
            if getattr(run, state):
                states += 1
                recorded = run.recorded(f"{prefix}_effective_rank")
                # float32 arithmetic there, float64 here.
                assert legacy_effective_rank(getattr(run, state)) == pytest.approx(
                    recorded, rel=1e-6
                )
    assert (len(runs), states) == (68, 130)


@needs_records
@pytest.mark.parametrize("model", ["70m", "160m", "410m", "1b"])
def test_changes_are_those_of_their_own_tables_with_the_sign_turned(model):
    study = RECORDED / "priority1_scaling_law"
    pattern = f"raw_data/aggregate_summary_pythia_{model}_pythia-{model}_fp16.csv"
    with (study / pattern).open() as stream:
        published = [float(row["rank_reduction_pct"]) for row in csv.DictReader(stream)]
    folders = sorted((study / "raw_data").glob(f"pythia_{model}_pythia-{model}_run*_fp16"))
    runs = [read_run(folder, RECORDED) for folder in folders]
    # The table of 1b lists the first three of ten runs.
    assert (len(runs), len(published)) == (10, 3 if model == "1b" else 10)
    signed = [-r.rank_change_pct for r in runs]
    assert signed[: len(published)] == pytest.approx(published, abs=0.0051)
    summaries = json.loads((study / "scaling_law_summary.json").read_text())
    (headline,) = [s for s in summaries if s["model_name"] == model]
    absolute = np.mean([abs(r.rank_change_pct) for r in runs])
    assert absolute == pytest.approx(headline["mean_rank_reduction_pct"], abs=0.0051)


@needs_records
def test_healing_started_from_the_first_three_attacks_on_1b():
    """Exactly equal perplexities, another effective rank: the two scripts measure differently."""
    heals = sorted((RECORDED / "priority5_healing" / "raw_data").glob("*run*"))
    for folder in heals:
        run = read_run(folder, RECORDED)
        number = folder.name.split("run")[1][:2]
        attack = read_run(
            RECORDED / f"priority1_scaling_law/raw_data/pythia_1b_pythia-1b_run{number}_fp16",
            RECORDED,
        )
        assert run.damage.collapsed.perplexity == attack.damage.collapsed.perplexity
        assert run.damage.healthy.perplexity == attack.damage.healthy.perplexity
        assert attack.damage.healthy.effective_rank == pytest.approx(2.5515, abs=1e-4)
        assert run.damage.healthy.effective_rank == pytest.approx(1.6299, abs=1e-4)
        assert run.undefined_reason
    assert len(heals) == 3
