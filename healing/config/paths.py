"""Paths that a person gives: what cannot be one is said in one line before anything is done."""

from __future__ import annotations

import pathlib
import re

from healing.config.options import MAX_TEXT
from healing.errors import ConfigError

MAX_PART = 255
"""Bytes of one component, on every file system that is in use."""
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:/")


def is_address(given: str) -> bool:
    """Whether it names something in a store (``runs:/…``, ``s3://…``) and no local file."""
    return _SCHEME.match(given) is not None


def local_path(given: str, flag: str) -> pathlib.Path:
    """The absolute path that is meant, with ``~`` and links resolved; it need not exist.

    Args:
        given: As given.
        flag: Option that it was given as, for the message.

    Raises:
        ConfigError: No path can be like this: an unknown user's home, too long, a loop of links.
    """
    shown = given if len(given) <= 200 else f"{given[:80]}… ({len(given)} characters)"
    try:
        if len(given) > MAX_TEXT or any(len(p.encode()) > MAX_PART for p in given.split("/")):
            raise ValueError("too long")
        return pathlib.Path(given).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(
            f"{flag} {shown} cannot be a path here ({reason}): name another"
        ) from error
