"""README and docs/: every link leads somewhere, every page is in the site's list."""

from __future__ import annotations

import pathlib
import re
import subprocess
import sys

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"(?:\]\(|(?:src|srcset|href)=\")([^)\s\"]+)")


def prose(path: pathlib.Path) -> str:
    """A page without its code."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)
    return re.sub(r"`[^`\n]*`", lambda code: re.sub(r"[\[\]()]", "", code.group()), text)


def anchors(path: pathlib.Path) -> set[str]:
    """As GitHub makes them: lower case, blanks as hyphens, without punctuation."""
    titles = re.findall(r"^#+ (.+)$", prose(path), flags=re.M)
    plain = (re.sub(r"[^\w\- ]", "", title.lower()).strip() for title in titles)
    return {title.replace(" ", "-") for title in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    dead = []
    for link in LINK.findall(prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        there = target.is_relative_to(ROOT) and target.exists()
        if not there or (anchor and anchor not in anchors(target)):
            dead.append(link)
        elif page.parent.name == "docs" and target.suffix == ".md" and target.parent != page.parent:
            dead.append(f"{link} (outside of the site)")
    assert dead == []


def test_every_page_is_in_the_list_of_the_site():
    listed = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    names = [name for entry in listed for name in entry.values()]
    assert sorted(names) == sorted(page.name for page in (ROOT / "docs").glob("*.md"))


def test_the_site_is_made_without_a_warning(tmp_path):
    """A warning ends it: a page that no list names, a link or heading that is not there."""
    pytest.importorskip("mkdocs", reason="pip install 'llm-healing[dev]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert "WARNING" not in made.stderr
    for page in (ROOT / "docs").glob("*.md"):
        name = "index.html" if page.stem == "index" else f"{page.stem}/index.html"
        assert "</html>" in (tmp_path / name).read_text(encoding="utf-8"), page.name
