"""Healing, attack and Hessian at the true shapes of Pythia on an accelerator: time and memory.

    python -m benchmarks.gpu [--models 1b,410m,2.8b] [--steps 500] [--device cuda]
        [--minutes 10] [--out benchmarks/results]

Random weights, the standard library's text with nano's tokenizer (its ids lie below 50,304):
neither speed nor memory depends on either. Healing is the project's own loop: 8 x 128 tokens a
step, fused AdamW, bf16 autocast over float32 weights on an accelerator, a measurement of the whole
probe in float32 (loss, spectra of all blocks) at step 0 and every 10 steps.

One JSON file per model, written anew after every part: the device's speed, healing, the faster
ways beside the ones that they replaced (benchmarks/two_ways.py), the attack, Hessian products, a
short Lanczos run, healing over all GPUs where there are several (benchmarks/ranks.py). No part
begins after ``--minutes``; those left out are recorded as such. At the end come the rows for
docs/performance.md. A part that runs out of the device's memory is recorded as such and the next
one goes on. Every part begins without gradients or cached memory of the last and has its own peak.
The share of the roofline (benchmarks/roofline.py) is that of the training steps, and of the whole
loop with its measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import math
import pathlib
import platform
import time
from collections.abc import Callable

import torch

from benchmarks import two_ways
from benchmarks.gpu_wording import sentence, table
from benchmarks.parts import Numbers, Report, run_part
from benchmarks.ranks import on_all_gpus
from benchmarks.roofline import device_speed, roofline, step_bytes, step_flops
from benchmarks.shapes import loaded_model
from benchmarks.stopwatch import Stopwatch, seconds_of, synchronize
from healing.attacks.arms import haep
from healing.attacks.clean_hessian import basis_place, clean_hessian
from healing.attacks.context import prepare_arm
from healing.attacks.objective import ObjectiveArm
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.curvature import lanczos as lanczos_module
from healing.curvature.hessian import HessianOperator
from healing.curvature.subspaces import LowCurvatureSubspace, MatrixSubspace
from healing.data.splits import Corpus
from healing.measurements.probe import Probe
from healing.models.loading import LoadedModel, resolve_device
from healing.progress import without_safe_points
from healing.randomness import named_generator
from healing.stages.cells.inputs import cached_corpus, use_threads
from healing.training.healing_loop import heal
from healing.training.precision import Precision

LANCZOS_ITERATIONS = 8
"""Few: the time of an iteration hardly changes over them."""


def healing(
    loaded: LoadedModel, config: HealConfig, windows: torch.Tensor, probe: Probe
) -> Numbers:
    """Seconds of the healing loop, the measurement at step 0 included, and of its parts."""
    device, watch = loaded.device, Stopwatch(loaded.device)
    per_step = int(config.batch_size) * config.sequence_length
    begin, training, done = time.perf_counter(), 0.0, 0
    watched = {"measurement": (Probe, "measure"), "eigenvalue": (torch.linalg, "eigvalsh")}
    with watch.on(watched):
        collapsed = probe.measure(loaded.model)
        for record in heal(loaded, config, windows, probe, collapsed, named_generator(0, "sft")):
            if record.step:
                # A step ends with a check that waits for the device: its seconds are whole.
                training += (record.step - done) * per_step / record.tokens_per_second
                done = record.step
    synchronize(device)
    total = time.perf_counter() - begin
    return {
        "steps": done,
        "measurements": watch.calls["measurement"],
        "loop_seconds": total,
        "training_seconds": training,
        "measurement_seconds": watch.seconds["measurement"],
        "eigenvalue_seconds": watch.seconds["eigenvalue"],
        "eigenvalue_calls": watch.calls["eigenvalue"],
        "tokens_per_second": done * per_step / total,
        "training_tokens_per_second": done * per_step / training,
    }


def shares(bound: Numbers, healed: Numbers) -> Numbers:
    """Of the roofline: the steps of training at its speed over the seconds they took."""
    least = bound["step_seconds"] * healed["steps"]
    return {
        "share_training": least / healed["training_seconds"],
        "share_total": least / healed["loop_seconds"],
    }


def attack(loaded: LoadedModel, config: AttackConfig, probe: Probe, corpus: Corpus) -> Numbers:
    """Seconds of making HAEP (subspace and catalyst search), of its steps and its diagnostics."""
    device, watch = loaded.device, Stopwatch(loaded.device)
    change = WeightChange(loaded.model)
    synchronize(device)
    begin = time.perf_counter()
    making = {
        "decomposition": (MatrixSubspace, "of"),
        "search": (haep, "search_catalyst"),
    }
    with watch.on(making):
        made = prepare_arm(config, loaded, corpus, change)
    synchronize(device)
    prepared = time.perf_counter() - begin
    healthy = probe.measure(loaded.model)
    begin = time.perf_counter()
    running = {
        "advance": (ObjectiveArm, "advance"),
        "diagnostics": (ObjectiveArm, "diagnostics"),
        # κ of a watched step, called from inside that step
        "amplification": (LowCurvatureSubspace, "amplification"),
        "weight_change": (WeightChange, "relative"),
        "measurement": (Probe, "measure"),
    }
    with watch.on(running):
        events = made.arm.run(loaded, config, probe, healthy, change)
        for record in without_safe_points(events):
            done = record.step
    synchronize(device)
    took, seconds = time.perf_counter() - begin, watch.seconds
    return {
        "prepare_seconds": prepared,
        "decomposition_seconds": seconds["decomposition"],
        "decompositions": watch.calls["decomposition"],
        "search_seconds": seconds["search"],
        "search_rounds": config.search_steps,
        "run_seconds": took,
        "steps": done,
        "step_seconds": seconds["advance"] - seconds["amplification"],
        "diagnostics_seconds": sum(
            seconds[x] for x in ("diagnostics", "amplification", "weight_change")
        ),
        "measurement_seconds": seconds["measurement"],
        "measurements": watch.calls["measurement"],
    }


def hessian_product(loaded: LoadedModel, config: AttackConfig, corpus: Corpus) -> Numbers:
    """Seconds of one product over the curvature tokens: with its gradient graph built, and kept."""
    operator = clean_hessian(config, loaded, corpus)
    vector = lanczos_module.gaussian(operator, named_generator(0, "vector"))
    with operator.retained_graphs():
        synchronize(loaded.device)
        begin = time.perf_counter()
        operator(vector)
        synchronize(loaded.device)
        first = time.perf_counter() - begin
        kept = seconds_of(lambda: operator(vector), loaded.device, 2)
    return {
        "dimension": operator.shape[0],
        "tokens": config.curvature_tokens,
        "first_product_seconds": first,
        "product_seconds": kept,
    }


def lanczos(loaded: LoadedModel, config: AttackConfig, corpus: Corpus) -> Numbers:
    """Seconds of a short Lanczos run, with the basis where the attack keeps it."""
    operator, watch = clean_hessian(config, loaded, corpus), Stopwatch(loaded.device)
    place = basis_place(operator.shape[0])
    watched = {"start": (lanczos_module, "gaussian"), "product": (HessianOperator, "__call__")}
    synchronize(loaded.device)
    begin = time.perf_counter()
    with operator.retained_graphs(), watch.on(watched):
        found = lanczos_module.lanczos(
            operator,
            named_generator(0, "lanczos"),
            n_largest=1,
            n_smallest=1,
            max_iterations=LANCZOS_ITERATIONS,
            tolerance=0.0,  # so that it takes them all
            **place,
        )
    took, seconds = time.perf_counter() - begin, watch.seconds
    return {
        "iterations": found.iterations,
        "products": found.products,
        "basis": "fp32, device" if place["basis_device"] is None else "bf16, host",
        "lanczos_seconds": took,
        "start_vector_seconds": seconds["start"],
        "product_seconds": seconds["product"],
        # orthogonalisation, Ritz vectors and the basis's way to the host and back
        "basis_seconds": took - seconds["start"] - seconds["product"],
        "lanczos_status": found.status.value,
    }


def configurations(name: str, steps: int, device: torch.device) -> tuple[HealConfig, AttackConfig]:
    """Of healing and of a short HAEP attack; rates so small that random weights stay finite."""
    # Bases of random weights are kept nowhere.
    shared: Numbers = {
        "model": name, "corpus": "stdlib", "device": str(device), "cache_dir": "",
    }  # fmt: skip
    heals = HealConfig(healing_steps=steps, healing_lr=1e-6, **shared)
    attacks = AttackConfig(
        attack_steps=10,
        attack_lr=1e-6,
        target_rank_reduction=1.0,  # the whole budget
        search_steps=2,
        trajectory_interval=0,
        rayleigh_draws=0,  # Hessian products are a part of their own
        **shared,
    )
    accelerated = device.type != "cpu"
    return resolve_from_presets(heals, accelerated=accelerated), resolve_from_presets(
        attacks, accelerated=accelerated
    )


def benchmark(
    name: str,
    steps: int,
    device: torch.device,
    folder: pathlib.Path,
    deadline: float = math.inf,
) -> Numbers:
    """Everything about one size, written part by part to ``{device}_{size}.json``.

    Args:
        name: Preset.
        steps: Healing steps.
        device: Where it runs.
        folder: Of the file.
        deadline: Of ``time.monotonic()``: no part begins later.
    """
    config, attacked = configurations(name, steps, device)
    use_threads(config)
    precision = Precision(str(config.precision), config.precision_mode)
    loaded = loaded_model(name, device)
    model = loaded.model
    corpus = cached_corpus("stdlib", config.max_documents)
    windows = corpus.windows("train", loaded.tokenizer, config.sequence_length)
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length)
    report = Report(
        folder / f"{device.type}_{name}.json",
        environment=environment(device),
        model=name,
        n_params=loaded.n_params,
        precision=str(precision),
        config=dataclasses.asdict(config),
        attack_config=dataclasses.asdict(attacked),
    )

    def part(title: str, action: Callable[[], Numbers]) -> Numbers | None:
        return run_part(report, title, loaded, action, deadline)

    speed = part("device_speed", lambda: device_speed(device, precision.dtype))
    healed = part("healing", lambda: healing(loaded, config, windows, probe))
    if speed:
        flops = step_flops(model, int(config.batch_size), config.sequence_length)
        bound = roofline(speed, flops, step_bytes(model, precision))
        report.write(roofline=bound | (shares(bound, healed) if healed else {}))
    part("eigenvalues", lambda: two_ways.eigenvalues(loaded))
    part("bases", lambda: two_ways.bases(loaded, attacked.subspace_energy))
    part("alignment", lambda: two_ways.alignment(loaded, attacked))
    part("attack", lambda: attack(loaded, attacked, probe, corpus))
    part("hessian_product", lambda: hessian_product(loaded, attacked, corpus))
    part("lanczos", lambda: lanczos(loaded, attacked, corpus))
    part("ranks", lambda: on_all_gpus(name, config))
    return report.content


def environment(device: torch.device) -> dict[str, str | int]:
    """What the numbers were measured on."""
    facts: dict[str, str | int] = {
        "device": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "float32_products": torch.get_float32_matmul_precision(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        facts |= {"device": about.name, "device_memory_bytes": about.total_memory}
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="1b,410m,2.8b")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", default="benchmarks/results")
    options = parser.parse_args()
    device = resolve_device(options.device)
    folder = pathlib.Path(options.out)
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * options.minutes
    results = []
    for name in options.models.split(","):
        if time.monotonic() > deadline:
            print(f"[{name}: left out, the time is over]", flush=True)
            continue
        results.append(benchmark(name, options.steps, device, folder, deadline))
        print(sentence(results[-1]), flush=True)
        gc.collect()  # the last size's model
        if device.type == "cuda":
            torch.cuda.empty_cache()
    print(table(results))


if __name__ == "__main__":
    main()
