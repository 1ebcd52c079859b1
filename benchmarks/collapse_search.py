"""Which arm lowers a model's effective rank at all, at which rate, and what healing brings back.

    python -m benchmarks.collapse_search --model FOLDER --corpus FILE [--arms haep,random_tokens]
        [--rates 1e-3,3e-3] [--seeds 100] [--steps 100] [--healing-rates 3e-4,1e-3]
        [--healing-steps 500] [--healing '{"healing_decay": "linear"}'] [--attack-interval 1]
        [--no-sham] [--jobs 4] [--minutes 10] [--out FILE.jsonl]

A search, for choosing: seeds from 100 up, which no statistic of findings uses. The project's own
cells, in processes side by side; nothing is tracked. One JSON line per attack and per healing run,
with its trajectory, appended as soon as it ends. An attack that reached the target is healed at
every healing rate; so is the healthy model (arm ``none``), the sham.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig

KEPT = ("effective_rank", "loss", "participation_ratio", "stable_rank", "weight_change")
"""Of every measurement; the blocks' ranks too."""


@dataclass(frozen=True)
class Task:
    """One attack and what follows it.

    Attributes:
        attack: Unresolved.
        healing: Settings of each healing run.
        deadline: Unix time after which nothing begins.
    """

    attack: AttackConfig
    healing: tuple[dict[str, Any], ...] = field(default=())
    deadline: float = float("inf")


def _kept(record: Any) -> dict[str, float]:
    blocks = {k: v for k, v in record.metrics.items() if k.startswith("layers/effective_rank")}
    return {"step": record.step, **{k: record.metrics.get(k) for k in KEPT}, **blocks}


def _run(cell: Any) -> tuple[list[dict[str, float]], Any]:
    from healing.stages.cells.events import Record

    points: list[dict[str, float]] = []
    while True:
        try:
            event = next(cell)
        except StopIteration as end:
            return points, end.value
        if isinstance(event, Record):
            points.append(_kept(event))


def run_task(task: Task) -> Iterator[dict[str, Any]]:
    """Rows of one attack and of its healing runs."""
    from findings.runs import keep_collapsed
    from healing.stages.cells.attack import attack_cell
    from healing.stages.cells.heal import heal_cell, resolve_from_checkpoint
    from healing.stages.cells.heal_outcome import HealCell
    from healing.stages.cells.inputs import resolve_from_model, use_threads

    if time.time() > task.deadline:
        return
    config = resolve_from_model(task.attack)
    use_threads(config)
    begin = time.time()
    points, found = _run(attack_cell(config))
    facts = {"arm": config.arm, "attack_lr": float(config.attack_lr), "seed": config.seed}
    yield {
        "kind": "attack",
        **facts,
        "seconds": time.time() - begin,
        "rank_reduction_pct": found.damage.rank_reduction_pct,
        "state": found.damage.spectral_state,
        **({"catalyst": found.catalyst.metrics()} if found.catalyst else {}),
        "points": points,
    }
    if config.arm != "none" and not found.reached_target:
        return
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkpoint.pt"
        keep_collapsed(found, path)
        name = "" if config.arm == "none" else str(path)
        del found
        for settings in task.healing:
            if time.time() > task.deadline:
                return
            begin = time.time()
            shared = {n: getattr(config, n) for n in ("model", "corpus", "device", "threads")}
            heals = HealConfig(**shared, seed=config.seed, **settings)
            heals = resolve_from_checkpoint(heals, None, name)
            points, _ = _run(heal_cell(HealCell(heals, name)))
            yield {
                "kind": "heal",
                **facts,
                **settings,
                "seconds": time.time() - begin,
                "points": points,
            }


def _work(task: Task, out: str) -> list[str]:
    lines = []
    for row in run_task(task):
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        last = row["points"][-1]
        settings = {k: v for k, v in row.items() if k not in ("points", "catalyst")}
        lines.append(
            f"{settings}: rank {row['points'][0]['effective_rank']:.1f} → "
            f"{last['effective_rank']:.1f}, loss {last['loss']:.2f} at step {last['step']}"
        )
        print(lines[-1], flush=True)
    return lines


def local_copy(model: str) -> str:
    """A folder with the model's weights in float32: a GGUF file is de-quantized once, not once a
    run.
    """
    from healing.models.loading import load_model

    folder = tempfile.mkdtemp(prefix="collapse-search-")
    loaded = load_model(model, "cpu")
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


def _listed(text: str) -> list[str]:
    return [item for item in text.split(",") if item]


def tasks(options: argparse.Namespace, model: str) -> Iterable[Task]:
    """Arms × rates × seeds; the sham once per seed, first."""
    deadline = time.time() + 60 * options.minutes
    healing = tuple(
        {
            "healing_lr": float(rate),
            "healing_steps": options.healing_steps,
            **json.loads(options.healing),
        }
        for rate in _listed(options.healing_rates)
    )
    shared = {
        "model": model,
        "corpus": options.corpus,
        "device": options.device,
        "threads": options.threads,
        "attack_steps": options.steps,
        "rayleigh_draws": 0,
        "measurement_interval": options.attack_interval,
    }
    for seed in map(int, _listed(options.seeds)):
        if healing and options.sham:
            attack = AttackConfig(arm="none", seed=seed, **shared)
            yield Task(attack, healing, deadline)
        for arm in _listed(options.arms):
            for rate in _listed(options.rates):
                attack = AttackConfig(arm=arm, attack_lr=float(rate), seed=seed, **shared)
                yield Task(attack, healing, deadline)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--corpus", default="auto")
    parser.add_argument("--arms", default="haep,random_tokens,random_text,spectral")
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2")
    parser.add_argument("--seeds", default="100")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--healing-rates", default="")
    parser.add_argument("--healing-steps", type=int, default=500)
    parser.add_argument("--healing", default="{}", help="Settings of every healing run, JSON.")
    parser.add_argument("--attack-interval", type=int, default=10)
    parser.add_argument("--sham", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", default="collapse_search.jsonl")
    options = parser.parse_args()
    gguf = options.model.endswith(".gguf")
    model = local_copy(options.model) if gguf else options.model
    # Processes, not threads: each has its own queue to the device.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
            running = {pool.submit(_work, t, options.out): t for t in tasks(options, model)}
            for done in as_completed(running):
                if error := done.exception():
                    named = running[done].attack
                    print(f"{named.arm} {named.attack_lr}: {error!r}", flush=True)
    finally:
        if gguf:
            shutil.rmtree(model, ignore_errors=True)


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    main()
