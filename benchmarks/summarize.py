"""How long ``summarize`` takes over many healing runs, by way of reading their trajectories.

Makes a store of heal runs (tags, parameters, metrics and ``metrics.jsonl`` as the heal stage leaves
them), once for direct SQLite and once behind an HTTP tracking server, and times in a fresh process
each: finding the runs, reading them, pooling them, drawing and storing the summary. Ways:

* ``bulk``: one bulk history per metric and hundred runs (what ``summarize`` does);
* ``artifact``: each run's ``metrics.jsonl``, one after the other;
* ``threads``: the same in 8 threads;
* ``tag``: the trajectory as one compressed tag, found with the run.

    python -m benchmarks.summarize [--runs 1000] [--rounds 3] [--ways bulk,artifact,threads,tag]
        [--stores sqlite,http]

Ten thousand runs take 3 GB of disk for each store.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import resource
import shutil
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import torch
from mlflow.tracking import MlflowClient

from benchmarks.stopwatch import Stopwatch
from benchmarks.table import Row, at_most, save, show
from healing.config.summarize import SummarizeConfig
from healing.stages import summarize as stage
from healing.stages import summarize_inputs
from healing.statistics.heal_runs import ENDPOINTS, HealRun
from healing.tracking import queries
from healing.tracking.metric_history import Trajectory

METRICS = (
    "effective_rank", "perplexity", "loss", "train_loss", "grad_norm", "nonfinite_tokens",
    "tokens_per_second", "rank_recovery_pct", "loss_recovery_pct", "ppl_improvement_pct",
)  # fmt: skip
TARGETS = {
    1000: {"sqlite": (20, 1000), "http": (60, 1000)},
    10_000: {"sqlite": (90, 2000), "http": (90, 2000)},
}
"""Runs → store → seconds and megabytes."""
POINTS, INTERVAL = 51, 10
MODELS = {"nano": 309_792, "micro": 1_317_632}
ARMS = ("haep", "gaussian_noise", "spectral", "random_tokens", "random_text")
REPLICATES = 5


def trajectory(rng: np.random.Generator) -> np.ndarray:
    """Plausible numbers, (points, metrics); recoveries rise from 0."""
    rise = 1 - np.exp(-np.arange(POINTS) / 10)
    values = rng.normal(10.0, 1.0, (POINTS, len(METRICS)))
    values[:, METRICS.index("nonfinite_tokens")] = 0.0
    for name in ENDPOINTS:
        if name in METRICS:
            noise = rng.normal(0.0, 2.0, POINTS) * (np.arange(POINTS) > 0)
            values[:, METRICS.index(name)] = rng.uniform(10, 90) * rise + noise
    return values


def tags_of(number: int) -> dict[str, str]:
    model = tuple(MODELS)[number % 2]
    arm = ARMS[number // 2 % 5]
    checkpoint = number // 10 // REPLICATES
    return {
        "stage": "heal", "model": model, "arm": arm, "settings": "s", "status": "ok",
        "checkpoint_id": f"{model}-{arm}-{checkpoint}", "attack_seed": str(checkpoint),
        "replicate": str(number // 10 % REPLICATES), "spectral_state": "collapsed",
        "verdict": "partial", "verdict_loss": "partial", "fingerprint": f"{number:016x}",
        "mlflow.note.content": "A healing run. " * 20,
    }  # fmt: skip


PARAMS, TAGS, LATEST = 52, 48, 74
"""That a healing run of nano with the default settings has."""


def make_store(folder: pathlib.Path, count: int) -> None:
    """The first run through MLflow's client; the others are its rows again, with their own tags,
    parameters and points.
    """
    rng = np.random.default_rng(0)
    os.environ["MLFLOW_TRACKING_URI"] = uri = f"sqlite:///{folder}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment("bench", artifact_location=f"{folder}/artifacts")
    first = client.create_run(experiment, run_name="heal 0").info.run_id
    client.set_terminated(first)
    database = sqlite3.connect(folder / "mlflow.db")
    database.row_factory = sqlite3.Row
    run = dict(database.execute("SELECT * FROM runs").fetchone())
    for start in range(0, count, 500):
        rows: dict[str, list[dict[str, object]]] = {name: [] for name in TABLES}
        for number in range(start, min(start + 500, count)):
            run_id = f"{number:032x}"
            own = {
                "run_uuid": run_id,
                "name": f"heal {number}",
                "start_time": run["start_time"] + number,
                "artifact_uri": f"{folder}/artifacts/{run_id}/artifacts",
            }
            rows["runs"].append({**run, **own})
            _add_run(rows, folder, run_id, number, trajectory(rng))
        for name, found in rows.items():
            columns = list(found[0])
            places = ", ".join("?" * len(columns))
            database.executemany(
                f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({places})",
                [tuple(row.values()) for row in found],
            )
        database.commit()
    database.execute("DELETE FROM tags WHERE run_uuid = ?", (first,))
    database.execute("DELETE FROM runs WHERE run_uuid = ?", (first,))
    database.commit()
    database.close()


TABLES = ("runs", "tags", "params", "metrics", "latest_metrics")


def _add_run(
    rows: dict[str, list[dict[str, object]]],
    folder: pathlib.Path,
    run_id: str,
    number: int,
    values: np.ndarray,
) -> None:
    """One run's rows, and its file of records."""
    tags = tags_of(number)
    tags |= {f"other_{i}": f"value {i} of run {number}" for i in range(TAGS - len(tags))}
    params = {"n_params": str(MODELS[tags["model"]]), "model": tags["model"]}
    params |= {f"heal.option_{i}": str(i) for i in range(PARAMS - len(params))}
    for name, found in (("tags", tags), ("params", params)):
        rows[name] += [{"key": k, "value": v, "run_uuid": run_id} for k, v in found.items()]
    lines = []
    point: dict[str, object] = {"is_nan": 0, "run_uuid": run_id}
    for i, row in enumerate(values.tolist()):
        step, moment = i * INTERVAL, 1_700_000_000_000 + 1000 * i
        own = dict(zip(METRICS, row, strict=True))
        point |= {"timestamp": moment, "step": step}
        rows["metrics"] += [{"key": k, "value": v, **point} for k, v in own.items()]
        lines.append(json.dumps({"step": step, **own}))
    last = own | {"summary/steps": float(step)}
    last |= {f"summary/{i}": float(i) for i in range(LATEST - len(last))}
    rows["latest_metrics"] += [{"key": k, "value": v, **point} for k, v in last.items()]
    place = folder / "artifacts" / run_id / "artifacts"
    place.mkdir(parents=True)
    (place / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def served_copy(folder: pathlib.Path, copy: pathlib.Path) -> None:
    """The same store as a server would have made it: artifacts go through the server."""
    shutil.copytree(folder, copy)
    database = sqlite3.connect(copy / "mlflow.db")
    for table, column in (("runs", "artifact_uri"), ("experiments", "artifact_location")):
        database.execute(
            f"UPDATE {table} SET {column} = replace({column}, ?, 'mlflow-artifacts:/')",
            (f"{folder}/artifacts",),
        )
        database.execute(
            f"UPDATE {table} SET {column} = replace({column}, 'mlflow-artifacts://', "
            "'mlflow-artifacts:/')"
        )
    database.commit()
    database.close()


def add_tags(folder: pathlib.Path) -> None:
    """Give every run its trajectory as a tag."""
    database = sqlite3.connect(folder / "mlflow.db")
    rows = []
    for path in sorted((folder / "artifacts").glob("*/artifacts/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        table = [[row["step"], *(row.get(e) for e in ENDPOINTS)] for row in lines]
        packed = base64.b64encode(zlib.compress(json.dumps(table).encode())).decode()
        rows.append(("trajectory", packed, path.parents[1].name))
    print(f"a trajectory tag has {max(len(r[1]) for r in rows)} characters (limit 8,000)")
    database.executemany("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", rows)
    database.commit()
    database.close()


def from_tag(view: queries.RunView) -> Trajectory:
    table = json.loads(zlib.decompress(base64.b64decode(view.tags["trajectory"])))
    columns = list(zip(*table, strict=True))
    values = {
        e: tuple(float("nan") if v is None else v for v in column)
        for e, column in zip(ENDPOINTS, columns[1:], strict=True)
    }
    return Trajectory(tuple(columns[0]), values)


def read(way: str, views: list[queries.RunView]) -> list[HealRun]:
    if way == "bulk":
        return summarize_inputs.read_runs(views, lambda text: sys.exit(f"not in bulk: {text}"))
    if way == "threads":
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(summarize_inputs.from_artifact, views))
    else:
        found = [
            {"artifact": summarize_inputs.from_artifact, "tag": from_tag}[way](v) for v in views
        ]
    return [summarize_inputs._heal_run(v, t) for v, t in zip(views, found, strict=True)]


def peak_megabytes() -> float:
    """Peak resident memory of this process (VmHWM), where the system tells."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        (line,) = [x for x in status.read_text().splitlines() if x.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str) -> dict[str, object]:
    """Seconds of each step, in this process: of the whole stage, or without its figures where it
    reads in another way than it does.
    """
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    config = SummarizeConfig(
        experiment="bench", verbosity="quiet", output_dir=tempfile.mkdtemp(dir=".")
    )
    runs: list[HealRun] = []

    def kept(views: list[queries.RunView], *_: object) -> list[HealRun]:
        runs.extend(read(way, views))
        return list(runs)

    steps = {name: (stage, name) for name in ("find_runs", "read_runs", "summarize_runs")}
    watch = Stopwatch(torch.device("cpu"))
    begin, started = time.perf_counter(), time.process_time()
    with mock.patch.object(stage, "read_runs", kept), watch.on(steps):
        if way == "bulk":
            os.environ["MLFLOW_EXPERIMENT_NAME"] = "summaries"
            stage.summarize(config)
        else:
            found = stage.read_runs(stage.find_runs(config))
            stage.summarize_runs(found, config.confidence, np.random.default_rng(0))
    whole = time.perf_counter() - begin if way == "bulk" else float("nan")
    busy, peak = time.process_time() - started, peak_megabytes()
    digest = hashlib.sha256(repr([(r.name, r.steps, dict(r.trajectory)) for r in runs]).encode())
    find, took, pool = (watch.seconds[name] for name in steps)
    return {"runs": len(runs), "find": find, "read": took, "pool": pool, "cpu": busy,
            "whole": whole, "peak": peak, "digest": digest.hexdigest()[:12]}  # fmt: skip


def in_fresh_process(way: str, uri: str, folder: pathlib.Path) -> dict[str, object]:
    done = subprocess.run(
        [sys.executable, __file__, "--measure", way],
        env={**os.environ, "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1",
             "PYTHONPATH": str(pathlib.Path(__file__).parents[1])},
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{way} on {uri} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def serve(
    folder: pathlib.Path, database: str = "", workers: int = 1
) -> tuple[subprocess.Popen[bytes], str]:
    """A tracking server and its address; its files, and without another database that too, are in
    the folder.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri",
         database or f"sqlite:///{folder}/mlflow.db", "--artifacts-destination",
         f"{folder}/artifacts", "--workers", str(workers), "--port", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=folder,
        env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true",
             "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
    )  # fmt: skip
    uri = f"http://127.0.0.1:{port}"
    for _ in range(240):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=1)
            return server, uri
        except OSError:
            time.sleep(0.5)
    server.terminate()
    sys.exit("the tracking server did not start")


