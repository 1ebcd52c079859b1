"""Why a model that did load is not the one meant, or not one for this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from healing.models.blocks import embedding_matrix, transformer_blocks
from healing.models.local_models import OLD_BUFFERS

LARGEST_STACKED_SHARE = 0.1
"""Of the numbers in blocks, those in tensors of more than two dimensions."""


def objections(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, report: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    """Pairs of a reason and what to do, the gravest first.

    Args:
        model: In float32, on the CPU.
        tokenizer: Its own.
        report: What transformers says of the names of its tensors.
    """
    # transformers fills what a file lacks with random numbers, drops what the configuration has no
    # place for (blocks beyond its number of layers), and only warns.
    if counts := _nonfinite(model):
        reason = (
            f"{sum(counts.values())} of its weights are not finite, first in {next(iter(counts))}"
        )
        yield reason, "name a sound copy: this one is damaged, or its training diverged"
    if lacking := sorted(report["missing_keys"]):
        reason = f"its weights lack {len(lacking)} tensors, first {lacking[0]}"
        yield reason, "name a folder or revision with all of them"
    extra = sorted(key for key in report["unexpected_keys"] if not OLD_BUFFERS.search(key))
    if extra:
        reason = f"its configuration has no place for {len(extra)} of its tensors, first {extra[0]}"
        yield reason, "put the configuration that belongs to the weights beside them"
    highest, rows = _highest_id(tokenizer), len(embedding_matrix(model))
    if highest >= rows:
        reason = f"its tokenizer gives ids up to {highest}, its embedding matrix has {rows} rows"
        yield reason, "put the model's own tokenizer beside it"
    inside = [p for block in transformer_blocks(model) for p in block.parameters()]
    stacked = sum(p.numel() for p in inside if p.ndim > 2) / sum(p.numel() for p in inside)
    if stacked > LARGEST_STACKED_SHARE:
        reason = f"{100 * stacked:.0f} % of its blocks are not two-dimensional matrices"
        yield reason, "name a dense model, mixtures of experts are not supported"
    if not any(bool(p.any()) for p in inside):
        yield "the weights of its blocks are all zero", "name the trained model"
    one, other = _two_endings(model)
    if not bool(one.isfinite().all() and other.isfinite().all()):
        reason = "its weights are finite and its logits are not: they overflow float32"
        yield reason, "name a sound copy: this one is damaged, or its training diverged"
    elif bool((one == one[..., :1]).all()):
        reason = "its logits are the same for every token: its numbers overflow on the way"
        yield reason, "name a sound copy: this one is damaged, or its training diverged"
    elif _differ(one[:, :-1], other[:, :-1]):
        reason = "its logits depend on later tokens"
        yield reason, "name a causal language model, this is an encoder"


def _nonfinite(model: PreTrainedModel) -> dict[str, int]:
    """Name → count of NaN and infinite numbers, of the parameters that have any."""
    counts = {name: int((~p.isfinite()).sum()) for name, p in model.named_parameters()}
    return {name: count for name, count in counts.items() if count}


def _highest_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Largest id that plain text or the end of a document gives. The special tokens may go beyond
    the embeddings (Gemma 3's for images), and the ids may have gaps.
    """
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = set(tokenizer.get_vocab().values()) - special
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return max(ids, default=-1)


def _two_endings(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (1, 4, vocabulary) of four tokens, and of the same with another last one."""
    rows = len(embedding_matrix(model))
    # From the middle of the vocabulary: padding is at its ends, and may be masked.
    start = torch.tensor([[0, 1, 2, 3], [0, 1, 2, 4]]) + rows // 2
    with torch.no_grad():
        one, other = model(input_ids=start % rows).logits.split(1)
    return one, other


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits before the last token change with it."""
    # Rounding is about 1e-6 of the logits, what a token matters to its neighbours far above 1e-4.
    return bool((one - other).abs().max() > 1e-4 * one.abs().max())
