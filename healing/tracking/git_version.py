"""What runs: the commit of this code, where it can be had, and the versions that it runs with."""

from __future__ import annotations

import functools
import importlib.metadata
import pathlib
import platform
import re
import subprocess
from dataclasses import dataclass

from healing.tracking.sending.store_errors import LOGIN

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


@functools.cache
def code_version() -> dict[str, str]:
    """Commit of the code and whether it has uncommitted changes ({} outside a checkout)."""
    found = checkout()
    if not found.commit:
        return {}
    return {"git_commit": found.commit, "git_dirty": str(found.is_dirty).lower()}


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
