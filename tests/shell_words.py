"""A command as a shell reads it."""

from __future__ import annotations

import subprocess


def words_of(command: str) -> list[str]:
    """The words that a shell makes of a command, which is not run; broken lines are joined."""
    script = f"printf '%s\\0' {command}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]
