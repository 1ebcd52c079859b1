"""Healing at the true shapes of Pythia on an accelerator: speed, share of the roofline, memory.

    python -m benchmarks.gpu [--models 410m,1b,2.8b] [--steps 500] [--device cuda]
        [--out benchmarks/results]

Random weights, the standard library's text with nano's tokenizer (its ids lie below 50,304):
neither speed nor memory depends on either. Healing is the project's own loop: 8 x 128 tokens a
step, fused AdamW, bf16 autocast over float32 weights on an accelerator, a measurement of the whole
probe in float32 (loss, spectra of all blocks) at step 0 and every 10 steps.

The roofline is the shortest time in which this device could do the step's work: matrix products
(counted by torch's FlopCounterMode over one forward and backward pass) at the speed of a large
product in the training format, plus the optimiser's memory traffic (28 bytes per parameter: weight,
gradient and both moments read, weight and both moments written) at the speed of a large copy. Both
speeds are measured in the same run. Measurements count as overhead.

One JSON file per model: tokens per second with and without measurements, seconds of all steps,
share of the roofline, peak memory, seconds of attack steps, of the catalyst search and of one
Lanczos product.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.shapes import loaded_model
from healing.attacks.arms import make_arm
from healing.attacks.clean_curvature import clean_hessian
from healing.attacks.driver import WeightChange, run_attack
from healing.config import AttackConfig, HealConfig, resolve
from healing.experiment.loading import cached_corpus
from healing.models import LoadedModel, next_token_loss, resolve_device
from healing.precision import Precision
from healing.probe import Probe
from healing.randomness import named_generator
from healing.sft import heal

OPTIMIZER_BYTES = 28
HEALING_TARGET_SECONDS = {"1b": 60.0}
ROOFLINE_TARGET = 0.5


def synchronize(device: torch.device) -> None:
    """Wait for what was queued."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(action: Callable[[], Any], device: torch.device, repeats: int = 3) -> float:
    """Shortest of several, after one that does not count."""
    action()
    best = math.inf
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        action()
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return best


