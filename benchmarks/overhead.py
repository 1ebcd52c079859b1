"""What measuring and tracking cost in a default healing run.

Heals a model and divides the time of the run into training steps, measurements (probe forward,
spectra of all blocks, recovery) and metric logging to an SQLite store (every request of the loop;
the run's fixed cost, its parameters, tags and artifacts, is not in it). A share of the whole run
counts the healthy and the collapsed state too, which are measured with their standard errors before
the first step. Medians over rounds.

    python -m benchmarks.overhead [--model micro] [--text FILE] [--steps 50] [--rounds 5]
        [--json FILE]

``--model`` takes a preset, or a folder or .gguf file, which needs ``--text``.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import statistics
import tempfile
import time

import torch

from benchmarks.table import Row, at_most, save, show
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.options import AUTO
from healing.measurements.probe import Probe
from healing.randomness import named_generator
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.cells.inputs import (
    corpus_for,
    resolve_from_model,
    training_windows,
    use_threads,
)
from healing.tracking import open_runs
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
    parser.add_argument("--text", default=AUTO, help="corpus; a model without a preset needs one")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="")
    arguments = parser.parse_args()
    given = {"model": arguments.model, "corpus": arguments.text}
    config = resolve_from_model(HealConfig(**given, healing_steps=arguments.steps))
    use_threads(config)
    # What a step costs does not depend on how far the model is from healthy.
    attack = AttackConfig(**given, arm="random_tokens", alignment="never", attack_steps=2)
    loaded = outcome_of(attack_cell(resolve_from_model(attack))).loaded
    corpus = corpus_for(config)
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length)
    windows = training_windows(config, corpus, loaded)
    measuring, whole, logged, speeds = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
        os.chdir(pathlib.Path(folder))
        with open_runs.start("overhead", {"stage": "benchmark"}) as run:
            for _ in range(arguments.rounds):
                begin = time.perf_counter()
                for _ in ("healthy", "collapsed"):
                    errors = named_generator(0, "bootstrap")
                    collapsed = probe.measure(loaded.model, errors)
                before = time.perf_counter() - begin
                total, training, logging = timed(loaded, config, windows, probe, collapsed, run)
                measuring.append((total - training - logging) / total)
                whole.append((before + total - training - logging) / (before + total))
                logged.append(logging / total)
                speeds.append(config.healing_steps / training)
    rows = [
        at_most(f"{config.label}: measuring, share of healing", measuring, "", 0.25),
        Row(f"{config.label}: the same with the two states before it", tuple(whole), ""),
        at_most(f"{config.label}: MLflow logging, share of a healing run", logged, "", 0.03),
    ]
    speed = statistics.median(speeds)
    show(
        f"{config.label}, {arguments.steps} steps, {torch.get_num_threads()} thread(s), "
        f"{config.probe_tokens} probe tokens, "
        f"{speed:.2f} training steps/s",
        rows,
    )
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
