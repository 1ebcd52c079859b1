"""Stage ``pretrain``: make an embedded model from nothing, tracked."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import time

import torch

from healing.config.fingerprint import as_params
from healing.config.pretrain import PretrainConfig
from healing.data.corpora import load_corpus
from healing.measurements.unigram import unigram_perplexity
from healing.reporting.plots import runs as runs_figures
from healing.stages.console import Console
from healing.tracking import run_logger
from healing.tracking.run_files import write_json
from healing.training.pretraining import Pretraining, PretrainRecord


def _metrics(record: PretrainRecord) -> dict[str, float]:
    return {
        "loss": record.heldout_loss,
        "perplexity": math.exp(record.heldout_loss),
        "train_loss": record.train_loss,
        "grad_norm": record.grad_norm,
        "learning_rate": record.learning_rate,
    }


def _store(
    run: run_logger.RunLogger,
    training: Pretraining,
    records: list[PretrainRecord],
    unigram: float,
    digests: dict[str, str],
) -> pathlib.Path:
    config = training.config
    folder = pathlib.Path(config.output_dir) / config.model
    runs_figures.loss_curve(
        folder / "loss_curve.png",
        config.model,
        [r.tokens for r in records],
        [r.train_loss for r in records],
        [r.heldout_loss for r in records],
        math.log(unigram),
    )
    write_json(
        folder / "training_record.json",
        {
            "config": {k: v for k, v in as_params(config).items() if k != "output_dir"},
            "n_params": training.n_params,
            "training_tokens": records[-1].tokens,
            "unique_training_tokens": training.train.numel(),
            "heldout_tokens": training.heldout.numel(),
            "corpus_digests": digests,
            "unigram_perplexity": unigram,
            "heldout_perplexity": math.exp(records[-1].heldout_loss),
            "records": [dataclasses.asdict(r) for r in records],
        },
    )
    for path in sorted(folder.iterdir()):
        run.artifact(path, "model")
    return folder


def pretrain(config: PretrainConfig) -> pathlib.Path:
    """Train, evaluate and store one embedded model; returns its folder."""
    console = Console(config.verbosity)
    if config.threads:
        torch.set_num_threads(config.threads)
    with run_logger.start(
        f"pretrain {config.model}", {"stage": "pretrain", "model": config.model}
    ) as run:
        run.params("pretrain", as_params(config))
        corpus = load_corpus(config.corpus, config.max_documents)
        training = Pretraining.prepare(config, corpus)
        unigram = unigram_perplexity(training.train, training.heldout, config.vocab_size)
        run.metrics({"n_params": training.n_params, "unigram_perplexity": unigram})
        records = []
        start = time.perf_counter()
        with console.bar(training.total_steps, f"pretrain {config.model}") as bar:
            for record in training.run():
                records.append(record)
                elapsed = time.perf_counter() - start
                run.metrics(
                    {**_metrics(record), "tokens_per_second": record.tokens / elapsed}, record.step
                )
                # Saved at every measurement: an interrupted training leaves a usable model.
                training.save(pathlib.Path(config.output_dir) / config.model)
                bar.set_postfix_str(f"held-out perplexity {math.exp(record.heldout_loss):.1f}")
                bar.update(record.step - bar.n)
        folder = _store(run, training, records, unigram, corpus.digests)
        final = math.exp(records[-1].heldout_loss)
        run.describe(
            f"**{config.model}**: {training.n_params:,} parameters, {records[-1].tokens:,} tokens. "
            f"Held-out perplexity **{final:.1f}** (unigram model: {unigram:.1f})."
        )
        console.say(
            f"{config.model}: held-out perplexity {final:.1f} (unigram {unigram:.1f}) → {folder}"
        )
    return folder
