"""Seconds from SIGTERM to the end of a command, at moments drawn over a run.

An attack and a healing run, as whole commands (preparing, training, measuring, finishing), are told
to stop, each from its own fresh start, at moments that are spread over the time that it takes when
nobody stops it; the same draws every time.

    python -m benchmarks.stopping [--model micro] [--rounds 10] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

from benchmarks.table import Row, save, show

LIMIT = 10.0
"""Seconds, on micro."""
STEPS = 60


def command(stage: str, place: pathlib.Path, *arguments: str) -> subprocess.Popen[bytes]:
    """A whole command with a store and an output folder of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", f"entrypoints.{stage}", *arguments, f"--output-dir={place}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{place}.db"},
    )  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    model, draws, rows = f"--model={options.model}", random.Random(0), []
    with tempfile.TemporaryDirectory() as scratch:
        root = pathlib.Path(scratch)
        if command("attack", root / "first", model, "--attack-steps=40").wait():
            sys.exit("the attack failed")
        (checkpoint,) = (root / "first").rglob("checkpoint_*.pt")
        ways = {
            "attack": (model, "--attack-steps=40"),
            "heal": (model, f"--collapsed-checkpoint={checkpoint}", f"--healing-steps={STEPS}"),
        }
        for stage, arguments in ways.items():
            begin = time.perf_counter()
            command(stage, root / f"whole_{stage}", *arguments).wait()
            whole, seconds = time.perf_counter() - begin, []
            for number in range(options.rounds):
                process = command(stage, root / f"{stage}_{number}", *arguments)
                time.sleep(whole * draws.uniform(0.2, 0.95))
                if process.poll() is not None:
                    continue  # it was faster than the one that nobody stopped
                told = time.perf_counter()
                process.send_signal(signal.SIGTERM)
                code = process.wait()
                seconds.append(time.perf_counter() - told)
                print(f"{stage} {number}: {seconds[-1]:.2f} s, exit code {code}", flush=True)
            what = f"{options.model}: from SIGTERM to the end of {stage}"
            met = max(seconds) <= LIMIT
            rows.append(Row(what, tuple(seconds), "s", f"each <= {LIMIT:g}", met))
    save(options.json, rows)
    show("Stopping", rows)


if __name__ == "__main__":
    main()
