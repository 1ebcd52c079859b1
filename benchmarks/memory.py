"""Predicted against measured peak memory of a healing run, on the CPU.

For Pythia's sizes at their true shapes with random weights: a folder with config.json, weights and
nano's tokenizer is made, and a process of its own heals it for three steps of 8 x 128 tokens with
one measurement (``heal_cell``: loading, measurements, first check, steps). Its highest resident
memory is compared with what ``--dry-run`` predicts in another process; every round of it is a
process of its own. Larger sizes are predicted alone.

    python -m benchmarks.memory [--models 70m,160m] [--predicted 1b,2.8b] [--ways full,lora]
        [--rounds 1] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from benchmarks.table import Row, at_most, save, show

WAYS: dict[str, dict[str, object]] = {
    "full": {},
    "checkpointing": {"gradient_checkpointing": True},
    "lora": {"healing_method": "lora"},
}
TARGETS = {"1b": 20.0, "2.8b": 56.0}
"""GB, for full fine-tuning with AdamW."""
LOWEST, HIGHEST = 0.8, 1.2
"""Predicted over measured."""


def make_folder(size: str, folder: pathlib.Path) -> None:
    """A model of Pythia's shape with random float32 weights, under nano's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from healing.models.architectures import pythia_config
    from healing.models.model_files import EMBEDDED_DIR

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(pythia_config(size)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(EMBEDDED_DIR / "nano").save_pretrained(folder)


def settings(model: str, way: str):
    import healing.stages.heal  # noqa: F401 (what the stage imports is resident there too)
    from healing.config.heal import HealConfig
    from healing.stages.cells.inputs import resolve_from_model

    config = HealConfig(
        model=model, corpus="stdlib", healing_steps=3, measurement_interval=3, **WAYS[way]
    )
    return resolve_from_model(config)


def measure(model: str, way: str) -> dict[str, float]:
    """Heal, and say how much memory the process took at most."""
    from healing.stages.cells.events import outcome_of
    from healing.stages.cells.heal import heal_cell
    from healing.stages.cells.heal_outcome import HealCell
    from healing.stages.cells.inputs import use_threads

    config = settings(model, way)
    use_threads(config)
    outcome = outcome_of(heal_cell(HealCell(config, "")))[0]
    assert len(outcome.records) == 2
    assert outcome.status == "ok"
    status = pathlib.Path("/proc/self/status").read_text()
    (line,) = [ln for ln in status.splitlines() if ln.startswith("VmHWM")]
    return {"peak": 1024.0 * int(line.split()[1])}


def predict(model: str, way: str) -> dict[str, float]:
    """Predicted bytes: of the process, and of the largest phase's tensors."""
    import torch

    config = settings(model, way)
    from healing.models.architectures import architecture
    from healing.stages.dry_run.peak_memory import predict_healing

    found = predict_healing(config, architecture(model), torch.device("cpu"))
    largest = max(found.phases, key=lambda name: sum(found.phases[name].values()))
    return {"peak": found.peak_bytes, "tensors": found.tensor_bytes, "phase": largest}


def in_own_process(task: str, model: str, way: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.memory", "--task", task, model, way]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def compared(size: str, way: str, expected: float, found: Sequence[float]) -> Row:
    """Predicted bytes over every round's measured ones."""
    both = f"{expected / 1e9:.2f} GB of {statistics.median(found) / 1e9:.2f} GB"
    ratios = tuple(expected / peak for peak in found)
    met = LOWEST <= statistics.median(ratios) <= HIGHEST
    what = f"{size}, {way}: predicted / measured peak ({both})"
    return Row(what, ratios, "", f"{LOWEST}–{HIGHEST}", met)


def compare(sizes: list[str], ways: list[str], rounds: int) -> list[Row]:
    """Predicted over measured, one process each."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as name:
            folder = pathlib.Path(name) / size
            make_folder(size, folder)
            for way in ways:
                expected = in_own_process("predict", str(folder), way)
                peaks = [in_own_process("measure", str(folder), way)["peak"] for _ in range(rounds)]
                row = compared(size, way, expected["peak"], peaks)
                rows.append(row)
                print(
                    f"{row.what}: {row.median:.2f}, largest in the {expected['phase']}", flush=True
                )
    return rows


def predictions(sizes: list[str], ways: list[str]) -> list[Row]:
    """Predicted peaks of sizes that are not run."""
    rows = []
    for size in sizes:
        for way in ways:
            found = in_own_process("predict", size, way)
            what, peak = f"{size}, {way}: predicted peak", found["peak"] / 1e9
            limit = TARGETS.get(size) if way == "full" else None
            row = at_most(what, [peak], "GB", limit) if limit else Row(what, (peak,), "GB")
            rows.append(row)
            print(f"{what}: {peak:.2f} GB, largest in the {found['phase']}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="70m,160m")
    parser.add_argument("--predicted", default="410m,1b,1.4b,2.8b")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--rounds", type=int, default=1, help="of what is measured")
    parser.add_argument("--json", default="")
    parser.add_argument("--task", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.task:
        task, model, way = arguments.task
        print(json.dumps({"measure": measure, "predict": predict}[task](model, way)))
        return
    ways = arguments.ways.split(",")
    rows = compare([s for s in arguments.models.split(",") if s], ways, arguments.rounds)
    rows += predictions([size for size in arguments.predicted.split(",") if size], ways)
    show("Peak memory of a healing run on the CPU, 8 x 128 tokens a step", rows)
    save(arguments.json, rows)


if __name__ == "__main__":
    main()
