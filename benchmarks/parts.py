"""A benchmark in parts: each begins with free memory and ends with its numbers on disk, those of
running out of memory too.
"""

from __future__ import annotations

import gc
import json
import math
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.stopwatch import synchronize
from healing.models.loading import LoadedModel

OK, OUT_OF_MEMORY, OUT_OF_TIME = "ok", "out of memory", "left out, the time was over"

Numbers = dict[str, Any]


class Report:
    """The file of one size, whole after every part.

    Attributes:
        path: JSON.
        content: What it holds.
    """

    def __init__(self, path: pathlib.Path, **facts: Any) -> None:
        self.path, self.content = path, facts

    def write(self, **numbers: Any) -> None:
        """Add numbers; a crash while writing leaves the former file."""
        self.content |= numbers
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)


def release(model: torch.nn.Module, device: torch.device) -> None:
    """Drop gradients and what nobody holds any more, and count peaks anew."""
    model.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Largest memory of tensors since :func:`release`; not counted on the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def run_part(
    report: Report,
    name: str,
    loaded: LoadedModel,
    action: Callable[[], Numbers],
    deadline: float = math.inf,
) -> Numbers | None:
    """Run one part and write its numbers, those of running out of memory too.

    Returns:
        What the action returned; ``None`` where it ran out of the device's memory, or where
        ``time.monotonic()`` is past the deadline.
    """
    device = loaded.device
    if time.monotonic() > deadline:
        report.write(**{name: {"status": OUT_OF_TIME}})
        return None
    release(loaded.model, device)
    synchronize(device)
    begin, found, message = time.perf_counter(), None, ""
    try:
        found = action()
        synchronize(device)
    except torch.OutOfMemoryError as error:
        # Text alone: the traceback holds the tensors of every frame that failed.
        message = str(error).partition("\n")[0]
    numbers = {
        "status": OK if found is not None else OUT_OF_MEMORY,
        **({"message": message} if found is None else {}),
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_bytes(device),
        **(found or {}),
    }
    report.write(**{name: numbers})
    peak = numbers["peak_bytes"]
    memory = f", peak {peak / 1e9:.1f} GB" if peak is not None else ""
    title = f"{report.content['model']}, {name.replace('_', ' ')}"
    print(f"[{title}: {numbers['status']}, {numbers['seconds']:.1f} s{memory}]", flush=True)
    return found
