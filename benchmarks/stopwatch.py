"""Seconds on a device, of single calls and of functions inside a longer computation."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch


def synchronize(device: torch.device) -> None:
    """Wait for what was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(action: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Shortest of several, after one that does not count."""
    action()
    best = math.inf
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        action()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


class Stopwatch:
    """Adds up the seconds of chosen functions while something larger runs.

    Attributes:
        seconds: By label, what was called from inside included.
        calls: By label.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()

    @contextlib.contextmanager
    def on(self, places: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
        """Time the functions inside the context.

        Args:
            places: Label → owner (class or module) and name of the function there.
        """
        with contextlib.ExitStack() as stack:
            for label, (owner, name) in places.items():
                timed = self._timed(label, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            yield

    def _timed(self, label: str, function: Callable[..., Any]) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            synchronize(self.device)  # what was queued before is not this function's
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                synchronize(self.device)
                self.seconds[label] += time.perf_counter() - begin
                self.calls[label] += 1

        # A class method is bound already and must not be given the class once more.
        return staticmethod(call) if inspect.ismethod(function) else call
