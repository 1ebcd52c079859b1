"""The write-ahead journal of a run: on disk first, then in the store."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Mapping

from healing.tracking.run import Run
from healing.tracking.run_files import JsonLines


class Journal:
    """``metrics.jsonl`` of a run and the points in its store.

    Args:
        path: Of the file, which appears with the first record; ``None`` = there is none.
        run: That is logged to.
        kept_back: Beginnings of the names that are on disk alone.
    """

    def __init__(
        self, path: pathlib.Path | None, run: Run, kept_back: tuple[str, ...] = ()
    ) -> None:
        self._path, self._run, self._kept_back = path, run, kept_back
        self._lines: JsonLines | None = None
        self._began = time.perf_counter()

    @property
    def run_id(self) -> str:
        """Of the run that is logged to."""
        return self._run.run_id

    def record(self, step: int, values: Mapping[str, float]) -> None:
        """Write one record to disk, then send what of it is a number; without a file all of it."""
        sent = dict(values)
        if self._path is not None:
            sent = {
                k: v
                for k, v in values.items()
                if not math.isnan(v) and not k.startswith(self._kept_back)
            }
            self._lines = self._lines or JsonLines(self._path)
            seconds = time.perf_counter() - self._began
            self._lines.append({"step": step, "seconds": seconds, **values})
        self._run.metrics(sent, step)
