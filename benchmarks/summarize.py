"""How long ``summarize`` takes over many healing runs, by way of reading their trajectories.

Makes a store of heal runs (tags, parameters, metrics and ``metrics.jsonl`` as the heal stage leaves
them), once for direct SQLite and once behind an HTTP tracking server, and times in a fresh process
each: finding the runs, reading them, pooling them, drawing and storing the summary. Ways:

* ``bulk``: one bulk history per metric and hundred runs (what ``summarize`` does);
* ``artifact``: each run's ``metrics.jsonl``, one after the other;
* ``threads``: the same in 8 threads;
* ``tag``: the trajectory as one compressed tag, found with the run.

    python -m benchmarks.summarize [--runs 1000] [--rounds 3] [--ways bulk,artifact,threads,tag]
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import logging
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

import numpy as np

from benchmarks.table import at_most, save, show
from healing.config.summarize import SummarizeConfig
from healing.stages import summarize_inputs
from healing.stages.summarize import find_runs, summarize
from healing.statistics.heal_runs import ENDPOINTS
from healing.statistics.summary import summarize_runs
from healing.tracking import queries, run_logger
from healing.tracking.metric_history import Trajectory

METRICS = (
    "effective_rank", "perplexity", "loss", "train_loss", "grad_norm", "nonfinite_tokens",
    "tokens_per_second", "rank_recovery_pct", "loss_recovery_pct", "ppl_improvement_pct",
)  # fmt: skip
TARGET_SECONDS, TARGET_MEGABYTES = {"sqlite": 20, "http": 60}, 1000
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


def make_store(folder: pathlib.Path, count: int) -> None:
    """Runs through MLflow's client, their points in one SQL insert each."""
    rng = np.random.default_rng(0)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    client = run_logger.MlflowClient()
    experiment = client.create_experiment("bench", artifact_location=f"{folder}/artifacts")
    points, latest = [], []
    for number in range(count):
        tags = tags_of(number)
        run = client.create_run(experiment, tags=tags, run_name=f"heal {number}").info
        values = trajectory(rng)
        params = {f"heal.option_{i}": str(i) for i in range(25)}
        params |= {"n_params": str(MODELS[tags["model"]]), "model": tags["model"]}
        client.log_batch(run.run_id, params=[run_logger.Param(k, v) for k, v in params.items()])
        rows = []
        for i, row in enumerate(values.tolist()):
            step, moment = i * INTERVAL, 1_700_000_000_000 + 1000 * i
            points += [
                (k, v, moment, step, 0, run.run_id) for k, v in zip(METRICS, row, strict=True)
            ]
            rows.append(json.dumps({"step": step, **dict(zip(METRICS, row, strict=True))}))
        last = dict(zip(METRICS, values[-1].tolist(), strict=True))
        last |= {f"summary/{i}": float(i) for i in range(18)}
        last["summary/steps"] = float(step)
        latest += [(k, v, moment, step, 0, run.run_id) for k, v in last.items()]
        own = folder / "artifacts" / run.run_id / "artifacts"
        own.mkdir(parents=True)
        (own / "metrics.jsonl").write_text("\n".join(rows) + "\n")
        client.set_terminated(run.run_id)
    database = sqlite3.connect(folder / "mlflow.db")
    columns = "key, value, timestamp, step, is_nan, run_uuid"
    for name, rows in (("metrics", points), ("latest_metrics", latest)):
        database.executemany(f"INSERT INTO {name} ({columns}) VALUES (?, ?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()


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


def read(way: str, views: list[queries.RunView]) -> list[summarize_inputs.HealRun]:
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
    """Seconds of each step, in this process."""
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    config = SummarizeConfig(
        experiment="bench", verbosity="quiet", output_dir=tempfile.mkdtemp(dir=".")
    )
    marks, busy = [time.perf_counter()], time.process_time()
    views = find_runs(config)
    marks.append(time.perf_counter())
    runs = read(way, views)
    marks.append(time.perf_counter())
    summarize_runs(runs, 0.95, np.random.default_rng(0))
    marks.append(time.perf_counter())
    busy = time.process_time() - busy
    peak, whole = peak_megabytes(), float("nan")
    if way == "bulk":
        os.environ["MLFLOW_EXPERIMENT_NAME"] = "summaries"
        summarize(config)
        whole, peak = time.perf_counter() - marks[-1], peak_megabytes()
    digest = hashlib.sha256(repr([(r.name, r.steps, dict(r.trajectory)) for r in runs]).encode())
    find, took, pool = (b - a for a, b in itertools.pairwise(marks))
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


def serve(folder: pathlib.Path) -> tuple[subprocess.Popen[bytes], str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--backend-store-uri",
         f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", f"{folder}/artifacts",
         "--workers", "1", "--port", str(port)],
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
    parser.add_argument("--json", default="")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure)))
        return
    results: dict[tuple[str, str], list[dict[str, object]]] = {}
    with tempfile.TemporaryDirectory() as name:
        root = pathlib.Path(name)
        begin = time.perf_counter()
        (root / "direct").mkdir()
        make_store(root / "direct", arguments.runs)
        served_copy(root / "direct", root / "served")
        shutil.copytree(root / "direct", root / "tagged")
        add_tags(root / "tagged")
        shutil.copytree(root / "served", root / "served_tagged")
        add_tags(root / "served_tagged")
        print(f"store of {arguments.runs} runs made in {time.perf_counter() - begin:.0f} s")
        for way in arguments.ways.split(","):
            folder = root / ("tagged" if way == "tag" else "direct")
            served = root / ("served_tagged" if way == "tag" else "served")
            server, uri = serve(served)
            try:
                for _ in range(arguments.rounds):
                    for store, address in (
                        ("sqlite", f"sqlite:///{folder}/mlflow.db"), ("http", uri)
                    ):  # fmt: skip
                        found = in_fresh_process(way, address, folder)
                        results.setdefault((store, way), []).append(found)
                        print(f"{store} {way} load {os.getloadavg()[0]:.1f}: {found}", flush=True)
            finally:
                server.terminate()
                server.wait()
    assert len({r["digest"] for rounds in results.values() for r in rounds}) == 1
    print(f"\nAll ways give the same {arguments.runs} runs. Load at the end: {os.getloadavg()}\n")
    print(table(results))
    rows = [
        at_most(
            f"{arguments.runs} runs: find, read, pool from {store} ({way})",
            [r["find"] + r["read"] + r["pool"] for r in rounds],
            "s",
            TARGET_SECONDS[store],
        )
        for (store, way), rounds in results.items()
    ] + [
        at_most(
            f"{arguments.runs} runs: peak memory from {store} ({way})",
            [r["peak"] for r in rounds],
            "MB",
            TARGET_MEGABYTES,
        )
        for (store, way), rounds in results.items()
    ]
    show("summarize", rows)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
