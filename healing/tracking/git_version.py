"""What runs: the commit of this code, where it can be had, and the versions that it runs with."""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import platform
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT

from healing.tracking.sending.store_errors import LOGIN

COMMIT, DIRTY = "git_commit", "git_dirty"
"""Tags."""
LIBRARIES = ("torch", "transformers", "mlflow")
"""Libraries whose versions decide what a number is, or how it is kept."""
# Not file://: `mlflow run` takes that for a folder and checks the commit out inside it (3.17.2).
_ADDRESS = re.compile(r"(?:https?|ssh|git)://\S+|[\w.-]+@[\w.-]+:\S+")


@dataclass(frozen=True)
class Checkout:
    """The code that runs.

    Attributes:
        url: Of the git repository, without a login; empty where there is none that others reach.
        commit: 40 hexadecimal digits; empty outside a checkout.
        is_dirty: Whether files differ from the commit.
        is_published: Whether a branch of a remote was seen to hold the commit.
    """

    url: str = ""
    commit: str = ""
    is_dirty: bool = False
    is_published: bool = False


def _git(*arguments: str) -> str:
    root = pathlib.Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=root, capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def public_address(remote: str) -> str:
    """A remote's address as it may be shown: no login in it, empty for a folder of this machine."""
    if not _ADDRESS.fullmatch(remote):
        return ""
    # The user of ssh is part of the address; before https it is a secret.
    return remote if remote.startswith("ssh://") else LOGIN.sub("", remote)


@functools.cache
def checkout() -> Checkout:
    """Commit, address and state of this code's repository."""
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return Checkout()
    return Checkout(
        public_address(_git("config", "--get", "remote.origin.url")),
        commit,
        bool(_git("status", "--porcelain")),
        bool(_git("branch", "--remotes", "--contains", commit)),
    )


def code_version(known: Mapping[str, str]) -> dict[str, str]:
    """Tags with the commit of the code, unless MLflow names the same, and with uncommitted changes
    where there are any ({} outside a checkout).

    MLflow names the repository of the script that was started, which may be another.

    Args:
        known: Tags of the run.
    """
    found = checkout()
    own = {} if found.commit in ("", known.get(MLFLOW_GIT_COMMIT)) else {COMMIT: found.commit}
    return {**own, **({DIRTY: "true"} if found.is_dirty else {})}


@functools.cache
def environment() -> dict[str, str]:
    """Versions of Python and of :data:`LIBRARIES`."""
    found = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {"python": platform.python_version(), **found}


@functools.cache
def processor() -> str:
    """Name of the CPU: ``AMD EPYC 7763 64-Core Processor``."""
    try:
        facts = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        facts = ""
    named = re.search(r"^model name\s*:\s*(.+)$", facts, re.MULTILINE)
    return named.group(1).strip() if named else platform.processor() or platform.machine()
