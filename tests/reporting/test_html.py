"""The HTML report: escaped, self-contained, and quiet in a real browser."""

from __future__ import annotations

import json
import pathlib
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from healing.reporting.cautions import CAUSES, all_notes, cause_of, caution_table
from healing.reporting.html import embed
from healing.reporting.tables import endpoint_name
from healing.stages.summarize import write_summary
from healing.statistics.heal_runs import ENDPOINTS
from healing.statistics.intervals import DegenerateDataWarning
from tests.summaries import NASTY, degenerate, eventful, nasty, realistic

pytestmark = pytest.mark.slow

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
LOCAL = ("file:", "data:")


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def write(folder: pathlib.Path, summary) -> Page:
    folder.mkdir(exist_ok=True)
    write_summary(folder, summary)
    return read(folder)


def read(folder: pathlib.Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", params=["realistic", "nasty"])
def written(request, tmp_path_factory) -> pathlib.Path:
    """A written summary; drawing it takes seconds."""
    folder = tmp_path_factory.mktemp(request.param)
    write_summary(folder, {"realistic": realistic, "nasty": nasty}[request.param]())
    return folder


needs_browser = pytest.mark.skipif(not CHROMIUM, reason="no Chromium: apt-get install chromium")


def test_sections_in_order_with_the_verdict_first(tmp_path):
    page = write(tmp_path, realistic(("nano", "micro", "70m"), 24))
    wanted = [
        "What recovers depends on the measure",
        "nano, HAEP: rank recovered in part within 60 steps",
        "micro, HAEP: not recovered within 60 steps by this healer",
        "70m, HAEP: healed within 60 steps, rank and knowledge", "HAEP against harm by other means",
        "Recovery of every group", "Verdict by budget", "By other measures", "What the attacks did",
        "Is it the attack, or how far it went?",
        "Trajectories", "Every checkpoint", "Time to half recovery",
        "Contrasts, seed by seed", "Recovery and model size", "points per tenfold",
        "Fitted asymptotes and half-lives", "Methods", "Failed runs (1)", "out of memory",
        "Runs without a defined rank recovery (72)", "detection threshold of 2.14",
        "What the data do not determine",
    ]  # fmt: skip
    assert [text for text in wanted if text not in page.text] == []
    body = page.text[page.text.index(wanted[0]) :]  # after the list of contents
    places = [body.index(text) for text in wanted]
    assert places == sorted(places)
    images = [attributes for tag, attributes in page.elements if tag == "img"]
    assert len(images) == 6
    assert all("rank" in image["alt"] for image in images)


def test_everything_has_its_place(tmp_path):
    page = write(tmp_path, eventful())
    wanted = [
        "111 finished healing runs of 3 models, 1 failed, 1 still running, 1 repeated.",
        "n\u00a0=\u00a09, 1 checkpoint undefined", "log-rank test: rank z = ",
        "Time to half recovery", "median tokens", "Bootstrap beside the t interval",
        "BCa bootstrap [95 %]", "Where the variance comes from", "ICC", "counts once",
        "Still running (1)", "killed so hard", "heal 70m haep seed 9", "Repeated runs (1)",
        "same final numbers", CAUSES["AllCensoredWarning"],
    ]  # fmt: skip
    assert [text for text in wanted if text not in page.text] == []
    plain = write(tmp_path / "plain", realistic())
    for title in wanted[5:9] + wanted[10:14]:
        assert title not in plain.text, title


def test_the_contents_lead_to_every_section_and_nowhere_else(tmp_path):
    page = write(tmp_path, eventful())
    ids = [a["id"] for tag, a in page.elements if tag == "section"]
    targets = [a["href"] for tag, a in page.elements if tag == "a"]
    assert len(set(ids)) == len(ids)
    assert targets == [f"#{i}" for i in ids]
    assert ids[:2] == ["verdict", "contrasts-said"]  # the answer and its comparison come first


def test_cards_say_what_was_asked_found_and_rested_on(tmp_path):
    text = " ".join(write(tmp_path, realistic(("nano",), 5)).text.split())
    (card,) = re.findall(r"Asked: (.+?) Found: (.+?) Rests on: (.+?\.\d+)\.", text)
    assert card[0] == "does nano recover from HAEP within 60 steps?"
    assert re.fullmatch(
        r"rank recovery 4\d\.\d \[.+\] %, loss recovery 8\d\.\d \[.+\] %\.", card[1]
    )
    assert card[2] == "5 checkpoints, 5 healing runs, AdamW at 0.001"


def test_warnings_are_behind_a_fold_in_plain_words(tmp_path):
    page = write(tmp_path, eventful())
    assert "Warning" not in page.text
    assert ("details", {}) in page.elements
    summary = eventful()
    rows = caution_table(summary).rows
    assert len(rows) == len({cause_of(note) for _, note in all_notes(summary)}) < 8
    for where, note in all_notes(summary):
        (row,) = (row for row in rows if row[0] == cause_of(note))
        assert where in row[2].split("; ")
    of_which = {name for row in rows for name in row[1].split(", ")}
    assert {"rank", "loss"} <= of_which <= {*map(endpoint_name, ENDPOINTS), "–"}
    places = {place for row in rows for place in row[2].split("; ")}
    assert not [place for place in places if place.endswith(("against text", "against tokens"))]


def test_numbers_are_called_what_they_are():
    assert [endpoint_name(name) for name in ENDPOINTS] == [
        "rank", "loss", "perplexity", "rank against the sham", "loss against the sham",
        "loss of the unigram model",
    ]  # fmt: skip


def test_every_warning_of_the_statistics_has_plain_words():
    def below(cls: type) -> set[type]:
        return {cls}.union(*map(below, cls.__subclasses__()))

    assert {c.__name__ for c in below(DegenerateDataWarning)} - {"DegenerateDataWarning"} == {
        *CAUSES
    }
    assert cause_of("NewWarning: something: else") == "something: else"


@needs_browser
@pytest.mark.skipif(not shutil.which("pdftotext"), reason="no pdftotext: install poppler-utils")
def test_it_prints_on_a4_with_its_folds_open(tmp_path):
    summary = eventful()
    write(tmp_path, summary)
    pdf = tmp_path / "report.pdf"
    subprocess.run(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-pdf-header-footer",
         f"--user-data-dir={tmp_path / 'profile'}", f"--print-to-pdf={pdf}",
         (tmp_path / "report.html").as_uri()],
        capture_output=True, timeout=120, check=True,
    )  # fmt: skip
    box = re.search(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", pdf.read_bytes())
    assert [float(x) for x in box.groups()] == pytest.approx([595.0, 842.0], abs=1.5)
    done = subprocess.run(["pdftotext", str(pdf), "-"], capture_output=True, text=True, check=True)
    said = " ".join(done.stdout.split())
    assert " ".join(CAUSES["AllCensoredWarning"].split()[:4]) in said
    assert "Mean rank recovery after 60" in said


def test_nothing_is_fetched_and_nothing_runs(written):
    page = read(written)
    assert {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed"} == set()
    for tag, attributes in page.elements:
        assert not [a for a in attributes if a.startswith("on")], tag
        for key in ("src", "href", "srcset", "data", "action"):
            assert (attributes.get(key) or "data:").startswith(("data:", "#"))
    policies = [a["content"] for t, a in page.elements if "http-equiv" in a]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]
    source = (written / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"url\(|@import", source)


@pytest.mark.parametrize("written", ["nasty"], indirect=True)
def test_names_are_shown_as_they_are(written):
    page = read(written)
    for name in NASTY:
        assert name in page.text


@pytest.mark.parametrize("name", list(degenerate()))
def test_summaries_with_something_missing(tmp_path, name):
    summary = degenerate()[name]
    page = write(tmp_path, summary)
    assert "Methods" in page.text
    assert ("nothing can be said" in page.text) == (not summary.groups)
    assert len([1 for tag, _ in page.elements if tag == "img"]) == len(
        list((tmp_path / "figures").glob("*.png"))
    )


def test_only_png_files_are_embedded(tmp_path):
    (tmp_path / "a.png").write_text("<svg onload=alert(1)>")
    with pytest.raises(ValueError, match=r"a\.png is not a PNG file; pass one that plots wrote"):
        embed(tmp_path / "a.png", "", "")


def browse(page: pathlib.Path, folder: pathlib.Path) -> tuple[str, str, set[str]]:
    """Open a page in Chromium: its DOM, what the console said, every URL that it requested.

    What the browser asks for on its own account has "not an origin" as its initiator.
    """
    log = folder / "net.json"
    done = subprocess.run(
        [
            CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-default-apps", "--host-resolver-rules=MAP * ~NOTFOUND",
            "--enable-logging=stderr", f"--log-net-log={log}", "--virtual-time-budget=3000",
            f"--user-data-dir={folder / 'profile'}", "--dump-dom", page.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    console = "\n".join(line for line in done.stderr.splitlines() if ":CONSOLE" in line)
    # A log that was cut off at the end is closed by hand.
    source = log.read_text().rstrip().rstrip(",")
    try:
        events = json.loads(source)["events"]
    except json.JSONDecodeError:
        events = json.loads(source + "]}")["events"]
    asked = [e["params"] for e in events if "initiator" in e.get("params", {})]
    urls = {str(p["url"]) for p in asked if p["initiator"] != "not an origin"}
    return done.stdout, console, urls


@needs_browser
def test_a_browser_opens_it_without_error_or_request(written, tmp_path):
    dom, console, urls = browse(written / "report.html", tmp_path)
    assert "Recovery of every group" in dom
    assert console == ""
    assert {url for url in urls if not url.startswith(LOCAL)} == set()


@needs_browser
def test_the_browser_test_would_notice(tmp_path):
    """Without the policy, a script's error and an outside picture are seen."""
    page = tmp_path / "bad.html"
    outside = [f"http://{name}.invalid/x" for name in ("img", "style", "frame", "fetch")]
    page.write_text(
        "<img src='{}'><link rel=stylesheet href='{}'><iframe src='{}'></iframe>"
        "<script>fetch('{}'); console.error('seen')</script>".format(*outside)
    )
    _, console, urls = browse(page, tmp_path)
    assert "seen" in console
    assert set(outside) <= urls


@needs_browser
def test_its_policy_stops_what_slipped_in(tmp_path):
    write(tmp_path / "out", realistic())
    page = tmp_path / "out" / "report.html"
    page.write_text(
        page.read_text().replace("</main>", "<img src='http://example.invalid/'></main>")
    )
    _, console, urls = browse(page, tmp_path)
    assert "Content Security Policy" in console
    assert not any("example.invalid" in url for url in urls)
