"""What the probe's size does to the effective rank: value, standard error, bias.

Measures the healthy model, and checkpoints of it where they are given, on probes of several sizes.
The bias is the jackknife's over windows, (n − 1)·(mean of the ranks without one window − the rank):
the entropy of estimated eigenvalues lies below that of the true ones, the more so the fewer rows
there are. Of two states the biases cancel in part; what is left of them is in the last column.

    python -m benchmarks.probe_size [--model nano] [--sizes 512,1024,…] [--checkpoints FILE,FILE]
        [--markdown FILE]
"""

from __future__ import annotations

import argparse
import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from healing.config.attack import AttackConfig
from healing.errors import CorpusError
from healing.measurements.covariance import MomentAccumulator, Moments
from healing.measurements.probe import Probe
from healing.measurements.rank_standard_error import (
    bootstrap_error,
    bootstrap_ranks,
)
from healing.models.blocks import block_outputs
from healing.models.checkpoints import load_state, read_checkpoint
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.stages.cells.inputs import corpus_for, load_for, resolve_from_model, use_threads

SIZES = (512, 1024, 2048, 4096, 8192, 16384, 65536)
RESAMPLES_AT_ONCE = 64
"""Covariances of all blocks without one window that exist at a time."""


@dataclass(frozen=True)
class Reading:
    """One state on one probe.

    Attributes:
        rank: Mean effective rank over blocks.
        error: Its bootstrap standard error over windows.
        bias: Jackknife estimate of E[rank] − rank on infinitely many windows.
        loss: Nats per token.
    """

    rank: float
    error: float
    bias: float
    loss: float


def window_moments(model: nn.Module, windows: torch.Tensor) -> list[Moments]:
    """Moments of every block by window, on all rows that count."""
    with torch.no_grad(), block_outputs(model) as outputs:
        blocks: list[MomentAccumulator] = []
        for chunk in windows.split(16):
            model(input_ids=chunk)
            blocks = blocks or [MomentAccumulator(per_window=True) for _ in outputs]
            for block, hidden in zip(blocks, outputs, strict=True):
                block.add(hidden)
    return [block.finish() for block in blocks]


def jackknife_bias(blocks: Sequence[Moments]) -> float:
    """(n − 1)·(mean over windows of the rank without that window − the rank), mean over blocks.

    Raises:
        ValueError: With fewer than two windows.

    Source:
        Quenouille 1956; Efron & Tibshirani 1993, chapter 10.
    """
    n = len(blocks[0].counts)
    if n < 2:
        raise ValueError(f"a jackknife needs at least two windows, got {n}")
    whole = torch.ones(1, n, dtype=torch.float64)
    without = 1.0 - torch.eye(n, dtype=torch.float64)
    total = 0.0
    for moments in blocks:
        parts = without.split(RESAMPLES_AT_ONCE)
        left = torch.cat([bootstrap_ranks(moments, part) for part in parts])
        total += (n - 1) * float(left.mean() - bootstrap_ranks(moments, whole)[0])
    return total / len(blocks)


def read(loaded: LoadedModel, windows: torch.Tensor) -> Reading:
    """The model's present state on these windows."""
    measured = Probe(windows).measure(loaded.model)
    moments = window_moments(loaded.model, windows)
    error = bootstrap_error(moments, named_generator(0, "bootstrap"))
    return Reading(measured.effective_rank, error, jackknife_bias(moments), measured.loss)


def readings(
    config: AttackConfig, sizes: Sequence[int], checkpoints: Sequence[pathlib.Path]
) -> Iterator[tuple[int, list[Reading]]]:
    """Size → the healthy state and each checkpoint's; ends where the text does."""
    corpus, loaded = corpus_for(config), load_for(config)
    healthy = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    stored = [read_checkpoint(path) for path in checkpoints]
    for size in sizes:
        try:
            windows = corpus.windows("probe", loaded.tokenizer, config.sequence_length, size)
        except CorpusError as error:
            print(f"{size:,} tokens: {error}")
            return
        loaded.model.load_state_dict(healthy)
        found = [read(loaded, windows)]
        for path, checkpoint in zip(checkpoints, stored, strict=True):
            load_state(loaded, checkpoint, path)
            found.append(read(loaded, windows))
        yield size, found


def line(size: int, found: Sequence[Reading]) -> str:
    """A row of the table; with two checkpoints (collapsed, healed) also the recovery."""
    states = [f"{r.rank:.2f} ± {r.error:.2f} | {r.bias:+.2f} | {r.loss:.3f}" for r in found]
    cells = [f"{size:,}", *states]
    if len(found) == 3:
        healthy, collapsed, healed = found
        damage = healthy.rank - collapsed.rank
        cells.append(f"{100 * (healed.rank - collapsed.rank) / damage:.1f}")
        cells.append(f"{damage:.2f} | {healthy.bias - collapsed.bias:+.2f}")
    return f"| {' | '.join(cells)} |"


def header(names: Sequence[str]) -> str:
    """Head of the table for these states."""
    cells = ["probe tokens"]
    for name in names:
        cells += [f"{name}: rank ± s.e.", "bias", "loss"]
    if len(names) == 3:
        cells += ["recovery, %", "damage", "its bias"]
    return f"| {' | '.join(cells)} |\n|{'---:|' * len(cells)}"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--checkpoints", default="", help="collapsed and healed, comma-separated")
    parser.add_argument("--markdown", default="", help="file for the table")
    options = parser.parse_args()
    config = resolve_from_model(AttackConfig(model=options.model))
    use_threads(config)
    paths = [pathlib.Path(p) for p in options.checkpoints.split(",") if p]
    names = ["healthy", "collapsed", "healed"][: 1 + len(paths)]
    lines = [header(names)]
    print(lines[0], flush=True)
    sizes = [int(size) for size in options.sizes.split(",")]
    for size, found in readings(config, sizes, paths):
        lines.append(line(size, found))
        print(lines[-1], flush=True)
    if options.markdown:
        pathlib.Path(options.markdown).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