def device_speed(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Measured speed of a large matrix product (flop/s) and of a large copy (bytes/s)."""
    n, copied = (8192, 2**30) if device.type != "cpu" else (1024, 2**26)
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    product = seconds_of(lambda: a @ b, device, 10)
    source = torch.empty(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, 10)
    return {"flops_per_second": 2 * n**3 / product, "bytes_per_second": 2 * copied / copy}


def step_flops(loaded: LoadedModel, batch: torch.Tensor, precision: Precision) -> int:
    """Of the matrix products in one forward and backward pass."""
    with FlopCounterMode(display=False) as counter, precision.forward(batch.device):
        # The fused loss is one operation to the counter; the plain one takes the same products.
        next_token_loss(loaded.model, batch).backward()
    loaded.model.zero_grad()
    return int(counter.get_total_flops())


def healing(loaded: LoadedModel, config: HealConfig, windows: torch.Tensor, probe: Probe) -> dict:
    """Seconds and memory of the healing loop, the measurement at step 0 included."""
    device = loaded.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    synchronize(device)
    begin, training, done = time.perf_counter(), 0.0, 0
    per_step = int(config.batch_size) * config.sequence_length
    collapsed = probe.measure(loaded.model)
    for record in heal(loaded, config, windows, probe, collapsed, named_generator(0, "sft")):
        if record.step:
            training += (record.step - done) * per_step / record.tokens_per_second
            done = record.step
    synchronize(device)
    total = time.perf_counter() - begin
    return {
        "steps": done,
        "measurements": math.ceil(done / config.measurement_interval) + 1,
        "seconds": total,
        "training_seconds": training,
        "tokens_per_second": done * per_step / total,
        "training_tokens_per_second": done * per_step / training,
        "peak_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


def attack(loaded: LoadedModel, config: AttackConfig, probe: Probe) -> dict[str, float]:
    """Seconds of making HAEP (subspace and catalyst search) and of its steps."""
    corpus, device = cached_corpus("stdlib", config.max_documents), loaded.device
    change = WeightChange(loaded.model)
    begin = time.perf_counter()
    made = make_arm(config, loaded, corpus, change)
    synchronize(device)
    prepared = time.perf_counter() - begin
    healthy = probe.measure(loaded.model)
    begin = time.perf_counter()
    last = list(run_attack(loaded, made.arm, config, probe, healthy, change))[-1]
    synchronize(device)
    took = time.perf_counter() - begin
    return {"prepare_seconds": prepared, "attack_seconds": took, "attack_steps": last.step}


def lanczos_product(loaded: LoadedModel, config: AttackConfig) -> float:
    """Seconds of one Hessian product over the curvature tokens."""
    corpus = cached_corpus("stdlib", config.max_documents)
    operator = clean_hessian(config, loaded, corpus)
    draw = named_generator(0, "vector")
    vector = torch.randn(operator.shape[0], generator=draw).to(loaded.device)
    with operator.retained_graphs():
        return seconds_of(lambda: operator(vector), loaded.device, 2)


def benchmark(name: str, steps: int, device: torch.device) -> dict[str, Any]:
    """Everything about one size."""
    precision = Precision("fp32" if device.type == "cpu" else "bf16")
    shared: dict[str, Any] = {"model": name, "corpus": "stdlib", "device": str(device)}
    config = resolve(
        HealConfig(healing_steps=steps, healing_lr=1e-6, precision=precision.format, **shared)
    )
    attacked = resolve(
        AttackConfig(attack_steps=10, attack_lr=1e-6, search_steps=2, rayleigh_draws=0, **shared)
    )
    loaded = loaded_model(name)
    loaded.model.to(device)
    corpus = cached_corpus("stdlib", config.max_documents)
    windows = corpus.windows("train", loaded.tokenizer, config.sequence_length)
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length)
    speed = device_speed(device, precision.dtype)
    flops = step_flops(loaded, windows[: int(config.batch_size)].to(device), precision)
    bytes_moved = OPTIMIZER_BYTES * loaded.n_params
    roofline = flops / speed["flops_per_second"] + bytes_moved / speed["bytes_per_second"]
    healed = healing(loaded, config, windows, probe)
    result = {
        "model": name,
        "n_params": loaded.n_params,
        "precision": str(precision),
        "device_speed": speed,
        "step_flops": flops,
        "optimizer_bytes": bytes_moved,
        "roofline_step_seconds": roofline,
        "healing": healed,
        "roofline_share_training": roofline * healed["steps"] / healed["training_seconds"],
        "roofline_share_total": roofline * healed["steps"] / healed["seconds"],
        "attack": attack(loaded, attacked, probe),
        "config": dataclasses.asdict(config),
    }
    result["hessian_product_seconds"] = lanczos_product(loaded, attacked)
    return result


def environment(device: torch.device) -> dict[str, str]:
    """What the numbers were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {"device": name, "torch": torch.__version__, "python": platform.python_version()}


def sentence(result: dict[str, Any]) -> str:
    """The result for people."""
    healed, attacked = result["healing"], result["attack"]
    target = HEALING_TARGET_SECONDS.get(result["model"])
    peak = healed["peak_bytes"]
    return "; ".join(
        [
            f"{result['model']}: {healed['steps']} steps, {healed['measurements']} measurements in "
            f"{healed['seconds']:.1f} s" + (f" (target {target:g} s)" if target else ""),
            f"{healed['training_tokens_per_second']:,.0f} tokens/s in training, "
            f"{healed['tokens_per_second']:,.0f} in all",
            f"roofline share {result['roofline_share_training']:.0%} in training (target "
            f"{ROOFLINE_TARGET:.0%}), {result['roofline_share_total']:.0%} in all",
            f"peak memory {peak / 1e9:.1f} GB" if peak else "peak memory not counted",
            f"attack prepared in {attacked['prepare_seconds']:.1f} s, {attacked['attack_steps']} "
            f"steps in {attacked['attack_seconds']:.1f} s",
            f"Hessian product {result['hessian_product_seconds']:.2f} s",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="410m,1b,2.8b")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    device = resolve_device(options.device)
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    for name in options.models.split(","):
        result = {"environment": environment(device), **benchmark(name, options.steps, device)}
        path = folder / f"{device.type}_{name}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{sentence(result)} → {path}", flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
