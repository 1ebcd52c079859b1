"""Pictures of every page that a person meets, of any served store, to be looked at.

    python -m tests.ui.rows http://127.0.0.1:5000 FOLDER [PAGE …]

Start page, every stored view, pages of a healing run, an attack, a sweep and a summary with their
tabs, and the report on the screen and as the A4 pages that a printer gets; or the pages that are
named (``heal_overview``). It opens what the store has by MLflow's own addresses alone, so that
stores of older versions can be looked at beside it.
"""

from __future__ import annotations

import json
import pathlib
import sys
from typing import Any

from mlflow.tracking import MlflowClient

from tests.ui.conftest import CHROMIUM, STORAGE

EXPERIMENT = "llm-healing"
MODE = "workflowType=machine_learning"
STAGES = ("heal", "attack", "main", "summarize")
TABS = {"overview": "", "metrics": "/model-metrics", "files": "/artifacts"}
LOOK_MS, MOST_LOOKS = 2500, 10
"""MLflow's charts come one after the other, and nothing says which is the last: a page is looked at
until two looks are the same, which no spinning wheel is."""


def pages(client: MlflowClient, experiment: str) -> dict[str, str]:
    """Name of a picture → address of its page, relative to the server; of the report the path of a
    copy: MLflow gives it as a download.
    """
    found = client.get_experiment_by_name(experiment)
    assert found is not None, f"no experiment {experiment}"
    home = f"#/experiments/{found.experiment_id}"
    wanted = {"start": home, "all_runs": f"{home}/runs?compareRunsMode=CHART&{MODE}"}
    for tag, value in found.tags.items():
        if tag.startswith("mlflow.sharedViewState."):
            key, view = tag.rpartition(".")[2], json.loads(value)["name"]
            name = f"view_{view.replace(' ', '_')}"
            charts = "" if view == "Table" else "compareRunsMode=CHART&"
            query = f"viewStateShareKey={key}&{charts}{MODE}"
            wanted[name] = f"{home}/runs?{query}"
    for stage in STAGES:
        asked = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
        if stage in ("heal", "attack"):
            asked += " and tags.arm = 'haep'"
        runs = client.search_runs([found.experiment_id], asked, max_results=1)
        for run in runs:
            for tab, path in TABS.items():
                wanted[f"{stage}_{tab}"] = f"{home}/runs/{run.info.run_id}{path}?{MODE}"
            if stage == "summarize":
                wanted["report"] = client.download_artifacts(run.info.run_id, "report.html")
    return wanted


def look(page: Any, path: pathlib.Path) -> None:
    """A picture of a page that moves no more."""
    before = b""
    for _ in range(MOST_LOOKS):
        page.wait_for_timeout(LOOK_MS)
        now = page.screenshot(path=path)
        if now == before:
            break
        before = now


def photograph(page: Any, name: str, address: str, folder: pathlib.Path) -> None:
    """One page as it opens; a run's page with its description unfolded too; a report whole."""
    page.goto("about:blank")
    page.goto(address)
    look(page, folder / f"{name}.png")
    if name == "report":
        page.screenshot(path=folder / "report_whole.png", full_page=True)
        page.pdf(path=folder / "report.pdf", format="A4", print_background=True)
    more = page.get_by_text("Show more", exact=True)
    if name.endswith("_overview") and more.count():
        more.first.click()
        look(page, folder / f"{name}_unfolded.png")
    if name.startswith(("view_", "all_runs")) or name.endswith("_metrics"):
        page.mouse.move(1100, 600)
        page.mouse.wheel(0, 700)
        look(page, folder / f"{name}_2.png")


def main(address: str, folder: str, *names: str) -> None:
    """Write the pictures of a server's pages to a folder."""
    from playwright.sync_api import sync_playwright

    place = pathlib.Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        context.set_default_timeout(300_000)
        for key, value in STORAGE.items():
            item = f"{json.dumps(key)}, {json.dumps(json.dumps(value))}"
            context.add_init_script(f"window.localStorage.setItem({item})")
        for name, relative in pages(MlflowClient(address), EXPERIMENT).items():
            if names and name not in names:
                continue
            page = context.new_page()
            whole = f"file://{relative}" if name == "report" else f"{address}/{relative}"
            photograph(page, name, whole, place)
            page.close()
            print(place / f"{name}.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
