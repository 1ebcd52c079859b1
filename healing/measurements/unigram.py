"""What token frequencies alone predict."""

from __future__ import annotations

import math

import torch


def unigram_loss(
    train: torch.Tensor, heldout: torch.Tensor, vocab_size: int, opening: int = 0
) -> float:
    """Cross entropy of add-one-smoothed token frequencies of ``train`` on ``heldout``, nats/token.

    The first token of each window is not scored, as for the language model. What begins every
    window is no text and is not counted: it would take its share from all other tokens.

    Args:
        train: Token ids, int64 (windows, length).
        heldout: Likewise.
        vocab_size: Ids that there are.
        opening: How many tokens of every window are not text
            (:func:`healing.data.windows.opening`).
    """
    text = train[:, opening:].flatten()
    counts = torch.bincount(text, minlength=vocab_size).double() + 1.0
    nats = -(counts / counts.sum()).log()
    return float(nats[heldout[:, max(1, opening) :].flatten()].mean())


def unigram_perplexity(
    train: torch.Tensor, heldout: torch.Tensor, vocab_size: int, opening: int = 0
) -> float:
    """Exp of :func:`unigram_loss`."""
    return math.exp(unigram_loss(train, heldout, vocab_size, opening))
