"""MLflow's client asked once: who sends repeats by itself, and looks first at what has arrived.

The client repeats every request that fails on its way (``MLFLOW_HTTP_REQUEST_MAX_RETRIES``), also
one that makes a run: an answer that was lost before its first byte would make it twice.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

from mlflow.utils import rest_utils

_ONCE = contextvars.ContextVar("ONCE", default=False)


class _Retries:
    """Stands where MLflow's client looks up how often it repeats."""

    def __init__(self, variable: Any) -> None:
        self._variable = variable

    def get(self) -> Any:
        """None in a block of :func:`once`; elsewhere what the environment says."""
        return 0 if _ONCE.get() else self._variable.get()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._variable, name)

    def __str__(self) -> str:
        return str(self._variable)


# Not the environment variable, which other threads, and processes that are started, read too.
_REST: Any = rest_utils
_REST.MLFLOW_HTTP_REQUEST_MAX_RETRIES = _Retries(_REST.MLFLOW_HTTP_REQUEST_MAX_RETRIES)


@contextlib.contextmanager
def once() -> Iterator[None]:
    """MLflow's client repeats nothing that this thread asks for the block."""
    token = _ONCE.set(True)
    try:
        yield
    finally:
        _ONCE.reset(token)
