"""Lines of a terminal, pipe or log: none can fail a run, and none carries what others hid in it."""

from __future__ import annotations

import contextlib
import os
import sys
import unicodedata

from tqdm import tqdm

from healing.reporting.escaping import INVISIBLE

_KEPT = "\n\t"


def visible(text: str) -> str:
    """Text with every control character but line ends and tabs shown as a replacement sign: names
    from files and stores may hold a terminal's escape sequences.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        "\ufffd" if unicodedata.category(c) in INVISIBLE and c not in _KEPT else c for c in text
    )


def is_terminal() -> bool:
    """Whether a person sees standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def write_line(text: str, *, error: bool = False) -> None:
    """Write a line, above the bars where there are any; where nobody reads it, go on silently.

    Args:
        text: May hold line ends.
        error: To standard error.
    """
    stream = sys.stderr if error else sys.stdout
    if stream is None:  # closed before the program began
        return
    text = visible(text)
    encoding = getattr(stream, "encoding", None) or "utf-8"
    text = text.encode(encoding, "replace").decode(encoding)
    try:
        if error:
            print(text, file=stream, flush=True)
        else:
            tqdm.write(text, file=stream)
            stream.flush()
    except (OSError, ValueError):
        _let_go(stream)


def _let_go(stream: object) -> None:
    """Send what is left in a broken pipe's buffer nowhere: Python would complain of it at its end
    and change the exit code.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[attr-defined]
        os.close(nowhere)
