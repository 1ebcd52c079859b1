"""Which commit of this code runs, where it runs from a checkout."""

from __future__ import annotations

import functools
import pathlib
import subprocess


def _git(*arguments: str) -> str:
    root = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


@functools.cache
def code_version() -> dict[str, str]:
    """Commit of the code and whether it has uncommitted changes ({} outside a checkout)."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return {}
    return {"git_commit": commit, "git_dirty": str(bool(_git("status", "--porcelain"))).lower()}
