"""Packed windows of tokens, and batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from healing.errors import CorpusError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 64
"""Documents tokenized at once (the tokenizer works on them in parallel)."""


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of at most ``size`` items (``itertools.batched`` of Python 3.12)."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Tokenize and pack documents, separated by end-of-text, into windows without padding.

    Args:
        texts: Documents.
        tokenizer: Its ``eos_token_id`` parts the documents.
        length: Tokens per window.
        max_tokens: Stop after this many tokens; ``None`` = all.

    Returns:
        int64 tensor (windows, length); the last incomplete window is dropped.

    Raises:
        CorpusError: The text does not fill ``max_tokens`` or one window.
    """
    stream: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for group in batched(texts, DOCUMENTS_PER_CALL):
        encoded = tokenizer(group, add_special_tokens=False, verbose=False)["input_ids"]
        for ids in encoded:
            stream += ids + separator
        if max_tokens is not None and len(stream) >= max_tokens:
            break
    wanted = length if max_tokens is None else max_tokens
    if len(stream) < wanted:
        raise CorpusError(
            f"the text gives {len(stream)} tokens where {wanted} are needed: "
            "use a larger corpus, or a smaller --probe-tokens or --sequence-length"
        )
    windows = (max_tokens or len(stream)) // length
    return torch.tensor(stream[: windows * length], dtype=torch.int64).view(windows, length)


def batches(
    windows: torch.Tensor, batch_size: int, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Endless random batches: a fresh permutation of the windows each epoch.

    Args:
        windows: (windows, length) int64.
        batch_size: Rows per batch.
        generator: CPU generator of the data order.

    Raises:
        CorpusError: There are fewer windows than one batch needs.
    """
    if len(windows) < batch_size:
        raise CorpusError(
            f"{len(windows)} training windows cannot fill a batch of {batch_size}: "
            "use a larger corpus or a smaller --batch-size"
        )
    while True:
        order = torch.randperm(len(windows), generator=generator)
        for start in range(0, len(order) - batch_size + 1, batch_size):
            yield windows[order[start : start + batch_size]]
