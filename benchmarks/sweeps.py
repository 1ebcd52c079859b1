"""What a sweep costs beside its computing: cells that compute nothing, through planner, store and
summary, by their number.

Each size has a store of its own, a SQLite file or a tracking server before PostgreSQL (Debian's,
where it is installed), and a process of its own, which runs the sweep and then runs it again, so
that every cell is found. Seconds per cell should not grow with the number of cells.

    python -m benchmarks.sweeps [--cells 100,300,1000,3000] [--stores sqlite,postgresql]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from benchmarks.stopwatch import Stopwatch
from benchmarks.summarize import peak_megabytes, serve
from benchmarks.table import Row, at_most, save, show
from benchmarks.trivial_cells import settings, trivial_cells
from healing.stages import sweep as stage
from healing.stages.launching.chain import chains_of
from tests.servers import backends

GROWTH = 1.5
"""That seconds per cell may grow by, from the smallest number of cells to the largest."""


def measure(cells: int) -> dict[str, float]:
    """Seconds in this process: to plan, to run, to find all again, and of that to summarize."""
    config = settings(cells, pathlib.Path("output").absolute())
    begin = time.perf_counter()
    planned = chains_of(config, {})
    found = {"cells": float(sum(len(c.cells) for c in planned))}
    found["plan"] = time.perf_counter() - begin
    with trivial_cells():
        for name in ("first", "again"):
            watch = Stopwatch(torch.device("cpu"))
            begin, busy = time.perf_counter(), time.process_time()
            with watch.on({"summary": (stage, "summarized")}):
                stage.sweep(config)
            found["summary"] = watch.seconds["summary"]
            found[name] = time.perf_counter() - begin - found["summary"]
            found[f"{name} cpu"] = time.process_time() - busy
    return found | {"peak": peak_megabytes()}


@contextlib.contextmanager
def store(kind: str, folder: pathlib.Path) -> Iterator[str]:
    """The address of a new store."""
    if kind == "sqlite":
        yield f"sqlite:///{folder}/mlflow.db"
        return
    with backends.postgresql() as database:
        server, uri = serve(folder, database, workers=2)
        try:
            yield uri
        finally:
            server.terminate()
            server.wait()


def in_fresh_process(cells: int, uri: str, folder: pathlib.Path) -> dict[str, float]:
    """As :func:`measure`."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.sweeps", "--measure", str(cells)],
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1",
             "MLFLOW_DISABLE_TELEMETRY": "true",
             "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{cells} cells in {uri} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def rows_of(kind: str, sizes: list[dict[str, float]]) -> list[Row]:
    """Per cell at each size, and how that grows."""
    rows = []
    for found in sizes:
        what, cells = f"{kind}, {found['cells']:.0f} cells, {{}}", found["cells"]
        rows.append(Row(what.format("run"), (1000 * found["first"] / cells,), "ms a cell"))
        rows.append(Row(what.format("found again"), (1000 * found["again"] / cells,), "ms a cell"))
        rows.append(Row(what.format("summary"), (found["summary"],), "s"))
        rows.append(Row(what.format("peak memory"), (found["peak"],), "MB"))
    few, many = sizes[0], sizes[-1]
    for name in ("first", "again"):
        growth = (many[name] / many["cells"]) / (few[name] / few["cells"])
        span = f"{few['cells']:.0f} to {many['cells']:.0f} cells"
        rows.append(at_most(f"{kind}, {name}: growth a cell, {span}", [growth], "", GROWTH))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default="100,300,1000,3000")
    parser.add_argument("--stores", default="sqlite,postgresql")
    parser.add_argument("--json", default="")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    rows = []
    for kind in arguments.stores.split(","):
        if kind == "postgresql" and (why := backends.no_postgresql()):
            print(f"left out: {why}")
            continue
        sizes = []
        for cells in map(int, arguments.cells.split(",")):
            with tempfile.TemporaryDirectory() as name, store(kind, pathlib.Path(name)) as uri:
                sizes.append(in_fresh_process(cells, uri, pathlib.Path(name)))
            print(f"{kind} load {os.getloadavg()[0]:.1f}: {sizes[-1]}", flush=True)
        rows += rows_of(kind, sizes)
    show("Sweeps of cells that compute nothing", rows)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