def table(results: dict[tuple[str, str], list[dict[str, object]]]) -> str:
    """Markdown: medians over rounds, with the range of the sum of find and read."""
    header = (
        "store", "way", "find s", "read s", "pool s", "find + read + pool s", "of it own CPU s",
        "whole stage with figures s", "peak MB",
    )  # fmt: skip
    lines = [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]
    for (store, way), rounds in results.items():
        middle = {k: statistics.median(r[k] for r in rounds)
                  for k in ("find", "read", "pool", "cpu", "whole", "peak")}  # fmt: skip
        sums = [r["find"] + r["read"] + r["pool"] for r in rounds]
        whole = "" if middle["whole"] != middle["whole"] else f"{middle['whole']:.1f}"
        lines.append(
            f"| {store} | {way} | {middle['find']:.1f} | {middle['read']:.1f} | "
            f"{middle['pool']:.1f} | {statistics.median(sums):.1f} "
            f"({min(sums):.1f}–{max(sums):.1f}) | {middle['cpu']:.1f} | {whole} | "
            f"{middle['peak']:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ways", default="bulk,artifact,threads,tag")
    parser.add_argument("--stores", default="sqlite,http")
    parser.add_argument("--json", default="")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    results: dict[tuple[str, str], list[dict[str, object]]] = {}
    stores, ways = arguments.stores.split(","), arguments.ways.split(",")
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        begin = time.perf_counter()
        (root / "direct").mkdir()
        make_store(root / "direct", arguments.runs)
        if "tag" in ways:
            shutil.copytree(root / "direct", root / "direct_tagged")
            add_tags(root / "direct_tagged")
        if "http" in stores:
            for folder in list(root.iterdir()):
                served_copy(folder, root / folder.name.replace("direct", "served"))
        print(f"store of {arguments.runs} runs made in {time.perf_counter() - begin:.0f} s")
        for way in ways:
            tagged = "_tagged" if way == "tag" else ""
            direct = root / f"direct{tagged}"
            with contextlib.ExitStack() as ending:
                addresses = {"sqlite": f"sqlite:///{direct}/mlflow.db"}
                if "http" in stores:
                    server, addresses["http"] = serve(root / f"served{tagged}")
                    ending.callback(server.wait)
                    ending.callback(server.terminate)
                for _, store in itertools.product(range(arguments.rounds), stores):
                    found = in_fresh_process(way, addresses[store], direct)
                    results.setdefault((store, way), []).append(found)
                    print(f"{store} {way} load {os.getloadavg()[0]:.1f}: {found}", flush=True)
    assert len({r["digest"] for rounds in results.values() for r in rounds}) == 1
    print(f"\nAll ways give the same {arguments.runs} runs. Load at the end: {os.getloadavg()}\n")
    print(table(results))
    rows = []
    for (store, way), rounds in results.items():
        what = f"{arguments.runs} runs, {{}} from {store} ({way})"
        steps = [r["find"] + r["read"] + r["pool"] for r in rounds]
        seconds, megabytes = TARGETS.get(arguments.runs, {}).get(store, (math.inf, math.inf))
        rows.append(at_most(what.format("find, read, pool"), steps, "s", seconds))
        if way == "bulk":
            rows.append(Row(what.format("whole stage"), tuple(r["whole"] for r in rounds), "s"))
        rows.append(
            at_most(what.format("peak memory"), [r["peak"] for r in rounds], "MB", megabytes)
        )
    show("summarize", rows)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
