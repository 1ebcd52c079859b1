"""Whatever stands in files of records, stored runs and healers: read right, or listed with why."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
import shutil
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest

from healing.config.heal import HealConfig
from healing.errors import ConfigError, TrackingError
from healing.predecessor.import_stage import describe, read_all, tags_of
from healing.predecessor.summarize_stage import read_results
from healing.predecessor.summary import summarize_legacy
from healing.reporting import markdown, plain_data, tables
from healing.stages.summarize_inputs import from_artifact, read_runs
from healing.stages.tuning.healer_files import find_healer
from healing.statistics.heal_runs import ENDPOINTS
from healing.statistics.summary import summarize_runs
from healing.tracking import queries
from healing.tracking.queries import RunView
from healing.tracking.run_files import read_jsonl
from tests.hostile.examples import tried
from tests.legacy_folders import attack_rows, heal_rows, healing_summary, write_run

DEEP = "[" * 100_000
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([1e308, -1e308, 10**30, -1, 2.5, 1e400, 0, 1])
)
LEAVES = st.one_of(
    st.none(), st.booleans(), NUMBERS, st.text(max_size=10),
    st.sampled_from(["NaN", "Infinity", "abc", "1" * 5000, "\x1b[2J", "=1+1", "../..", "1e400"]),
)  # fmt: skip
JSON_VALUES = st.recursive(
    LEAVES,
    lambda below: st.one_of(
        st.lists(below, max_size=4), st.dictionaries(st.text(max_size=6), below, max_size=4)
    ),
    max_leaves=10,
)
LINES = st.one_of(
    JSON_VALUES.map(json.dumps),
    st.text(max_size=30),
    st.sampled_from(
        [DEEP, '{"step": ' + "1" * 5000 + "}", '{"step": 1e400}', '{"a":' * 2000, "\ufeff{}", ""]
    ),
    st.dictionaries(st.sampled_from(["step", "timestamp", *ENDPOINTS]), LEAVES, max_size=4).map(
        json.dumps
    ),
)


class OneFile:
    """A store in which every run has this file."""

    has_history = False

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
        return self.path


TAGS = {
    "stage": "heal", "model": "nano", "arm": "haep", "settings": "s", "checkpoint_id": "c",
    "attack_seed": "0", "status": "ok", "spectral_state": "collapsed", "fingerprint": "f",
}  # fmt: skip


def view(number: int = 0, **changes: Any) -> RunView:
    own = {"fingerprint": f"f{number}", "checkpoint_id": f"c{number}", "attack_seed": f"{number}"}
    parts = {"params": {"n_params": "300000"}, "tags": {**TAGS, **own}, "metrics": {}} | changes
    return RunView(f"id{number}", f"run {number}", "FINISHED", "0", **parts)


def check_lines(place: pathlib.Path, lines: list[str]) -> None:
    path = place / "metrics.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    before = path.read_bytes()
    try:
        found = read_jsonl(path)
        assert all(isinstance(row, dict) for row in found)
        assert len(found) == sum(bool(line.strip()) for line in "\n".join(lines).split("\n"))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017
    try:
        trajectory = from_artifact(view(), OneFile(path))
        assert trajectory.steps[0] == 0
        assert all(type(step) is int for step in trajectory.steps)
    except TrackingError as error:
        assert "metrics.jsonl of run 0" in str(error)  # noqa: PT017
    assert path.read_bytes() == before


test_lines_of_records, test_lines_of_records_many = tried(
    st.lists(LINES, max_size=4), check_lines, 350
)


def good_rows(scale: float) -> list[dict[str, Any]]:
    return [{"step": s, **dict.fromkeys(ENDPOINTS, scale * s)} for s in (0, 10, 20)]


def write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("changes", "rows", "why"),
    [
        ({"params": {"n_params": "abc"}}, None, "n_params is 'abc'"),
        ({"params": {"n_params": "1" * 5000}}, None, "n_params is '1"),
        ({"params": {"n_params": "-3"}}, None, "n_params is '-3'"),
        ({"params": {"n_params": "0"}}, None, "n_params is 0"),
        ({"params": {}}, None, "lacks the tag or parameter 'n_params'"),
        ({"tags": {**TAGS, "status": "fine"}}, None, "unknown status 'fine'"),
        ({"tags": {**TAGS, "spectral_state": "?"}}, None, "spectral state '?'"),
        ({"tags": {**TAGS, "healers_tried": "many"}}, None, "healers_tried is 'many'"),
        ({"tags": {**TAGS, "model": "m" * 5000}}, None, "its model has more than 1000"),
        ({}, [{"step": 0}, {"step": 1e400}], "step inf is not a whole number"),
        ({}, [{"step": 0}, {"step": 2.5}], r"step 2\.5 is not a whole number"),
        ({}, [{"step": 0}, {"step": True}], "step True is not a whole number"),
        ({}, [{"step": 0}, {"step": "NaN"}], "step nan is not a whole number"),
        ({}, [{"step": 0}, {"step": 20}, {"step": 10}], "its steps do not ascend"),
        ({}, [{"step": 0}, {"step": 10}, {"step": 10}], "its steps do not ascend"),
        ({}, [{"step": 0}, {"step": 10**15}], "its steps are not within"),
        ({}, [{"step": 5}], "does not begin with step 0"),
        ({}, [{"step": 0, "rank_recovery_pct": "Infinity"}], "rank_recovery_pct is infinite or"),
        ({}, [{"step": 0, "loss_recovery_pct": 1.7e308}], "loss_recovery_pct is infinite or"),
        ({}, [{"step": 0, "rank_recovery_pct": [1]}], "malformed: TypeError"),
        ({}, [{"step": 0, "rank_recovery_pct": 10**400}], "malformed: OverflowError"),
    ],
)  # fmt: skip
def test_an_odd_run_is_failed_and_the_others_count(tmp_path, changes, rows, why):
    class Files(OneFile):
        def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
            return tmp_path / uri.split("/")[1]

    for number in range(3):
        write_rows(tmp_path / f"id{number}", good_rows(1 + number))
    write_rows(tmp_path / "id9", rows or good_rows(1))
    runs = read_runs([view(0), view(9, **changes), view(1), view(2)], store=Files(tmp_path))
    assert [run.finished for run in runs] == [True, False, True, True]
    assert re.search(why, runs[1].failure), runs[1].failure
    summary = summarize_runs(runs, 0.95, np.random.default_rng(0))
    assert [run.run_id for run in summary.failed] == ["id9"]
    # The mean of 20, 40 and 60 %.
    assert summary.groups[0].intervals["rank_recovery_pct"].point == pytest.approx(40.0)


def test_an_overflowing_perplexity_is_no_fault_of_the_run(tmp_path):
    rows = good_rows(1)
    rows[-1]["ppl_improvement_pct"] = -1e200
    write_rows(tmp_path / "m", rows)
    (run,) = read_runs([view()], store=OneFile(tmp_path / "m"))
    assert run.finished
    assert math.isnan(run.final["ppl_improvement_pct"])
    assert run.final["rank_recovery_pct"] == 20.0


TAG_NAMES = [*TAGS, "arm_role", "arm_label", "healers_tried", "rank_undefined_reason",
             "noise_match", "sham_run_id", "reference_checkpoint_id"]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=10),
    st.sampled_from(["ok", "diverged", "lockout", "nonfinite_steps", "inflated", "unchanged",
                     "undefined", "none", "treatment", "damage_control", "sham", "yardstick",
                     "1" * 5000, "a\x1b[2J", "=cmd()", "haep", "gaussian_noise", "rank"]),
)  # fmt: skip
METRIC_NAMES = [
    "summary/rank_recovery_error", "summary/rank_reduction_pct", "summary/collapsed_loss",
    "summary/final_loss", "summary/weight_change", "tokens", "summary/steps",
    "panel/last_block_recovery_pct", "panel/stable_rank_recovery_pct",
]  # fmt: skip
ODD_RUNS = st.tuples(
    st.dictionaries(st.sampled_from(TAG_NAMES), TEXTS, max_size=2),
    st.dictionaries(
        st.sampled_from(["n_params", "heal.batch_size", "heal.sequence_length", "heal.healing_lr",
                         "heal.healing_optimizer"]), TEXTS, max_size=2),
    st.dictionaries(
        st.sampled_from(METRIC_NAMES),
        st.one_of(st.floats(), st.sampled_from([1e308, -1e308, 1e40, 0.0])), max_size=3),
    st.lists(
        st.fixed_dictionaries(
            {"step": st.one_of(st.integers(0, 30), NUMBERS)},
            optional={e: st.one_of(NUMBERS, st.floats(-200, 200)) for e in ENDPOINTS}),
        max_size=4),
    st.booleans(),
)  # fmt: skip


def odd_view(place: pathlib.Path, number: int, drawn: Any) -> RunView:
    tags, params, metrics, rows, whole = drawn
    path = place / f"id{number}"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text if not whole else "".join(json.dumps(r) + "\n" for r in good_rows(1)))
    own = view(number)
    return view(number, tags={**own.tags, **tags}, params={**own.params, **params}, metrics=metrics)


class Folder(OneFile):
    """A store whose runs have one file each."""

    def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
        return self.path / uri.split("/")[1]


def check_runs(place: pathlib.Path, drawn: list[Any]) -> None:
    """Reading, pooling and writing never fail, and lose no good run."""
    for number in (0, 1):
        write_rows(place / f"id{number}", good_rows(1 + number))
    views = [view(0), view(1), *(odd_view(place, 2 + i, d) for i, d in enumerate(drawn))]
    runs = read_runs(views, store=Folder(place))
    assert [run.run_id for run in runs] == [v.run_id for v in views]
    assert runs[0].finished
    assert runs[1].finished
    assert all(run.finished or run.failure for run in runs)


test_odd_stored_runs, test_odd_stored_runs_many = tried(
    st.lists(ODD_RUNS, min_size=1, max_size=3), check_runs, 300
)


def check_summaries(place: pathlib.Path, drawn: list[Any]) -> None:
    for number in (0, 1):
        write_rows(place / f"id{number}", good_rows(1 + number))
    views = [view(0), view(1), *(odd_view(place, 2 + i, d) for i, d in enumerate(drawn))]
    summary = summarize_runs(read_runs(views, store=Folder(place)), 0.95, np.random.default_rng(0))
    counted = sum(group.n_runs for group in summary.groups) + len(summary.repeats)
    assert counted + len(summary.failed) == len(views)
    tables.text_table(summary)
    markdown.markdown(summary)
    plain_data.as_json(summary)
    plain_data.group_rows(summary)


test_summaries_of_odd_runs, test_summaries_of_odd_runs_many = tried(
    st.lists(ODD_RUNS, min_size=1, max_size=2), check_summaries, 60
)


def check_recorded(place: pathlib.Path, drawn: Any) -> None:
    """One recorded run beside a good one, which is always read."""
    rows, summary, config, lines, heals = drawn
    root = place / "recorded"
    shutil.rmtree(root, ignore_errors=True)
    write_run(root / "p" / "good", attack_rows())
    original = heal_rows(5) if heals else attack_rows(second=5)
    mixed = [{**row, **change} for row, change in zip(original, rows, strict=False)]
    bad = write_run(
        root / "p" / "bad", mixed + original[len(mixed) :],
        {"model": {"name": "pythia-70m"}, **config},
        {**healing_summary(), **summary} if heals else None,
    )  # fmt: skip
    with (bad / "metrics.jsonl").open("a", encoding="utf-8", errors="surrogatepass") as stream:
        stream.write("".join(f"{line}\n" for line in lines))
    before = (bad / "metrics.jsonl").read_bytes()
    runs, skipped = read_all(root)
    assert len(runs) + len(skipped) == 2
    assert "good" in {run.folder.name for run in runs}
    for run in runs:
        tags_of(run), describe(run)
    assert (bad / "metrics.jsonl").read_bytes() == before


ROWS = st.dictionaries(
    st.sampled_from(
        ["step", "timestamp", "baseline_effective_rank", "post_attack_effective_rank",
         "baseline_perplexity", "baseline_singular_values", "post_attack_singular_values",
         "treatment_effective_rank", "é<>!", "healing_effective_rank"]),
    st.one_of(JSON_VALUES, st.lists(NUMBERS, max_size=3)), max_size=3,
)  # fmt: skip

test_recorded_runs, test_recorded_runs_many = tried(
    st.tuples(
        st.lists(ROWS, max_size=4),
        st.dictionaries(st.sampled_from(list(healing_summary())), LEAVES, max_size=2),
        st.dictionaries(st.sampled_from(["model", "attack", "x"]), JSON_VALUES, max_size=2),
        st.lists(LINES, max_size=1),
        st.booleans(),
    ),
    check_recorded,
    250,
)


def test_numbers_that_cannot_be_computed_with_skip_their_run_alone(tmp_path):
    """A recorded rank of 0, by which the computed one is divided."""
    write_run(tmp_path / "p" / "good", attack_rows())
    rows = heal_rows(5)
    rows[0] |= {"baseline_singular_values": [1.0], "baseline_effective_rank": 0.0}
    write_run(tmp_path / "p" / "bad", rows, summary=healing_summary())
    runs, (line,) = read_all(tmp_path)
    assert [run.folder.name for run in runs] == ["good"]
    assert "bad: its numbers cannot be computed with (float division by zero)" in line


def check_healer(place: pathlib.Path, entries: Any) -> None:
    path = place / "healer.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    try:
        found = find_healer(str(path), OneFile(path))
        assert found.steps >= 0
        assert len(found.digest) == 16
        found.tags(), found.applied(HealConfig())
    except ConfigError as error:
        assert "--healer" in str(error)  # noqa: PT017


HEALER = json.loads(
    (pathlib.Path(__file__).parents[2] / "healing/config/healers/nano.json").read_text()
)
test_healers, test_healers_many = tried(
    st.one_of(
        st.dictionaries(st.sampled_from([*HEALER, "x"]), JSON_VALUES, max_size=3).map(
            lambda changes: {**HEALER, **changes}
        ),
        st.sampled_from([DEEP, "[]", "3", "null", "{", '{"a": ' + "1" * 5000 + "}"]),
    ),
    check_healer,
    150,
)


def legacy_view(number: int = 0, **metrics: float) -> RunView:
    tags = {"kind": "attack", "model": "70m", "arm": "haep", "optimizer": "adamw",
            "precision": "fp16", "results_digest": f"d{number}"}  # fmt: skip
    ranks = {"healthy_rank": 2.0, "collapsed_rank": 1.0, "rank_change_pct": -50.0}
    own = {f"legacy/{name}": value for name, value in {**ranks, **metrics}.items()}
    return RunView(f"id{number}", f"run {number}", "FINISHED", "0", {}, tags, own)


@pytest.mark.parametrize(
    ("odd", "why"),
    [
        (legacy_view(1, healthy_rank=math.inf), "infinite or beyond"),
        (legacy_view(1, rank_change_pct=1e300), "infinite or beyond"),
        (legacy_view(1, collapsed_rank=math.nan), "are missing"),
        (dataclasses.replace(legacy_view(1), tags={}), "lacks the tag or metric 'kind'"),
        (dataclasses.replace(legacy_view(1), metrics={}), "'legacy/healthy_rank'"),
    ],
)
def test_an_odd_imported_run_is_told_of_and_the_others_count(odd, why):
    notes: list[str] = []
    views = [legacy_view(0), odd, legacy_view(2)]
    results = read_results(views, notes.append)
    assert [r.run_id for r in results] == ["id0", "id2"]
    assert len(notes) == 1
    assert why in notes[0]
    assert summarize_legacy(results, 0.95).groups[0].n_distinct == 2


def test_a_link_out_of_the_imported_folder_is_not_followed(tmp_path):
    root = tmp_path / "in"
    write_run(root / "p" / "good", attack_rows())
    bad = write_run(root / "p" / "bad", attack_rows(second=5))
    secret = tmp_path / "secret.jsonl"
    (bad / "metrics.jsonl").rename(secret)
    (bad / "metrics.jsonl").symlink_to(secret)
    runs, (line,) = read_all(root)
    assert [run.folder.name for run in runs] == ["good"]
    assert "a link that leads out of" in line


@pytest.mark.parametrize(
    "name", ["é<>!", "a" * 251, "../x", "/x", "a//b", "", "a/../b", "x\ny", "."]
)
def test_names_that_no_store_takes_are_known_before(name):
    """MLflow's own rule decides: both of its checks, for metrics and for parameters."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_metric, _validate_param

    with pytest.raises(MlflowException):
        _validate_metric(name, 1.0, 0, 0)
    with pytest.raises(MlflowException):
        _validate_param(name, "1")
    assert queries.refused_by_stores([name], {})
    assert queries.refused_by_stores([], {name: 1})


def test_what_stores_take_is_let_through():
    assert not queries.refused_by_stores(["legacy/a b.c-d:é", "x_1"], {"a.b": "y" * 6000})
    assert "of more than" in queries.refused_by_stores([], {"a.b": "y" * 6001})
