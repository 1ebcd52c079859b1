"""What MLflow's pages show in a real browser: runs on the first page, curves in every view."""

from __future__ import annotations

import math
import os
import pathlib
import time
from typing import Any

import pytest

from healing.measurements.recovery import verdict_of
from healing.registry import ARMS as INSTALLED
from healing.tracking.ui import experiment_page
from healing.tracking.ui.views import ATTACKS, RECOVERY, RUNS, SIZES, TABLE, View
from tests.ui.conftest import ARMS, MODELS, SEEDS, Constructed

pytestmark = [pytest.mark.ui, pytest.mark.slow]

CARD = "[data-testid=experiment-view-compare-runs-card]"
READ = """() => [...document.querySelectorAll('.js-plotly-plot')].filter(p => p.data).map(plot => {
  const card = plot.closest('[data-testid=experiment-view-compare-runs-card]');
  const box = plot.getBoundingClientRect();
  return {
    title: card ? card.innerText.split('\\n')[0] : '',
    top: box.top, bottom: box.bottom, width: box.width,
    scale: plot.layout.yaxis ? plot.layout.yaxis.type : '',
    bands: plot.data.filter(d => d.fill).length,
    curves: plot.data.filter(d => d.mode == 'lines+markers')
      .map(d => ({name: d.name, colour: d.marker.color || d.line.color, x: [...d.x], y: [...d.y]})),
    points: plot.data.filter(d => d.mode == 'markers').map(d => ({x: [...d.x], y: [...d.y]})),
  };
})"""
"""Every chart that is drawn: where it is, and the data that Plotly draws."""
INK = """(selector) => {
  const lines = [...document.querySelectorAll(selector + ' .scatterlayer path.js-line')];
  return lines.filter(line => line.getBoundingClientRect().width > 50).length;
}"""


def show(page: Any, served: Constructed, view: View) -> None:
    page.goto(served.open(experiment_page.view_link(served.experiment_id, view)))
    page.wait_for_selector(".ag-row")


def charts(page: Any, *titles: str) -> dict[str, dict[str, Any]]:
    """Title → chart with data, of all of these titles; scrolls down, since MLflow draws only what
    is seen.
    """
    found: dict[str, dict[str, Any]] = {}
    end = time.monotonic() + 30
    while missing := set(titles) - found.keys():
        drawn = [c for c in page.evaluate(READ) if c["curves"] or c["points"]]
        found |= {c["title"]: c for c in drawn if c["title"] in missing}
        assert time.monotonic() < end, f"not drawn: {missing}"
        if len(found) < len(titles):
            page.wait_for_timeout(250)
            if drawn:
                page.mouse.move(1000, 600)
                page.mouse.wheel(0, 100)
    return found


def picture(page: Any, name: str) -> None:
    """A screenshot, where the environment asks for them (UI_SCREENSHOTS=folder)."""
    if folder := os.environ.get("UI_SCREENSHOTS"):
        pathlib.Path(folder).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=pathlib.Path(folder) / f"{name}.png")


def test_the_first_page_shows_runs_and_the_endpoint(page, served):
    """What a command prints last, in a browser that never saw MLflow."""
    show(page, served, RECOVERY)
    page.get_by_text(f"{len(served.run_ids)} matching runs").wait_for()
    found = charts(page, "rank_recovery_pct", "loss_recovery_pct")
    picture(page, "recovery")
    rank = found["rank_recovery_pct"]
    assert rank["bands"] >= len(MODELS) * (len(ARMS) - 1)
    assert 0 < rank["top"] < rank["bottom"] < 900  # the first screen, not scrolled
    assert rank["width"] > 350  # two columns beside the table
    assert page.evaluate(INK, CARD) >= 2 * (len(ARMS) - 1)  # drawn, not only known
    assert "workflowType=machine_learning" in page.url
    assert page.get_by_text("Latency").count() == 0  # what the other mode shows


