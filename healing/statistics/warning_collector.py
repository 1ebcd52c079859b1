"""What the statistics warn about, collected as named notes instead of printed."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

from healing.statistics.intervals import DegenerateDataWarning

T = TypeVar("T")


class WarningCollector:
    """Warnings about degenerate data, each once, with what they are about."""

    def __init__(self) -> None:
        self._subjects: dict[str, list[str]] = {}

    def call(self, subject: str, function: Callable[..., T], *args: object, **options: object) -> T:
        """The function's result; what it warns of is kept.

        Args:
            subject: What the result is about (an endpoint).
            function: Called with the other arguments.
            *args: Passed on.
            **options: Passed on.
        """
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DegenerateDataWarning)
            result = function(*args, **options)
        for warning in caught:
            text = f"{warning.category.__name__}: {warning.message}"
            subjects = self._subjects.setdefault(text, [])
            if subject not in subjects:
                subjects.append(subject)
        return result

    @property
    def texts(self) -> tuple[str, ...]:
        """``TooFewCheckpointsWarning: … (rank_recovery_pct, loss_recovery_pct)``."""
        return tuple(f"{text} ({', '.join(about)})" for text, about in self._subjects.items())
