"""Packed windows of tokens, and batches of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch

from healing.errors import CorpusError
from healing.progress import phase

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DOCUMENTS_PER_CALL = 64
"""Documents tokenized at once (the tokenizer works on them in parallel)."""
CHARACTERS_PER_TOKEN = 16
"""Of a long document this many are tried first for every token that is needed; prose has 4 to 5."""
TOKENS_AT_A_CUT = 64
"""Tokens before a cut that the cut may have changed; words are shorter."""


def batched(items: Iterable[str], size: int) -> Iterator[list[str]]:
    """Lists of at most ``size`` items (``itertools.batched`` of Python 3.12)."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


class ChatText(str):
    """A text that a model's chat template made: what spells a special token in it is one."""


def opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What begins every window: the beginning-of-sequence token of a tokenizer that puts it in
    front of a text by default (Llama's, Gemma's), else nothing (Pythia's, GPT-2's).

    Models that were trained behind that token are far from their healthy loss without it.
    """
    first = tokenizer.bos_token_id
    if first is None or tokenizer("a", verbose=False)["input_ids"][:1] != [first]:
        return []
    return [first]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of texts. What spells a special token is read as text: it ends no document, and its
    id may be beyond the embeddings.
    """
    ids: list[list[int]] = []
    for is_chat, alike in itertools.groupby(texts, lambda text: isinstance(text, ChatText)):
        ids += tokenizer(
            list(alike), add_special_tokens=False, split_special_tokens=not is_chat, verbose=False
        )["input_ids"]
    return ids


def _beginning(text: str, tokenizer: PreTrainedTokenizerBase, needed: int) -> list[int]:
    """At least ``needed`` tokens of a text if it has them, without tokenizing all of a long one.

    A cut changes the tokens beside it, so the last :data:`TOKENS_AT_A_CUT` before it are not used.
    """
    size = CHARACTERS_PER_TOKEN * (needed + TOKENS_AT_A_CUT)
    while size < len(text):
        ids = _encode([type(text)(text[:size])], tokenizer)[0][:-TOKENS_AT_A_CUT]
        if len(ids) >= needed:
            return ids
        size *= 2
    return _encode([text], tokenizer)[0]


def _stream(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, wanted: int | None
) -> list[int]:
    """Tokens of documents, each followed by end-of-text; at least ``wanted`` where there are."""
    stream: list[int] = []
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for group in phase("tokenizing", batched(texts, DOCUMENTS_PER_CALL)):
        if wanted is None or sum(map(len, group)) <= CHARACTERS_PER_TOKEN * wanted:
            for ids in _encode(group, tokenizer):
                stream += ids + separator
        else:
            for text in group:
                if len(stream) < wanted:
                    stream += _beginning(text, tokenizer, wanted - len(stream)) + separator
        if wanted is not None and len(stream) >= wanted:
            break
    return stream


def pack(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """Tokenize and pack documents, separated by end-of-text, into windows without padding.

    Args:
        texts: Documents.
        tokenizer: Its ``eos_token_id`` parts the documents; what it puts in front of a text by
            default begins every window (:func:`opening`).
        length: Tokens per window.
        max_tokens: Stop after this many tokens; ``None`` = all.

    Returns:
        int64 tensor (windows, length); the last incomplete window is dropped.

    Raises:
        CorpusError: The text does not fill ``max_tokens`` or one window.
    """
    first = opening(tokenizer)
    body = length - len(first)
    stream = _stream(texts, tokenizer, max_tokens)
    wanted = length if max_tokens is None else max_tokens
    if len(stream) < wanted:
        raise CorpusError(
            f"the text gives {len(stream)} tokens where {wanted} are needed: "
            "use a larger corpus, or a smaller --probe-tokens or --sequence-length"
        )
    windows = max_tokens // length if max_tokens else len(stream) // body
    packed = torch.tensor(stream[: windows * body], dtype=torch.int64).view(windows, body)
    return torch.cat([torch.tensor(first, dtype=torch.int64).expand(windows, -1), packed], dim=1)


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
