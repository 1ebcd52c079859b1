"""Inputs of a cell, loaded once per process: corpora and training windows are pure functions of
their arguments, so they are kept.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch

from healing.config.options import AUTO, flag_name
from healing.config.presets import FOLDER, HUB, model_kind, probe_tokens_for
from healing.config.resolve import ConfigT, resolve_from_presets
from healing.config.shared import BLANK_LINES, BaseConfig
from healing.data.corpora import load_corpus
from healing.data.splits import Corpus
from healing.errors import ConfigError, CorpusError
from healing.measurements.probe import Probe
from healing.measurements.spectrum import ROWS_PER_DIMENSION
from healing.models.blocks import embedding_matrix
from healing.models.chat import ChatTemplate
from healing.models.loading import LoadedModel, load_model, resolve_device
from healing.models.model_files import model_shape
from healing.progress import enter
from healing.registry import MEASUREMENTS
from healing.stages.cells.events import Input

DEFAULT_THREADS = torch.get_num_threads()
"""What ``threads=0`` means, whatever an earlier cell of the process was given."""

cached_corpus = functools.lru_cache(maxsize=4)(load_corpus)


def corpus_for(config: BaseConfig) -> Corpus:
    """The corpus that a resolved configuration names."""
    template: ChatTemplate | None = None
    if (config.text_column, config.split_rule) != ("", BLANK_LINES):
        template = ChatTemplate(config.model, config.revision, config.deduped, config.tokenizer)
    return cached_corpus(
        config.corpus,
        config.max_documents,
        config.text_column,
        config.split_rule,
        template,
        config.cache_dir,
    )


def training_windows(config: BaseConfig, corpus: Corpus, loaded: LoadedModel) -> torch.Tensor:
    """Packed windows of the ``train`` split, int64 (windows, length); not to be changed in place.

    Raises:
        CorpusError: The split does not fill one batch.
    """
    windows = corpus.windows("train", loaded.tokenizer, config.sequence_length)
    if len(windows) < int(config.batch_size):
        raise CorpusError(
            f"train split of corpus {config.corpus!r} fills {len(windows)} windows of "
            f"{config.sequence_length} tokens, a batch needs {config.batch_size}: "
            "use a larger corpus or a smaller --batch-size"
        )
    return windows


def use_threads(config: BaseConfig) -> None:
    """Set torch's CPU threads: how sums are divided changes their last bits."""
    wanted = int(config.threads) or DEFAULT_THREADS
    if torch.get_num_threads() != wanted:
        torch.set_num_threads(wanted)


def device_kind(config: BaseConfig) -> str:
    """``cpu`` or ``cuda``: ``auto`` and what it resolves to are the same experiment."""
    return resolve_device(config.device).type


def computes_in_bfloat16(config: BaseConfig) -> bool:
    """Whether the device is an accelerator that has bf16 itself: emulated, it is slower than fp32
    (on the CPU bf16 has to be asked for).
    """
    if device_kind(config) != "cuda":
        return False
    return torch.cuda.is_bf16_supported(including_emulation=False)


def resolve_from_model(config: ConfigT) -> ConfigT:
    """Replace every ``auto`` but the device's, also what only the model's own files tell.

    Raises:
        ConfigError: Unknown model, or windows longer than it can read.
        ModelError: Its files cannot be had, or there is no such device.
    """
    config = resolve_from_presets(config, accelerated=computes_in_bfloat16(config))
    if model_kind(config.model) not in (HUB, FOLDER):
        return config  # the presets know their sizes, and read windows of any admissible length
    shape = model_shape(config.model, config.revision, config.deduped)
    for name in ("sequence_length", "catalyst_length"):
        length = 0 if name in config.unresolved else getattr(config, name, 0)
        if shape.max_positions is not None and length > shape.max_positions:
            raise ConfigError(
                f"{flag_name(name)} {length} is more than the {shape.max_positions} positions that "
                f"model {config.label} can read: lower it"
            )
    if config.probe_tokens != AUTO:
        return config
    tokens = probe_tokens_for(shape.hidden_size, config.sequence_length)
    return dataclasses.replace(config, probe_tokens=tokens)


def measurement_modules(config: BaseConfig) -> list[str]:
    """Modules of a configuration's extra measurements: roots of a code digest.

    Raises:
        ConfigError: One cannot be loaded.
    """
    names = config.measurement_list()
    for name in names:
        MEASUREMENTS.load(name)
    return [MEASUREMENTS.module(name) for name in names]


def load_for(config: BaseConfig) -> LoadedModel:
    """The healthy model that a resolved configuration names."""
    return load_model(
        config.model,
        config.device,
        revision=config.revision,
        deduped=config.deduped,
        tokenizer_name=config.tokenizer,
    )


def load_inputs(config: BaseConfig) -> tuple[Corpus, LoadedModel, Probe]:
    """Corpus, healthy model and probe of a resolved configuration, cheapest check first."""
    enter("reading text")
    corpus = corpus_for(config)
    enter("loading model")
    loaded = load_for(config)
    enter("tokenizing")
    extra = config.measurement_list()
    probe = Probe.of(corpus, loaded, int(config.probe_tokens), config.sequence_length, extra)
    return corpus, loaded, probe


def inputs_read(
    config: Any, digests: Mapping[str, str], used: Mapping[str, str]
) -> tuple[Input, ...]:
    """The splits that a cell reads.

    Args:
        config: Names the corpus.
        digests: By split.
        used: Split → what for.
    """
    return tuple(Input(config.corpus, split, digests[split], use) for split, use in used.items())


def few_rows_warnings(config: BaseConfig, loaded: LoadedModel) -> tuple[str, ...]:
    """Say so where the probe has fewer rows per dimension than small eigenvalues need."""
    hidden = embedding_matrix(loaded.model).shape[1]
    rows = int(config.probe_tokens) * (1 - 1 / config.sequence_length)
    if rows >= ROWS_PER_DIMENSION * hidden:
        return ()
    return (
        f"{rows:.0f} probe rows for {hidden} hidden dimensions, fewer than {ROWS_PER_DIMENSION} "
        "per dimension: raise --probe-tokens",
    )


def rank_and_perplexity(metrics: Mapping[str, float]) -> str:
    """What a record shows beside a progress bar."""
    return f"rank {metrics['effective_rank']:.1f}, perplexity {metrics['perplexity']:.3g}"
