"""Stage ``pretrain``: make an embedded model from nothing, tracked."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from healing.config.fingerprint import as_params, fingerprint
from healing.config.pretrain import PretrainConfig
from healing.data.corpora import load_corpus
from healing.measurements.unigram import unigram_perplexity
from healing.progress import Safe, enter
from healing.reporting import run_page
from healing.reporting.plots import runs as figures
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.events import Begin, Events, Record
from healing.stages.driver import Driver
from healing.stages.stage import Report, StageDefaults, Tools
from healing.stages.terminal.console import Console
from healing.tracking.git_version import checkout
from healing.tracking.run_files import write_json
from healing.training.pretraining import Pretraining, PretrainRecord


@dataclass(frozen=True)
class PretrainOutcome:
    """What a training leaves.

    Attributes:
        training: With the trained model.
        records: The trajectory.
        unigram: Perplexity of token frequencies alone on the held-out text.
        digests: Corpus digests by split.
    """

    training: Pretraining
    records: tuple[PretrainRecord, ...]
    unigram: float
    digests: Mapping[str, str]


def pretrain_cell(config: PretrainConfig) -> Events[PretrainOutcome]:
    """One training; the model is saved at every record, so that what is interrupted is usable."""
    enter("reading text")
    corpus = load_corpus(config.corpus, config.max_documents, config.text_column, config.split_rule)
    enter("training the tokenizer")
    training = Pretraining.prepare(config, corpus)
    unigram = unigram_perplexity(training.train, training.heldout, config.vocab_size)
    own = fingerprint(
        "pretrain", config, corpus.digests, code_digest("healing.training.pretraining")
    )
    kept = yield Begin(own, config.model, as_params(config), training.total_steps)
    records: list[PretrainRecord] = list(kept["records"]) if kept else []
    start, before = time.perf_counter(), records[-1].tokens if records else 0
    for record in training.run(kept["loop"] if kept else None):
        if isinstance(record, Safe):
            yield replace(record, state=functools.partial(_state, record, records))
            continue
        records.append(record)
        speed = (record.tokens - before) / (time.perf_counter() - start)
        perplexity = math.exp(record.heldout_loss)
        metrics = {
            "loss": record.heldout_loss,
            "perplexity": perplexity,
            "train_loss": record.train_loss,
            "grad_norm": record.grad_norm,
            "learning_rate": record.learning_rate,
            "tokens_per_second": speed,
        }
        note = f"held-out perplexity {perplexity:.1f}"
        yield Record(record.step, metrics, note, functools.partial(_save, training))
    return PretrainOutcome(training, tuple(records), unigram, corpus.digests)


def _state(safe: Safe, records: Sequence[PretrainRecord]) -> dict[str, Any]:
    """What a cell goes on from: the loop's state, and the records so far."""
    return {"loop": safe.state(), "records": list(records)}


def _save(training: Pretraining, folder: pathlib.Path) -> None:
    training.save(folder)


class PretrainStage(StageDefaults):
    """From text to a language model."""

    name = "pretrain"
    place = ""
    keeps_folder = True
    artifacts: str | None = "model"

    def title(self, config: PretrainConfig) -> str:
        """``pretrain nano``."""
        return f"pretrain {config.model}"

    def tags(self, config: PretrainConfig) -> dict[str, Any]:
        """What runs are grouped by."""
        return {"model": config.model}

    def prepare(self, config: PretrainConfig, tools: Tools) -> PretrainConfig:
        """Set the threads."""
        if config.threads:
            torch.set_num_threads(config.threads)
        return config

    cell = staticmethod(pretrain_cell)

    def store(
        self,
        outcome: PretrainOutcome,
        records: Sequence[Record],
        folder: pathlib.Path,
        run_id: str,
    ) -> Report:
        """The loss curve and the training's record, beside the model."""
        _write_files(outcome, folder)
        training, tokens = outcome.training, outcome.records[-1].tokens
        config, final = training.config, math.exp(outcome.records[-1].heldout_loss)
        text = (
            f"**{config.model}**: {training.n_params:,} parameters, {tokens:,} tokens. "
            f"Held-out perplexity **{final:.1f}** (unigram model: {outcome.unigram:.1f})."
        )
        line = f"{config.model}: held-out perplexity {final:.1f} (unigram {outcome.unigram:.1f})"
        numbers = {"n_params": training.n_params, "unigram_perplexity": outcome.unigram}
        repeat = run_page.repeat("pretrain", run_page.settings(config), checkout())
        page = run_page.page(text, run_id, [], repeat, picture="")
        return Report([(0, numbers)], {}, page, line)


PRETRAIN = PretrainStage()


def _write_files(outcome: PretrainOutcome, folder: pathlib.Path) -> None:
    training, records = outcome.training, outcome.records
    config = training.config
    figures.loss_curve(
        folder / "loss_curve.png",
        config.model,
        [r.tokens for r in records],
        [r.train_loss for r in records],
        [r.heldout_loss for r in records],
        math.log(outcome.unigram),
    )
    write_json(
        folder / "training_record.json",
        {
            "config": {k: v for k, v in as_params(config).items() if k != "output_dir"},
            "n_params": training.n_params,
            "training_tokens": records[-1].tokens,
            "unique_training_tokens": training.train.numel(),
            "heldout_tokens": training.heldout.numel(),
            "corpus_digests": outcome.digests,
            "unigram_perplexity": outcome.unigram,
            "heldout_perplexity": math.exp(records[-1].heldout_loss),
            "records": [dataclasses.asdict(r) for r in records],
        },
    )


def pretrain(config: PretrainConfig, driver: Driver | None = None) -> pathlib.Path:
    """Train, evaluate and store one embedded model; returns its folder."""
    driver = driver or Driver(Console(config.verbosity))
    with driver.process(PRETRAIN.title(config), {"stage": PRETRAIN.name}, config.output_dir) as run:
        if config.system_metrics:
            run.system_metrics()
        done = driver.run_cell(PRETRAIN, config, run=run)
    return done.folder
