"""Does a language model that an attack made collapse heal under clean fine-tuning?

``healing.attack``, ``heal``, ``landscape``, ``sweep``, ``summarize``, ``measure``, ``arms``,
``methods`` and ``options`` are those of :mod:`healing.api`, which is imported when one of them is
first used. (The list of models is ``healing.api.models()``: ``healing.models`` is a package.)
"""

from typing import Any

__version__ = "0.1.0"

_API = (
    "arms",
    "attack",
    "heal",
    "landscape",
    "measure",
    "methods",
    "options",
    "summarize",
    "sweep",
)
__all__ = list(_API)


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'healing' has no attribute {name!r}")
    from healing import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_API])
