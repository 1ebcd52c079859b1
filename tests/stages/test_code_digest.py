"""The digest of a cell's code: what it covers, against Python's own imports; what changes it."""

from __future__ import annotations

import pathlib
import subprocess
import sys

import pytest

from healing.stages.cells import code_digest as module
from healing.stages.cells.code_digest import EXCLUDED, closure, code_digest, is_excluded, stripped
from tests.conftest import ROOT

ROOTS = ("healing.stages.cells.attack", "healing.stages.cells.heal", "healing.stages.cells.basin")


@pytest.mark.parametrize("root", ROOTS)
def test_everything_that_python_imports_for_a_cell_is_covered_or_excluded(root):
    code = f"import {root}, sys; print('\\n'.join(m for m in sys.modules if 'healing.' in m))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    imported = {m for m in done.stdout.split() if m.startswith("healing.") and not is_excluded(m)}
    # Packages are imported on the way to their modules; their files hold a docstring alone.
    packages = {m for m in imported if pathlib.Path(ROOT, *m.split(".")).is_dir()}
    assert imported - packages <= set(closure(root))
    assert len(imported - packages) > 20


def test_what_the_hand_made_list_lacked_is_covered():
    found = set(closure("healing.stages.cells.heal"))
    assert {
        "healing.measurements.unigram", "healing.statistics.survival",
        "healing.stages.cells.inputs", "healing.models.token_loss",
    } <= found  # fmt: skip
    assert not any(m.startswith(("healing.tracking", "healing.reporting")) for m in found)


def test_every_exclusion_would_be_reached_and_has_a_reason(monkeypatch):
    monkeypatch.setattr(module, "EXCLUDED", {})
    whole = set().union(*(closure(root) for root in ROOTS))
    for name, reason in EXCLUDED.items():
        assert any(m == name or m.startswith(f"{name}.") for m in whole), name
        assert len(reason) > 10


SOURCE = '''
"""A module."""
import math

from healing.errors import ConfigError

LIMIT = 10
"""What it is."""


def half(x: float) -> float:
    """Half of it."""
    return x / 2  # why
'''


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("A module.", "Another sentence.", True),
        ("Half of it.", "The half.", True),
        ("What it is.", "A bound.", True),
        ("  # why", "", True),
        (
            "from healing.errors import ConfigError",
            "from healing.elsewhere import ConfigError",
            True,
        ),
        ("x / 2", "x / 3", False),
        ("LIMIT = 10", "LIMIT = 11", False),
        ("return x / 2", "return x", False),
    ],
)
def test_words_change_nothing_and_numbers_do(old, new, same):
    assert old in SOURCE
    assert (stripped(SOURCE) == stripped(SOURCE.replace(old, new))) is same


def test_a_changed_module_far_below_changes_the_digest(monkeypatch, tmp_path):
    root = "healing.stages.cells.heal"
    before = code_digest.__wrapped__(root)
    files = closure(root)
    changed = tmp_path / "unigram.py"
    text = files["healing.measurements.unigram"].read_text()

    def digest(new: str) -> str:
        changed.write_text(new)
        monkeypatch.setattr(
            module, "closure", lambda *_: {**files, "healing.measurements.unigram": changed}
        )
        return code_digest.__wrapped__(root)

    assert digest(text) == before  # moved, and the same
    assert digest("# a remark\n" + text) == before
    assert digest(text + "\nSMOOTHING = 2\n") != before
