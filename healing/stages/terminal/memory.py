"""Memory that ran out: one line for a person, where torch and Python raise errors of many kinds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from healing.errors import MemoryLackError

_SAID = ("can't allocate memory", "out of memory")
"""In messages of errors of no class of their own: the CPU's allocator, drivers."""


def is_lack(error: BaseException) -> bool:
    """Whether memory ran out, of the machine or of an accelerator."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return type(error).__module__ in ("builtins", "torch") and any(
        text in str(error) for text in _SAID
    )


@contextlib.contextmanager
def lack_told(where: Callable[[], str]) -> Iterator[None]:
    """Memory that runs out in the block is a failure that can be mended.

    Args:
        where: What was done at that moment, in words.

    Raises:
        MemoryLackError: In place of what torch or Python raised.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_lack(error):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise MemoryLackError(
            f"memory ran out ({where()}): {said[:200]}; use a smaller batch, window or model "
            "(--dry-run of attack and heal predicts what they take)"
        ) from error