def test_recovery_draws_the_mean_of_every_group(page, served):
    show(page, served, RECOVERY)
    drawn = charts(page, "rank_recovery_pct", "loss_recovery_pct")["rank_recovery_pct"]
    curves = [c for c in drawn["curves"] if not math.isnan(c["y"][-1])]
    # Closed form: the mean of 90 + 2·seed over two seeds is 91, and ten less for micro.
    ends = sorted(round(c["y"][-1], 6) for c in curves if c["x"][-1] == 60)
    means = [end + SEEDS - 1 for arm, end in ARMS.items() if arm != "none"]
    assert ends == sorted([*means, *(mean - 10 for mean in means)])
    assert len({c["colour"] for c in curves}) == len(curves)
    below = charts(page, "effective_rank", "perplexity", "spectral_gap")
    assert (below["perplexity"]["scale"], below["spectral_gap"]["scale"]) == ("log", "log")
    assert below["effective_rank"]["scale"] == "linear"


def test_single_runs_are_drawn_in_their_arms_colour(page, served):
    show(page, served, RUNS)
    drawn = charts(page, "rank_recovery_pct")["rank_recovery_pct"]
    expected = {arm: str(INSTALLED.facts(arm).get("COLOUR", "")) for arm in ARMS if arm != "none"}
    found = {}
    for curve in drawn["curves"]:
        arm = curve["name"].split()[2]
        found.setdefault(arm, set()).add(curve["colour"][:7])
    assert found == {arm: {colour} for arm, colour in expected.items()}
    page.mouse.move(1000, 600)
    page.mouse.wheel(0, 500)
    axes = page.locator(f"{CARD} .parcoords .dimension")
    axes.nth(5).wait_for(state="attached")
    picture(page, "runs")
    assert axes.count() == 6


def test_sizes_compare(page, served):
    show(page, served, SIZES)
    found = charts(page, "n_params vs. rank_recovery_pct", "n_params vs. loss_recovery_pct")
    picture(page, "sizes")
    (points,) = found["n_params vs. rank_recovery_pct"]["points"]
    pairs = {(float(x), float(y)) for x, y in zip(points["x"], points["y"], strict=True)}
    assert pairs == {
        (float(size), ARMS[arm] + 2 * seed - (10 if model == "micro" else 0))
        for model, size in MODELS.items()
        for arm in ARMS
        if arm != "none"
        for seed in range(SEEDS)
    }


def test_attacks_are_drawn_beside_their_baselines(page, served):
    show(page, served, ATTACKS)
    found = charts(page, "effective_rank", "perplexity", "alignment", "alignment_isotropic")
    picture(page, "attacks")
    assert found["perplexity"]["scale"] == "log"
    ends = {round(c["y"][-1], 6) for c in found["alignment"]["curves"]}
    assert ends == {0.7}
    assert {round(c["y"][-1], 6) for c in found["alignment_isotropic"]["curves"]} == {0.05}


def test_the_table_shows_verdict_and_recovery_without_scrolling(page, served):
    show(page, served, TABLE)
    page.get_by_text(f"{len(served.run_ids)} matching runs").wait_for()
    for name in ("model", "arm", "seed", "verdict", "rank_recovery_pct", "status", "duration"):
        box = page.locator(f'[role=columnheader][col-id*="{name}"]').first.bounding_box()
        assert box, name
        assert box["x"] + box["width"] <= 1440, name
    first = page.locator(".ag-center-cols-container .ag-row").first.inner_text().split("\n")
    picture(page, "table")
    assert {"92", verdict_of(92), "ok"} <= set(first)  # the best run, 90 + 2, is on top


def test_the_other_mode_leads_to_the_runs(page, served):
    """MLflow's own start page: no run in sight, but the description and its links."""
    page.goto(served.open(f"#/experiments/{served.experiment_id}"))
    link = page.locator("a", has_text="Recovery").first
    link.wait_for()
    assert page.get_by_text("<!--").count() == 0  # the mark at its end is not shown
    picture(page, "start")
    target = link.get_attribute("href")
    assert target
    assert "workflowType=machine_learning" in target.partition("#")[2]
    page.goto(served.open("#" + target.partition("#")[2]))
    page.get_by_text(f"{len(served.run_ids)} matching runs").wait_for()
