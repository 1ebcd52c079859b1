"""Building blocks of LaTeX source: escaped text, numbers, names of macros.

What is made here compiles with pdfLaTeX and its default font encoding: it is ASCII throughout.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Mapping

from healing.statistics.intervals import Interval

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\char34{}",
    "`": r"\textasciigrave{}", "[": "{[}", "]": "{]}", "*": "{*}",
    "–": "--", "—": "---", "“": "``", "”": "''", "‘": "`", "’": "'",
    "−": r"\ensuremath{-}", "±": r"\ensuremath{\pm}", "×": r"\ensuremath{\times}",
    "≤": r"\ensuremath{\le}", "≥": r"\ensuremath{\ge}", "∞": r"\ensuremath{\infty}",
    "→": r"\ensuremath{\to}", "·": r"\ensuremath{\cdot}", "ρ": r"\ensuremath{\rho}",
    "\u00a0": "~", "\u202f": r"\,", "ß": r"\ss{}",
}  # fmt: skip
"""Brackets and stars in braces: after a line break in a table they would be its arguments."""
ACCENTS = {
    "\u0300": "`", "\u0301": "'", "\u0302": "^", "\u0303": "~", "\u0304": "=", "\u0306": "u",
    "\u0307": ".", "\u0308": '"', "\u030a": "r", "\u030b": "H", "\u030c": "v", "\u0327": "c",
}  # fmt: skip
DIGITS = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")


def escape(text: str) -> str:
    """Text as LaTeX source in ASCII; what pdfLaTeX cannot set becomes its code point.

    A hyphen before a free-standing number becomes a minus sign, and numbers keep their per cent.
    """
    source = ""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", " ".join(text.split()))
    for character in re.sub(r"(?<=\d) %", "\u202f%", text):
        # Two hyphens or apostrophes would be joined into a dash or a quotation mark.
        source += "{}" if character in "-'" and source.endswith(character) else ""
        source += _escape_character(character)
    return source


def _escape_character(character: str) -> str:
    if character in SPECIAL:
        return SPECIAL[character]
    if " " <= character <= "~":
        return character
    decomposed = unicodedata.normalize("NFD", character)
    base, marks = decomposed[0], decomposed[1:]
    if base.isascii() and base.isalpha() and len(marks) == 1 and marks[0] in ACCENTS:
        letter = {"i": r"\i{}", "j": r"\j{}"}.get(base, base)
        return f"\\{ACCENTS[marks[0]]}{{{letter}}}"
    return f"{{[}}U+{ord(character):04X}{{]}}"


def number(value: float, digits: int = 1) -> str:
    """A number with a true minus sign; ``undefined`` for NaN, ∞ for infinities."""
    if math.isnan(value):
        return "undefined"
    text = r"\ensuremath{\infty}" if math.isinf(value) else f"{abs(value):.{digits}f}"
    negative = value < 0 and (math.isinf(value) or float(f"{value:.{digits}f}") != 0.0)
    return r"\ensuremath{-}" + text if negative else text


def bounds(interval: Interval, digits: int = 1) -> str:
    """``[1.3, 35.8]``; ``[no interval]`` without bounds."""
    if math.isnan(interval.point) and not interval.defined:
        return "undefined"
    if not interval.defined:
        return "[no interval]"
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]"


def spell_out(name: str) -> str:
    """Letters that stand for a name in a macro: ``410m`` → ``FourOneZeroM``, ``1.4b`` →
    ``OnePointFourB``. A point is spelled, other signs part words, other letters are numbered.
    """
    words, start = "", True
    for character in name:
        if character.isascii() and character.isalpha():
            words += character.upper() if start else character
            start = False
            continue
        if character.isascii() and character.isdigit():
            words += DIGITS[int(character)]
        elif character == ".":
            words += "Point"
        elif not character.isascii():
            code = f"{ord(character):x}"
            words += "U" + "".join(DIGITS[int(c)] if c.isdigit() else c.upper() for c in code)
        start = True
    return words


class Macros:
    r"""Names and values of ``\newcommand`` in order; a block of names never meets another."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    def add(self, stem: str, values: Mapping[str, str]) -> str:
        r"""Add ``\Recovery<stem><key>`` for every key.

        Where one of the names is taken (``a_b`` and ``a-b`` are spelled alike) the whole block gets
        the next number in letters after its stem.

        Returns:
            The stem that was free.
        """
        number, free = 1, f"Recovery{stem}"
        while any(free + key in self.values for key in values):
            number += 1
            free = f"Recovery{stem}{spell_out(str(number))}"
        self.values |= {free + key: value for key, value in values.items()}
        return free
