"""How often a property is tried: some hundred times in the fast tier, ten times that with -m fuzz.

Examples are drawn from the property's own text (``derandomize``): the same in every run, so that a
failure is seen again without a database of seeds.
"""

from __future__ import annotations

import datetime
import resource
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

TIMES = 10
SLOWEST = datetime.timedelta(seconds=10)
MOST_MEMORY = 400 << 20
"""Bytes by which the process may grow while a property is tried."""


def tried(
    strategy: SearchStrategy[Any], check: Callable[[Any, Any], None], examples: int
) -> tuple[Callable[..., None], Callable[..., None]]:
    """A test of the fast tier and one of the fuzz tier.

    Args:
        strategy: Draws an example.
        check: Takes the fixture ``place`` (a folder) and an example; raises where it is not met.
        examples: Of the fast tier.
    """

    def test(number: int) -> Callable[..., None]:
        @settings(
            max_examples=number,
            deadline=SLOWEST,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(example=strategy)
        def repeated(place: Any, example: Any) -> None:
            check(place, example)

        def bounded(place: Any) -> None:
            before = _peak()
            repeated(place)
            assert _peak() - before < MOST_MEMORY

        return bounded

    return test(examples), pytest.mark.fuzz(test(TIMES * examples))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
