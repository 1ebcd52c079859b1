"""What Ray adds to a cell: the same sweep in threads of one process and as tasks of a cluster that
is started here, the same number of chains at a time.

Cells are nano's with few steps, one seed a chain. Both ways begin with an empty store. Counted is
the sweep without its summary, and without what is paid once, however many cells there are: the
start of the cluster and its workers' imports are a row of their own, as those of the command are
over before. Needs Ray.

    python -m benchmarks.launchers [--cells 64] [--parallel 2] [--rounds 1] [--steps 4]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import torch

from benchmarks.stopwatch import Stopwatch
from benchmarks.table import Row, at_most, ratios, save, show
from healing.config.sweep import SweepConfig
from healing.stages import sweep as stage

ARMS = ("none", "random_tokens")
TARGET = 0.1
WAYS = ("local", "ray")


def config_of(way: str, cells: int, parallel: int, steps: int) -> SweepConfig:
    """The sweep; what differs between the ways determines no number."""
    seeds = max(1, round(cells / len(ARMS)))
    own = {}
    if way == "ray":
        folder = str(pathlib.Path("workers").absolute())
        own = {"worker_cpus": 1, "worker_memory": 0, "worker_dir": folder}
    return SweepConfig(
        models="nano", arms=",".join(ARMS), seeds=f"0-{seeds - 1}", attack_steps=2, device="cpu",
        healing_steps=steps, batch_size=2, sequence_length=64, measurement_interval=steps,
        verbosity="quiet", output_dir="output", launcher=way, workers=parallel, **own,
    )  # fmt: skip


def start(parallel: int) -> None:
    """A cluster whose workers have imported what they need."""
    import ray

    # A sweep takes a cluster that its process is connected to.
    ray.init(
        address="local",
        num_cpus=parallel,
        include_dashboard=False,
        namespace="llm-healing",
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )

    def imports() -> None:
        import healing.stages.launching.ray_worker  # noqa: F401

        time.sleep(1.0)  # so that no worker does two

    ray.get([ray.remote(imports).options(num_cpus=1).remote() for _ in range(parallel)])


def measure(way: str, cells: int, parallel: int, steps: int) -> dict[str, float]:
    """Seconds of one sweep, in this process, and what of it is the cluster's start."""
    config = config_of(way, cells, parallel, steps)
    starting = 0.0
    if way == "ray":
        begin = time.perf_counter()
        start(parallel)
        starting = time.perf_counter() - begin
    watch = Stopwatch(torch.device("cpu"))
    with watch.on({"summary": (stage, "summarized")}):
        begin = time.perf_counter()
        stage.sweep(config)
        took = time.perf_counter() - begin - watch.seconds["summary"]
    count = len(ARMS) * (config.seeds_by_model()["nano"][-1] + 1)
    return {"cells": float(count), "seconds": took, "starting": starting}


def in_fresh_process(way: str, given: list[str]) -> dict[str, float]:
    """As :func:`measure`, with a store of its own."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.launchers", "--measure", way, *given],
            env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db",
                 "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true",
                 "RAY_USAGE_STATS_ENABLED": "0",
                 # Ray gives its workers less of the processor; threads have no such handicap.
                 "RAY_worker_niceness": "0",
                 "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
            cwd=folder, capture_output=True, text=True, check=False,
        )  # fmt: skip
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=64)
    parser.add_argument("--parallel", type=int, default=2, help="chains at a time")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="of a healing")
    parser.add_argument("--json", default="")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if importlib.util.find_spec("ray") is None:
        sys.exit("benchmarks.launchers needs Ray: pip install 'llm-healing[ray]'")
    sizes = arguments.cells, arguments.parallel, arguments.steps
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, *sizes)))
        return
    given = [f"--{name}={value}" for name, value in
             zip(("cells", "parallel", "steps"), sizes, strict=True)]  # fmt: skip
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for turn in range(arguments.rounds):
        for way in WAYS if turn % 2 == 0 else WAYS[::-1]:
            found[way].append(in_fresh_process(way, given))
            print(f"{way} load {os.getloadavg()[0]:.1f}: {found[way][-1]}", flush=True)
    cells = found["local"][0]["cells"]
    seconds = {way: [r["seconds"] for r in rounds] for way, rounds in found.items()}
    more = [ratio - 1.0 for ratio in ratios(seconds["ray"], seconds["local"])]
    rows = [
        Row(f"{way}: a cell", tuple(1000 * s / cells for s in seconds[way]), "ms") for way in WAYS
    ]
    rows.append(at_most("Ray's overhead, share of the local time", more, "", TARGET))
    starts = tuple(r["starting"] for r in found["ray"])
    rows.append(Row("ray: start of a cluster and its workers, once", starts, "s"))
    show(f"{cells:.0f} cells of nano, {arguments.parallel} chains at a time", rows)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
