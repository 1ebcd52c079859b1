"""A sample of the kill points of ``tests.outages.kill_points``; ``make kill-points`` has all."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]


def killed(folder: pathlib.Path, command: str, first: int, every: int) -> tuple[int, list[dict]]:
    """Points that there are, and what came of those that were tried."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.outages.kill_points", command, str(folder),
         "--first", str(first), "--every", str(every)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return found[0]["points"], found[1:]


@pytest.mark.parametrize(
    ("command", "first", "every"), [("heal", 4, 29), ("attack", 9, 37), ("summarize", 7, 53)]
)
def test_killed_anywhere_and_run_again_a_command_leaves_what_it_would_have(
    tmp_path, empty_database, command, first, every
) -> None:
    shutil.copy(empty_database, tmp_path / "empty.db")
    points, reports = killed(tmp_path, command, first, every)
    assert points > 60
    assert len(reports) == len(range(first, points + 1, every))
    # How many requests there are hangs on time: the last points may not be reached again.
    assert sum(report["killed"] for report in reports) >= len(reports) - 2
    assert [report for report in reports if report["wrong"]] == []
