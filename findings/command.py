"""Run a part of the protocol, or write docs/findings.md from the tables that are there.

    python -m findings run nano [--jobs 2] [--out findings/tables]
    python -m findings render

Rows are on disk after every healing run, in a hidden file per seed and arm; what is there is not
run again, so that a part that was stopped goes on where it was. ``--go-on`` also takes what the
part's table holds: without it a table is made anew. The table is written when all seeds are done,
or with what there is when ``--minutes`` are over.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import pathlib
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

Row = dict[str, Any]

TABLES = pathlib.Path(__file__).parent / "tables"


def _tell(text: str, begin: float) -> None:
    """A line, with the seconds since ``time.monotonic()`` was that."""
    print(f"{text} [{time.monotonic() - begin:.0f} s]", file=sys.stderr, flush=True)


def _chain(
    part: str,
    seed: int,
    number: int,
    place: dict[str, Any],
    deadline: float,
    folder: str,
    go_on: bool = False,
) -> list[dict[str, Any]]:
    """In a process of its own: rows go to a file as soon as they are there."""
    from findings import estimates
    from findings.parts import ALL_PARTS
    from findings.runs import chain_rows

    whole = ALL_PARTS[part]
    chain, begin = whole.chains(seed)[number], time.monotonic()
    place_of_rows = pathlib.Path(folder)
    path = place_of_rows / f".{part}-{seed}-{chain[0].name}.csv"
    table = place_of_rows / f"{part}.csv"
    rows = estimates.read_rows(path) if path.exists() else []
    if go_on and not rows and table.exists():
        own = {(arm.name, str(seed)) for arm in chain}
        rows = [r for r in estimates.read_rows(table) if (r["arm"], r["seed"]) in own]
    done = {(row["arm"], row["healer"]) for row in rows}
    for found in chain_rows(whole, chain, seed, whole.model, deadline, done, **place):
        rows += found
        estimates.write(path, rows)
        last = found[-1]
        _tell(
            f"{part} seed {seed} {last['arm']} ({last['healer']}): rank "
            f"{found[1]['effective_rank']} → {last['effective_rank']} of "
            f"{found[0]['effective_rank']}, loss {last['loss']}",
            begin,
        )
    return rows


def run(options: argparse.Namespace) -> None:
    """All seeds of a part, ``--jobs`` at a time."""
    from findings import estimates
    from findings.parts import ALL_PARTS

    part, folder = ALL_PARTS[options.part], pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    place = {"model": options.model or part.model}
    if options.device:
        place["device"] = options.device
    if options.corpus:
        place["corpus"] = options.corpus
    deadline = time.time() + 60 * options.minutes
    seeds = [int(s) for s in options.seeds.split(",")] if options.seeds else list(part.seeds)
    rows: list[dict[str, Any]] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        running = [
            pool.submit(
                _chain, options.part, seed, number, place, deadline, str(folder), options.go_on
            )
            for seed in seeds
            for number in range(len(part.chains(seed)))
        ]
        for done in as_completed(running):
            rows += done.result()
    estimates.write(folder / f"{options.part}.csv", rows)
    if time.time() < deadline and not options.seeds:
        for path in folder.glob(f".{options.part}-*.csv"):
            path.unlink()


def _varied(pretraining: int, folder: str, pretrained: str, other_text: str) -> list[Row]:
    """Checkpoints of one pretrained model, in a process of its own; rows are kept as they come."""
    from findings import estimates, variation
    from findings import variation_runs as runs

    model, begin = runs.pretrained(pretraining, pathlib.Path(pretrained)), time.monotonic()
    path = pathlib.Path(folder) / f".nano-{pretraining}.csv"
    rows: list[Row] = estimates.read_rows(path, variation.COLUMNS) if path.exists() else []
    done = {int(row["attack_seed"]) for row in rows}
    for seed in sorted(set(runs.ATTACK_SEEDS) - done):
        rows += runs.unit_rows(model, pretraining, seed, other_text)
        variation.write(path, rows)
        last = rows[-1]
        _tell(
            f"nano of pretraining seed {pretraining}, attack seed {seed}: rank "
            f"{last['collapsed_rank']} → {last['healed_rank']} of {last['healthy_rank']}",
            begin,
        )
    return rows


def vary(options: argparse.Namespace) -> None:
    """What the intervals leave out, ``--jobs`` pretrained models at a time."""
    from findings import variation
    from findings import variation_runs as runs

    folder, pretrained = pathlib.Path(options.out), pathlib.Path(options.pretrained)
    for place in (folder, pretrained):
        place.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        running = [
            pool.submit(_varied, seed, str(folder), str(pretrained), options.other_text)
            for seed in runs.PRETRAINING_SEEDS
        ]
        for done in as_completed(running):
            rows += done.result()
    variation.write(folder / "nano.csv", rows)
    for path in folder.glob(".nano-*.csv"):
        path.unlink()


def main() -> None:
    """Parse and do."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    parser = argparse.ArgumentParser(prog="python -m findings", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    runs = commands.add_parser("run", help="Run a part and write its table.")
    runs.add_argument("part")
    runs.add_argument("--model", default="", help="Folder or file of the part's model.")
    runs.add_argument("--corpus", default="")
    runs.add_argument("--device", default="")
    runs.add_argument("--seeds", default="", help="Some of the part's; empty = all.")
    runs.add_argument("--jobs", type=int, default=2)
    runs.add_argument("--minutes", type=float, default=1e6, help="Nothing begins later.")
    runs.add_argument("--go-on", action="store_true", help="Not what the table holds already.")
    runs.add_argument("--out", default=str(TABLES))
    commands.add_parser("render", help="Write docs/findings.md, its figure and README's block.")
    varies = commands.add_parser("vary", help="Other pretraining seeds, probes and texts (nano).")
    varies.add_argument("--pretrained", required=True, help="Folder that keeps the models made.")
    varies.add_argument("--other-text", default="", help="Folder of WikiText-2.")
    varies.add_argument("--jobs", type=int, default=2)
    varies.add_argument("--out", default=str(TABLES / "variation"))
    options = parser.parse_args()
    if options.command == "run":
        run(options)
    elif options.command == "vary":
        vary(options)
    else:
        from findings.render import ROOT, render

        render(readme=ROOT / "README.md")
