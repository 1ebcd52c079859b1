"""What a sweep's run carries of its summary: numbers by group and size, the table, the figures."""

from __future__ import annotations

import math

import pytest
from mlflow.tracking import MlflowClient
from PIL import Image

from healing.config.sweep import SweepConfig
from healing.stages import sweep
from healing.stages.summarize import (
    MAIN_FIGURES,
    OVERVIEW,
    description,
    group_metrics,
    show_summary,
    write_summary,
)
from healing.tracking import open_runs
from tests.statistics.test_summary import make_run
from tests.summaries import pool


def two_sizes():
    small = [make_run(10.0 + i, seed=i, model="nano", n_params=1000) for i in range(4)]
    large = [make_run(50.0 + i, seed=i, model="micro", n_params=4000) for i in range(4)]
    return pool([*small, *large])


def test_means_by_group_are_bars_and_by_size_a_curve_over_parameters():
    points = group_metrics(two_sizes())
    by_step: dict[int, dict[str, float]] = {}
    for step, row in points:
        by_step.setdefault(step, {}).update(row)
    assert by_step.keys() == {0, 1000, 4000}
    assert by_step[0]["group/nano-haep/rank_recovery_pct_mean"] == pytest.approx(11.5)
    assert by_step[0]["group/micro-haep/checkpoints"] == 4
    sizes = [by_step[n]["size/haep/rank_recovery_pct_mean"] for n in (1000, 4000)]
    assert sizes == pytest.approx([11.5, 51.5])
    # Student's t over four values one apart: 3.182 · sqrt(5/3)/2.
    half = 3.182446 * math.sqrt(5 / 3) / 2
    assert by_step[1000]["size/haep/rank_recovery_pct_low"] <= 11.5 - half + 1e-4


def test_names_of_a_group_do_not_depend_on_the_other_groups():
    alone = pool([make_run(10.0 + i, seed=i, model="nano", n_params=1000) for i in range(4)])
    names, more = ({n for _, row in group_metrics(s) for n in row} for s in (alone, two_sizes()))
    assert names < more


def test_several_settings_of_a_size_are_on_no_curve():
    twins = pool([make_run(1.0, seed=i, settings=f"s{i}", n_params=1000) for i in range(2)])
    assert [step for step, _ in group_metrics(twins)] == [0, 0]


def test_a_run_holds_the_table_and_the_figures(store):
    summary = two_sizes()
    write_summary(store / "s", summary)
    with open_runs.start("sweep", {"stage": "main"}) as run:
        show_summary(run, summary, store / "s")
    client = MlflowClient()
    found = {a.path for a in client.list_artifacts(run.run_id, "figures")}
    assert found == {f"figures/{name}.png" for name in MAIN_FIGURES}
    assert OVERVIEW in {a.path for a in client.list_artifacts(run.run_id)}
    with Image.open(store / "s" / OVERVIEW) as picture:
        assert picture.width == 690
    table = client.load_table(run.experiment_id, "summary_table.json", [run.run_id])
    assert list(table["model"]) == ["nano", "micro"]
    assert len(table.columns) == 7
    history = client.get_metric_history(run.run_id, "size/haep/rank_recovery_pct_mean")
    assert [m.step for m in history] == [1000, 4000]


def test_a_described_summary_begins_with_what_came_out_and_its_figure_and_fits(store):
    long = pool([make_run(v, seed=i, settings=f"{i}") for i, v in enumerate([10.0, 50.0] * 20)])
    with open_runs.start("summary", {}) as run:
        run.describe(description(long, run.run_id))
    note = client_note(run.run_id)
    first, *others = note.split("\n\n")
    assert first.startswith("**nano, HAEP")
    assert first.endswith(" rank recovery 10.0 [no interval] %.")
    assert others[2] == "37 more groups below."
    assert others[3].startswith("![mean recovery](get-artifact?path=overview.png&run_uuid=")
    assert note.count("The rest is in") == 1
    assert len(note) <= 8000


def test_a_sweeps_page_begins_with_what_came_out():
    runs = [make_run(v, seed=i) for i, v in enumerate([90.0, 91.0, 92.0])]
    config = SweepConfig(models="nano", arms="haep", seeds="0-2")
    page = sweep._describe(config, pool(runs), [], "a" * 32, "b" * 32)
    first, figure, rest = page.split("\n\n", 2)
    # Student t with two degrees of freedom: 91 ± 4.303 / √3.
    assert first.startswith("**nano, HAEP**: 3 of 3 checkpoints over 70 %")
    assert first.endswith("; rank recovery 91.0 [88.5, 93.5] %.")
    assert figure.startswith("![mean recovery by arm")
    assert rest.startswith("Models nano; arms haep; seeds 0-2. 0 cells.")


def client_note(run_id: str) -> str:
    return MlflowClient().get_run(run_id).data.tags["mlflow.note.content"]
