"""Results of the finished parts of a preparation: what an attack that was cut does not do again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


class Finished:
    """Results by the name of their part. They hold all that the rest depends on (a random stream's
    state, too), and are tensors, plain values and dataclasses of these: a snapshot can hold them.

    Args:
        parts: Results of an earlier process.
    """

    def __init__(self, parts: Mapping[str, Any] | None = None) -> None:
        self._parts = dict(parts or {})
        self._count = 0

    def get(self, name: str) -> Any:
        """The newest result of a part; ``None`` where there is none."""
        return self._parts.get(name)

    def keep(self, name: str, result: Any) -> None:
        """Keep a result in place of the part's earlier one. It is never changed afterwards."""
        self._parts[name] = result
        self._count += 1

    def once(self, name: str, make: Callable[[], T]) -> T:
        """The kept result, or what is made now."""
        if name not in self._parts:
            self.keep(name, make())
        found: T = self._parts[name]
        return found

    def parts(self) -> dict[str, Any]:
        """All results, by name."""
        return dict(self._parts)

    def count(self) -> int:
        """How many results were kept in this process."""
        return self._count
