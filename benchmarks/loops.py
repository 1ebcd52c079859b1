"""Healing beside a bare PyTorch loop and transformers.Trainer: the same model, batches, optimiser.

All three take literally the same batches, in the order that the project draws for itself, and begin
every round with the same weights.

* *bare*: forward pass with transformers' own loss, backward pass, fused AdamW; nothing else.
* *project*: the healing loop as it runs, with a measurement of the whole probe (loss, spectra of
  all blocks) every 10 steps, and all metrics logged to MLflow on SQLite.
* *Trainer*: transformers.Trainer with the same optimiser, evaluating the loss alone (no spectra) on
  the same probe every 10 steps, reporting to nothing.

Steps per second over the same number of steps; ratios within a round.

    python -m benchmarks.loops [--model micro] [--steps 20] [--rounds 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import tempfile
import time
import warnings
from collections.abc import Callable

import torch
import transformers
from torch.utils.data import Dataset

from benchmarks.shapes import loaded_model
from benchmarks.table import at_least, ratios, rounds, save, show
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.data.windows import batches
from healing.measurements.probe import Probe
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.stages.cells.inputs import cached_corpus, use_threads
from healing.tracking import open_runs, run_logger
from healing.tracking.run_files import JsonLines
from healing.training.healing_loop import heal


class Windows(Dataset):
    """Packed windows as transformers.Trainer takes them."""

    def __init__(self, windows: torch.Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


def same_batches(config: HealConfig, windows: torch.Tensor) -> torch.Tensor:
    """What :func:`healing.training.healing_loop.heal` draws from these windows.

    int64 (steps, batch, length).
    """
    drawn = batches(windows, int(config.batch_size), named_generator(0, "sft"))
    return torch.stack(list(itertools.islice(drawn, config.healing_steps)))


def from_equal_weights(
    model: torch.nn.Module, loops: dict[str, Callable[[], float]]
) -> dict[str, Callable[[], float]]:
    """The same loops, each given the weights that the model has now before it is timed."""
    saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def restored(loop: Callable[[], float]) -> Callable[[], float]:
        def run() -> float:
            model.load_state_dict(saved)
            return loop()

        return run

    return {name: restored(loop) for name, loop in loops.items()}


def bare(loaded: LoadedModel, config: HealConfig, drawn: torch.Tensor) -> float:
    """Seconds of the loop over batches (steps, batch, length)."""
    model = loaded.model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.healing_lr, weight_decay=0.0, fused=True
    )
    begin = time.perf_counter()
    for batch in drawn:
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = time.perf_counter() - begin
    model.zero_grad()
    model.eval()
    return seconds


def project(
    loaded: LoadedModel,
    config: HealConfig,
    windows: torch.Tensor,
    probe: Probe,
    run: run_logger.RunLogger,
    folder: pathlib.Path,
) -> float:
    """Seconds from the first step to the last record logged; step 0 is measured before.

    The loop draws its batches itself: those of :func:`same_batches`.
    """
    lines = JsonLines(folder / "metrics.jsonl")
    collapsed = probe.measure(loaded.model)
    order = named_generator(0, "sft")
    begin = 0.0
    for record in heal(loaded, config, windows, probe, collapsed, order):
        if record.step:
            values = record.metrics()
            run.metrics({k: v for k, v in values.items() if v == v}, record.step)
            lines.append({"step": record.step, **values})
        else:
            begin = time.perf_counter()
    run.flush()
    return time.perf_counter() - begin


def trainer(
    loaded: LoadedModel,
    config: HealConfig,
    drawn: torch.Tensor,
    probe: Probe,
    folder: pathlib.Path,
) -> float:
    """Seconds of ``train()`` over batches (steps, batch, length)."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=config.healing_steps,
        per_device_train_batch_size=int(config.batch_size),
        per_device_eval_batch_size=16,
        train_sampling_strategy="sequential",  # the windows are in the order of the batches
        learning_rate=float(config.healing_lr),
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=0.0,
        optim="adamw_torch_fused",
        eval_strategy="steps",
        eval_steps=config.measurement_interval,
        logging_steps=config.measurement_interval,
        prediction_loss_only=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = transformers.Trainer(
            loaded.model,
            arguments,
            train_dataset=Windows(drawn.flatten(0, 1)),
            eval_dataset=Windows(probe.windows),
        )
        worker.remove_callback(transformers.trainer_callback.PrinterCallback)
        begin = time.perf_counter()
        worker.train()
        seconds = time.perf_counter() - begin
    loaded.model.zero_grad()
    loaded.model.eval()
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="micro", help="micro, nano, or a Pythia size's shape")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    # The rate is tiny: a random model must not diverge while it is timed.
    config = resolve_from_presets(
        HealConfig(
            model=options.model,
            corpus="stdlib",
            healing_steps=options.steps,
            healing_lr=1e-6,
            precision="fp32",
        )
    )
    use_threads(config)
    loaded = loaded_model(options.model)
    corpus = cached_corpus("stdlib", config.max_documents)
    windows = corpus.windows("train", loaded.tokenizer, config.sequence_length)
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length)
    size = int(config.batch_size)
    drawn = same_batches(config, windows)
    with tempfile.TemporaryDirectory() as folder:
        place = pathlib.Path(folder)
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{place}/mlflow.db"
        os.chdir(place)
        with open_runs.start("loops", {"stage": "benchmark"}) as run:
            loops = {
                "bare": lambda: bare(loaded, config, drawn),
                "project": lambda: project(loaded, config, windows, probe, run, place),
                "Trainer": lambda: trainer(loaded, config, drawn, probe, place / "trainer"),
            }
            seconds = rounds(from_equal_weights(loaded.model, loops), options.rounds)
        os.chdir("/")
    tokens = options.steps * size * config.sequence_length
    speed = {name: [tokens / s for s in values] for name, values in seconds.items()}
    rows = [
        at_least(
            f"{options.model}: project / bare loop",
            ratios(speed["project"], speed["bare"]),
            "of its tokens/s",
            0.8,
        ),
        at_least(
            f"{options.model}: project / Trainer",
            ratios(speed["project"], speed["Trainer"]),
            "of its tokens/s",
            1.1,
        ),
    ]
    show(
        f"{options.model}, {options.steps} steps of {size} x {config.sequence_length} tokens, "
        f"{len(probe.windows)} probe windows, {torch.get_num_threads()} thread(s); tokens/s: "
        + ", ".join(f"{n} {sorted(v)[len(v) // 2]:,.0f}" for n, v in speed.items()),
        rows,
    )
    save(options.json, rows)


if __name__ == "__main__":
    main()
