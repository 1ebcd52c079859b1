"""What measuring and tracking cost in a default healing run.

Heals ``micro`` and divides the time of the run into training steps, measurements (probe forward,
spectra of all blocks, recovery) and metric logging to an SQLite store (every request of the loop;
the run's fixed cost, its parameters, tags and artifacts, is not in it). Medians over rounds.

    python benchmarks/overhead.py [--model micro] [--steps 50] [--rounds 5]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time

from healing import tracking
from healing.config import AttackConfig, HealConfig, resolve
from healing.experiment.attack import attack_cell
from healing.experiment.loading import load_inputs, training_windows, use_threads
from healing.randomness import named_generator
from healing.sft import heal


def timed(loaded, config, windows, probe, collapsed, run=None) -> tuple[float, float, float]:
    """Seconds of one healing: in all, training alone, logging alone."""
    logging = training = 0.0
    begin = time.perf_counter()
    done = 0
    order = named_generator(0, "sft")
    for record in heal(loaded, config, windows, probe, collapsed, order):
        if record.step:
            tokens = (record.step - done) * config.batch_size * config.sequence_length
            training += tokens / record.tokens_per_second
            done = record.step
        if run is not None:
            start = time.perf_counter()
            run.metrics({k: v for k, v in record.metrics().items() if v == v}, record.step)
            logging += time.perf_counter() - start
    if run is not None:
        start = time.perf_counter()
        run.flush()
        logging += time.perf_counter() - start
    return time.perf_counter() - begin, training, logging


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    config = resolve(HealConfig(model=arguments.model, healing_steps=arguments.steps))
    use_threads(config)
    attacked = attack_cell(AttackConfig(model=arguments.model, arm="random_tokens"))
    corpus, _, probe = load_inputs(config)
    windows = training_windows(config, corpus, attacked.loaded)
    collapsed = probe.measure(attacked.loaded.model)
    shares_measuring, shares_logging, speeds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(pathlib.Path(folder))
        with tracking.start("overhead", {"stage": "benchmark"}) as run:
            for _ in range(arguments.rounds):
                total, training, logging = timed(
                    attacked.loaded, config, windows, probe, collapsed, run
                )
                shares_measuring.append((total - training - logging) / total)
                shares_logging.append(logging / total)
                speeds.append(config.healing_steps / training)
    n = len(shares_measuring)
    print(f"{arguments.model}, {arguments.steps} steps, {n} rounds, {config.threads} thread(s)")
    print("share of a healing run      median    min    max    target")
    for name, values, target in (
        ("measuring (probe, spectra)", shares_measuring, "<= 25 %"),
        ("MLflow logging", shares_logging, "<= 3 %"),
    ):
        low, mid, high = min(values), statistics.median(values), max(values)
        print(f"{name:27s} {100 * mid:5.1f} % {100 * low:5.1f} {100 * high:5.1f}    {target}")
    print(f"training speed: {statistics.median(speeds):.2f} steps/s (median)")
    print(json.dumps({"measuring": shares_measuring, "logging": shares_logging}))


if __name__ == "__main__":
    main()
