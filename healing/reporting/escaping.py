"""Escapes names, tags and reasons for Markdown, CSV and the terminal.

One function per target: :func:`markdown` and :func:`csv_cell` here, ``latex.escape`` for
LaTeX, Jinja's automatic escaping for HTML, ``plots.style.safe_text`` for figures.
"""

from __future__ import annotations

import re
import unicodedata

INVISIBLE = {"Cc", "Cf", "Cs"}
"""Unicode categories of controls: escape sequences of terminals, reversed reading direction."""
INTERVAL = r"(?<=\S )\[(?:-?[\d.,]+, -?(?:[\d.,]+|∞)|no interval|[\d.]+ %)\](?![(\[:])"
"""Brackets that this project writes itself and that no name can turn into a link."""
ENTITIES = {"&": "&amp;", "<": "&lt;", "@": "&#64;", "://": "&#58;//", "www.": "www&#46;"}
_SPACE = "\t\r\n"
_MARKUP = re.compile(
    rf"(?P<kept>{INTERVAL})|://|www\.|[\\`*\[\]<|~&$@]|(?<![^\W_])_|_(?![^\W_])", re.IGNORECASE
)
_BLOCK = re.compile(r"(?:#{1,6}|[-+=:]+)(?=$| )|\d{1,9}(?=[.)](?:$| ))|>")


def one_line(text: str) -> str:
    """Text without line breaks and control characters, blanks joined."""
    joined = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(c) in INVISIBLE else c for c in joined)


def markdown(text: str) -> str:
    """Text as inline Markdown (CommonMark, GitHub) that shows it as it is: no link, emphasis, code,
    HTML, formula or mention, no end of a table's cell; at a line's start no block either.
    """
    line = one_line(text)
    block = _BLOCK.match(line)
    mark = block.group() if block else ""
    rest = _MARKUP.sub(_escape_match, line[len(mark) :])
    return f"{mark}\\{rest}" if mark.isdigit() else ("\\" if mark else "") + mark + rest


def _escape_match(found: re.Match[str]) -> str:
    text = found.group()
    if found.group("kept"):
        return text
    entity = ENTITIES.get(text.lower())
    return f"{text[:-1]}&#46;" if text.lower() == "www." else entity or f"\\{text}"


def csv_cell(value: object) -> object:
    """A cell that no spreadsheet computes: text that begins like a formula gets an apostrophe.

    Blanks and controls before it are looked through, as spreadsheets cut them off, and full-width
    signs are read as the plain ones.
    """
    if not isinstance(value, str):
        return value
    bare = value.lstrip(_SPACE + "".join(c for c in set(value) if _is_invisible(c)))
    first = unicodedata.normalize("NFKC", bare[:1])[:1]
    return f"'{value}" if first in tuple("=+-@") or value[:1] in tuple(_SPACE) else value


def _is_invisible(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) in INVISIBLE
