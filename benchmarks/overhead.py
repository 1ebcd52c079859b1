"""What measuring and tracking cost in a default healing run.

Heals ``micro`` and divides the time of the run into training steps, measurements (probe forward,
spectra of all blocks, recovery) and metric logging to an SQLite store (every request of the loop;
the run's fixed cost, its parameters, tags and artifacts, is not in it). Medians over rounds.

    python -m benchmarks.overhead [--model micro] [--steps 50] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import time

from benchmarks.table import at_most, save, show
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.randomness import named_generator
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.cells.inputs import (
    load_inputs,
    resolve_from_model,
    training_windows,
    use_threads,
)
from healing.tracking import run_logger
from healing.training.healing_loop import heal


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
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    config = resolve_from_presets(HealConfig(model=arguments.model, healing_steps=arguments.steps))
    use_threads(config)
    attacked = outcome_of(
        attack_cell(resolve_from_model(AttackConfig(model=arguments.model, arm="random_tokens")))
    )
    corpus, _, probe = load_inputs(config)
    windows = training_windows(config, corpus, attacked.loaded)
    collapsed = probe.measure(attacked.loaded.model)
    measuring, logged, speeds = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(pathlib.Path(folder))
        with run_logger.start("overhead", {"stage": "benchmark"}) as run:
            for _ in range(arguments.rounds):
                total, training, logging = timed(
                    attacked.loaded, config, windows, probe, collapsed, run
                )
                measuring.append((total - training - logging) / total)
                logged.append(logging / total)
                speeds.append(config.healing_steps / training)
    rows = [
        at_most(f"{arguments.model}: measuring, share of a healing run", measuring, "", 0.25),
        at_most(f"{arguments.model}: MLflow logging, share of a healing run", logged, "", 0.03),
    ]
    speed = statistics.median(speeds)
    show(
        f"{arguments.model}, {arguments.steps} steps, {config.threads} thread(s), "
        f"{speed:.2f} training steps/s",
        rows,
    )
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
