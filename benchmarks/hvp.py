"""Cost of Hessian-vector products in units of one gradient, side by side. Opt-in.

    python -m benchmarks.hvp [--rounds 9] [--threads 1] [--clock wall]
        [--attention sdpa] [--json FILE]

Each round times every method once, in an order rotated from round to round, so that a machine
that slows down or speeds up does so for all. Ratios are formed within a round; the table gives
their median and range. Peak memory is that of one product in a fresh process: the high-water mark
VmHWM of /proc/self/status (Linux) less the resident set before the product. It counts whole pages
and what the allocator keeps, so differences of a few MB mean nothing. Relative errors are those of
one product along the gradient and along an isotropic direction, against the exact product of a
float64 copy.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.table import Row, at_most, ratios, rounds, save, show
from healing.curvature.hessian import HessianOperator
from healing.curvature.lanczos import gaussian
from healing.data.corpora import load_corpus
from healing.models.loading import load_model

MODEL, ROWS, LENGTH = "micro", 8, 128
COLUMNS = 4
# CPU time leaves out what other processes took; with several threads it adds them up.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
TARGETS = {"exact": 3.5, "finite difference": 2.1}
Timed = Callable[[], object]


def build(attention: str) -> tuple[nn.Module, Tensor]:
    """The embedded micro model (1.3 M parameters) and one batch of 8 x 128 tokens of its corpus."""
    loaded = load_model(MODEL, attention=attention)
    windows = load_corpus("stdlib").windows("attack", loaded.tokenizer, LENGTH, ROWS * LENGTH)
    return loaded.model, windows


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean nats per predicted token."""
    logits = model(tokens).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].reshape(-1))


class _Logits(nn.Module):
    """Logits as `(rows, classes, positions)`, the layout of `CrossEntropyLoss`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.network(tokens).logits[:, :-1].mT
        return logits


def curvlinops_product(model: nn.Module, tokens: Tensor, vector: Tensor) -> Timed | None:
    """One product by curvlinops (forward over reverse), or None where it is not importable."""
    try:
        curvlinops = importlib.import_module("curvlinops")
    except ImportError:
        return None
    operator = curvlinops.HessianLinearOperator(
        _Logits(model),
        nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(tokens, tokens[:, 1:])],
        check_deterministic=False,
    )

    def product() -> object:
        with sdpa_kernel(SDPBackend.MATH):
            return operator @ vector

    return product


def methods(attention: str, stack: ExitStack) -> dict[str, Timed]:
    """Every timed call by name; `stack` holds the retained graphs open."""
    model, tokens = build(attention)
    exact = HessianOperator(model, next_token_loss, [tokens], [1])
    difference = HessianOperator(model, next_token_loss, [tokens], [1], method="finite_difference")
    # A model of its own, since the finite difference assigns the parameters of the other one.
    retained = HessianOperator(build(attention)[0], next_token_loss, [tokens], [1])
    stack.enter_context(retained.retained_graphs())
    vector = gaussian(exact, torch.Generator().manual_seed(0))
    matrix = vector[:, None].expand(-1, COLUMNS)
    calls: dict[str, Timed] = {
        "gradient": exact.gradient,
        "exact": lambda: exact(vector),
        f"exact, {COLUMNS} columns": lambda: exact.matmat(matrix),
        "exact, retained": lambda: retained(vector),
        "finite difference": lambda: difference(vector),
    }
    oracle = curvlinops_product(model, tokens, vector)
    return calls if oracle is None else calls | {"curvlinops": oracle}


def resident_mib(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    status = Path("/proc/self/status").read_text()
    match = re.search(rf"{field}:\s+(\d+) kB", status)
    if match is None:
        raise RuntimeError(f"{field} is not in /proc/self/status")
    return int(match[1]) / 1024


def peak_of_one_product(name: str, attention: str) -> float:
    """MiB that one call adds to this process at its peak."""
    with ExitStack() as stack:
        call = methods(attention, stack)[name]
        before = resident_mib("VmRSS")
        call()
        return resident_mib("VmHWM") - before


def peak_in_fresh_process(name: str, options: argparse.Namespace) -> float:
    """The same, measured where nothing ran before."""
    command = [sys.executable, "-m", "benchmarks.hvp", "--memory-of", name]
    command += ["--attention", options.attention, "--threads", str(options.threads)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.split()[-1])


def relative_errors(attention: str) -> dict[str, dict[str, float]]:
    """‖product − reference‖/‖reference‖ by method and direction, the reference in float64."""
    model, tokens = build(attention)
    twin = build("eager")[0].double()
    reference = HessianOperator(twin, next_token_loss, [tokens], [1])
    directions = {
        "gradient": reference.gradient(),
        "isotropic": gaussian(reference, torch.Generator().manual_seed(0)),
    }
    errors: dict[str, dict[str, float]] = {}
    for name, method in (("exact", "exact"), ("finite difference", "finite_difference")):
        operator = HessianOperator(model, next_token_loss, [tokens], [1], method=method)
        errors[name] = {}
        for direction, vector in directions.items():
            expected = reference(vector)
            difference = operator(vector).double() - expected
            errors[name][direction] = float(difference.norm() / expected.norm())
    return errors


def table(
    seconds: dict[str, list[float]], peaks: dict[str, float], errors: dict[str, dict[str, float]]
) -> list[Row]:
    """In gradients of the same round, per column; then memory and errors."""
    rows = []
    for name, times in seconds.items():
        if name == "gradient":
            continue
        columns = COLUMNS if "columns" in name else 1
        values = [r / columns for r in ratios(times, seconds["gradient"])]
        what, target = f"{MODEL}: Hessian product, {name}", TARGETS.get(name)
        if target is None:
            rows.append(Row(what, tuple(values), "gradients"))
        else:
            rows.append(at_most(what, values, "gradients", target))
    rows += [Row(f"{MODEL}: peak memory of {name}", (peak,), "MiB") for name, peak in peaks.items()]
    return rows + [
        Row(f"{MODEL}: relative error, {name}, along the {direction}", (error,), "")
        for name, found in errors.items()
        for direction, error in found.items()
    ]


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--attention", choices=["sdpa", "eager"], default="sdpa")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--json", default="")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # curvlinops 3.0.1 reaches torch.jit.script, deprecated since torch 2.12
    warnings.filterwarnings("ignore", message=".*torch.jit.script", category=DeprecationWarning)
    if options.memory_of:
        print(peak_of_one_product(options.memory_of, options.attention))
        return
    with ExitStack() as stack:
        calls = methods(options.attention, stack)
        seconds = rounds(calls, options.rounds, warm_up=2, clock=CLOCKS[options.clock])
    peaks = {name: peak_in_fresh_process(name, options) for name in seconds}
    rows = table(seconds, peaks, relative_errors(options.attention))
    show(
        f"{MODEL}, one batch of {ROWS} x {LENGTH} tokens, {options.threads} thread(s), attention "
        f"{options.attention}; a gradient takes {1e3 * min(seconds['gradient']):.0f} ms at best",
        rows,
    )
    save(options.json, rows)


if __name__ == "__main__":
    main()
