"""Healing one model over several processes: seconds, and bytes that each rank has.

    python -m benchmarks.ranks [--model micro] [--ranks 1,2,4] [--parallel fsdp] [--steps 5]
        [--device cpu]

Random weights of the true shape, the batches of the project's own healing. The bytes are counted
on every rank after a step, gradients after one more backward pass; the prediction beside them is
that of --dry-run. On a machine with one GPU the part of benchmarks/gpu.py says that it was skipped.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch

from benchmarks.parts import Numbers
from benchmarks.shapes import loaded_model
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.data.windows import batches
from healing.measurements.probe import Probe
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.stages.cells.inputs import cached_corpus
from healing.stages.dry_run.per_rank import part_bytes
from healing.training.parallel.team import Team, ranks_for


def over_ranks(
    loaded: LoadedModel, config: HealConfig, windows: torch.Tensor, probe: Probe
) -> Numbers:
    """Seconds of a step and of a measurement, and bytes by rank.

    Args:
        loaded: On the CPU.
        config: Says how many ranks.
        windows: Of training.
        probe: What is measured.
    """
    stream = batches(windows, int(config.batch_size), named_generator(0, "sft"))
    begin = time.perf_counter()
    with ranks_for(config, loaded, probe) as ranks:
        assert isinstance(ranks, Team), "there are several"
        started = time.perf_counter() - begin
        trainer = ranks.trainer_of(loaded.model, config)
        trainer.step(next(stream))  # the first makes the optimiser's state
        begin = time.perf_counter()
        for _ in range(int(config.healing_steps)):
            trainer.step(next(stream))
        step = (time.perf_counter() - begin) / int(config.healing_steps)
        begin = time.perf_counter()
        ranks.probe.measure(loaded.model)
        measured = time.perf_counter() - begin
        counted = ranks.all_do("bytes_of_ranks", next(stream)).tolist()
    return {
        "ranks": len(counted),
        "start_seconds": started,
        "step_seconds": step,
        "measurement_seconds": measured,
        "bytes_by_rank": counted,
        "predicted_part_bytes": part_bytes(
            loaded.model.parameters(), len(counted) if config.parallel == "fsdp" else 1
        ),
    }


def on_all_gpus(name: str, config: HealConfig) -> Numbers:
    """The case of several GPUs; on one device the reason why it is left out."""
    count = torch.cuda.device_count()
    if count < 2:
        return {"skipped": f"{count} GPU(s): healing over several needs two"}
    most = max(n for n in range(1, count + 1) if not int(config.batch_size) % n)
    many = replace(config, parallel="fsdp", ranks=most, device="cuda", healing_steps=20)
    return over_ranks(*inputs(name, many))


def inputs(name: str, config: HealConfig) -> tuple[LoadedModel, HealConfig, torch.Tensor, Probe]:
    """What :func:`over_ranks` takes."""
    loaded = loaded_model(name, torch.device("cpu"))
    corpus = cached_corpus("stdlib", config.max_documents)
    windows = corpus.windows("train", loaded.tokenizer, config.sequence_length)
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length)
    return loaded, config, windows, probe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--parallel", default="fsdp")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    for ranks in map(int, options.ranks.split(",")):
        config = HealConfig(
            model=options.model, corpus="stdlib", device=options.device, healing_lr=1e-6,
            healing_steps=options.steps, parallel=options.parallel, ranks=ranks, threads=1,
        )  # fmt: skip
        resolved = resolve_from_presets(config, accelerated=options.device != "cpu")
        print(over_ranks(*inputs(options.model, resolved)), flush=True)


if __name__ == "__main__":
    main()
