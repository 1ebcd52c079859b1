"""What a person sees in the terminal while a stage runs."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


class Console:
    """Progress bars and lines at the verbosity asked for.

    Args:
        verbosity: ``quiet`` (errors only), ``normal`` (bars and results) or ``verbose``.
    """

    def __init__(self, verbosity: str) -> None:
        self.verbosity = verbosity

    def say(self, text: str) -> None:
        """A line of result."""
        if self.verbosity != "quiet":
            tqdm.write(text, file=sys.stdout)

    def detail(self, text: str) -> None:
        """A line for those who asked for more."""
        if self.verbosity == "verbose":
            tqdm.write(text, file=sys.stdout)

    def bar(self, total: int, title: str, unit: str = "step", **options: Any) -> tqdm[Any]:
        """A progress bar with the time left."""
        return tqdm(
            total=total,
            desc=title,
            unit=unit,
            disable=self.verbosity == "quiet",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
            **options,
        )
