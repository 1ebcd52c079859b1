"""What pages of real runs show in a browser: text, pictures, a command that repeats the run."""

from __future__ import annotations

import importlib
import pathlib
import re
from typing import Any

import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from healing.measurements.recovery import verdict_of
from healing.tracking.run_files import read_jsonl
from healing.tracking.ui import experiment_page
from healing.tracking.ui.views import SPECTRA
from tests.shell_words import words_of
from tests.ui.conftest import Made, writing_to
from tests.ui.test_pages import picture

pytestmark = [pytest.mark.ui, pytest.mark.slow]

WIDTHS = """() => [...document.querySelectorAll('img')]
  .filter(i => i.src.includes('get-artifact') && i.complete).map(i => i.naturalWidth)"""
"""Of the pictures of runs that are drawn: 0 where the file is none."""
SELECT = """(block) => {
  const range = document.createRange();
  range.selectNodeContents(block);
  getSelection().removeAllRanges();
  getSelection().addRange(range);
}"""


def copied(page: Any) -> str:
    """What the clipboard holds once the only code block was marked and copied."""
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    block = page.locator("pre code")
    block.wait_for(state="attached")
    assert block.count() == 1
    block.evaluate(SELECT)
    page.keyboard.press("Control+C")
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def numbers(made: Made, run_id: str) -> list[dict[str, str]]:
    """Rows of a run's records, times aside."""
    path = pathlib.Path(MlflowClient(made.uri).download_artifacts(run_id, "metrics.jsonl"))
    times = {"seconds", "tokens_per_second"}
    return [{k: repr(v) for k, v in row.items() if k not in times} for row in read_jsonl(path)]


@pytest.mark.parametrize("stage", ["attack", "heal"])
def test_the_command_that_is_copied_from_a_page_repeats_the_run(page, made, stage):
    run_id = getattr(made, stage)
    page.goto(made.page(run_id))
    text = copied(page)
    client = MlflowClient(made.uri)
    run = client.get_run(run_id)
    assert f"```bash\n{text.strip()}\n```" in run.data.tags["mlflow.note.content"]
    words = words_of(text)
    assert words[:3] == ["python", "-m", f"entrypoints.{stage}"]
    with writing_to(made.folder, made.uri):
        result = CliRunner().invoke(importlib.import_module(words[2]).main, words[3:])
    assert result.exit_code == 0, result.output
    newest = client.search_runs([run.info.experiment_id], f"tags.stage = '{stage}'")[0]
    assert newest.info.run_id != run_id
    assert numbers(made, newest.info.run_id) == numbers(made, run_id)
    assert newest.data.tags["fingerprint"] == run.data.tags["fingerprint"]


def test_a_page_opens_with_its_sentence_and_its_figure(page, made):
    page.goto(made.page(made.heal))
    sentence = page.get_by_text("Not recovered within 8 steps").first
    sentence.wait_for()
    assert sentence.bounding_box()["y"] < 300
    page.wait_for_function(f"({WIDTHS})().length > 0")
    assert page.evaluate(WIDTHS) == [690]
    # Tags, beside it: few, each with a value, the verdict in the first screen.
    box = page.get_by_text(verdict_of(0.0)).first.bounding_box()
    assert box["y"] + box["height"] < 900
    tags = dict(re.findall(r"(?m)^(\w+)\n: (.+)$", page.locator("body").inner_text()))
    assert tags["verdict"] == verdict_of(0.0)
    assert {"stage", "arm", "model", "python", "status"} <= tags.keys()
    assert not {"checkpoint", "parent", "process", "settings", "local_run_id"} & tags.keys()
    assert len(tags) <= 20
    page.get_by_text("Show more").first.click()
    page.get_by_text("Repeat this run").wait_for()
    page.wait_for_timeout(300)
    picture(page, "run")
    attack = page.get_by_role("link", name="the attack", exact=True)
    assert made.attack in attack.get_attribute("href")
    target = attack.get_attribute("href")
    page.goto("about:blank")
    page.goto(f"{made.address}/{target}")
    page.get_by_role("heading", name="attack nano random_tokens seed 0").wait_for()


def test_spectra_are_shown_by_step(page, made):
    client = MlflowClient(made.uri)
    experiment_id = client.get_run(made.heal).info.experiment_id
    page.goto(f"{made.address}/{experiment_page.view_link(experiment_id, SPECTRA)}")
    page.wait_for_function(f"({WIDTHS})().length > 0")
    page.wait_for_timeout(300)
    picture(page, "spectra")
    assert set(page.evaluate(WIDTHS)) == {256}  # MLflow's small copies; a click opens the picture
    assert page.get_by_text("heal.healing_lr=").count() == 0  # MLflow's own chart has them all
    shown = page.locator("img.rc-image-img").first
    box = shown.bounding_box()
    assert box["y"] + box["height"] < 900
    assert box["width"] > 250
    first = shown.get_attribute("src")
    slider = page.locator("[role=slider]").first
    assert slider.bounding_box()["y"] < 880
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("(s) => document.querySelector('img.rc-image-img').src.includes(s)",
                           arg="step%2B2%2B")  # fmt: skip
    assert "step%2B0%2B" in first


def test_the_report_of_a_summary_is_shown_among_its_files(page, made):
    page.goto(made.page(made.summary, "/artifacts/report.html"))
    frame = page.frame_locator("iframe").first
    frame.get_by_role("heading", name="Recovery report").wait_for()
    picture(page, "report")
    widths = frame.locator("img").evaluate_all("all => all.map(i => i.naturalWidth)")
    assert widths
    assert min(widths) > 500
