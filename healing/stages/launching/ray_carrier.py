"""What Ray carries to a machine: a function that is loaded there without this package, so that a
machine that lacks it, or has another version of it, can say so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BROKEN = (
    ImportError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    RuntimeError,
    SyntaxError,
    OSError,
)
"""What an installation raises that is another one, in parts, or not there."""


def carried() -> Callable[[bytes, Any], Any]:
    """A function that takes a pickled chain, with what its cells may find again, and the board of
    the sweep; its answers are those of :func:`healing.stages.launching.ray_worker.work`.

    Ray pickles a function of a module by its name, which is looked up where it is loaded, and one
    that is made inside another as it is.
    """

    def run(description: bytes, board: Any) -> Any:
        import pickle
        import platform

        import ray

        try:
            from healing.stages.launching.ray_worker import work

            task, finished = pickle.loads(description)
        except BROKEN as error:
            why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            node = ray.get_runtime_context().get_node_id()
            return node, platform.node(), f"this package cannot be loaded there ({why})"
        return work(task, finished, board)

    return run
