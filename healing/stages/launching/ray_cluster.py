"""A cluster of Ray: one that is there, or one that is started for a command."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Collection, Iterator
from typing import Any

from healing.errors import ConfigError
from healing.stages.launching.shares import Machine

OBJECT_STORE = 80 * 2**20
"""Bytes of the store for objects of a cluster that is started here, Ray's least (75 MB) and a
little: descriptions are all that goes through it."""
NAMESPACE = "llm-healing"
ON_HEAD: dict[str, Any] = {
    "num_cpus": 0,
    "resources": {"node:__internal_head__": 0.001},
    "max_restarts": -1,
    "max_task_retries": -1,
}
"""Options of an actor that a sweep needs to its end. Without the head there is no cluster; any
other machine may be taken away, with what the actor counted. If its process alone dies it begins
anew, and who asked it meanwhile waits and asks again: an answer may be given twice."""
_NO_REPORTS = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Of how the cluster is used, which Ray would send to its makers."""


@contextlib.contextmanager
def connected(address: str) -> Iterator[Any]:
    """The library, connected to a cluster for the block. One that this process is connected to
    already is taken, and left as it is.

    Args:
        address: As of ``--ray-address``.

    Raises:
        ConfigError: The library is missing, or there is no cluster.
    """
    ray = _library()
    if ray.is_initialized():
        yield ray
        return
    begun: dict[str, Any] = {"address": address, "namespace": NAMESPACE}
    if not address:
        begun |= {
            "address": "local",
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE,
        }
    if not address.startswith("ray://"):
        begun |= {"log_to_driver": False, "logging_level": "ERROR"}
    with _as_before():
        try:
            ray.init(**begun)
        except Exception as error:  # Ray raises all kinds, and plain ones
            why = " ".join(str(error).split())[:300] or type(error).__name__
            raise ConfigError(
                f"--ray-address {address or '(empty)'}: no Ray cluster could be "
                f"{'reached' if address else 'started'} ({why})"
            ) from error
    try:
        yield ray
    finally:
        with _as_before():
            ray.shutdown()


def _library() -> Any:
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ConfigError(
            "--launcher ray needs Ray: pip install 'llm-healing[ray]', here and on every machine"
        ) from error
    return ray


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Handlers of signals, which are the command's, and the environment are as before afterwards:
    Ray sets its own handler of SIGTERM.
    """
    is_main = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGTERM, signal.SIGINT) if is_main else ()
    handlers = {number: signal.getsignal(number) for number in signals}
    fresh = {name: value for name, value in _NO_REPORTS.items() if name not in os.environ}
    os.environ.update(fresh)
    try:
        yield
    finally:
        for name in fresh:
            os.environ.pop(name, None)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def elsewhere(nodes: Collection[str]) -> dict[str, str] | None:
    """The label selector of a task that may run on any machine but these; ``None`` = on any."""
    return {"ray.io/node-id": f"!in({','.join(nodes)})"} if nodes else None


def machines(ray: Any) -> list[Machine]:
    """What is there now."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [
        Machine(
            str(node["NodeManagerAddress"]),
            float(node["Resources"].get("CPU", 0.0)),
            float(node["Resources"].get("GPU", 0.0)),
            float(node["Resources"].get("memory", 0.0)),
            str(node["NodeID"]),
            str(node["NodeManagerHostname"]),
        )
        for node in alive
    ]
