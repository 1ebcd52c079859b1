"""What token frequencies alone predict."""

from __future__ import annotations

import math

import torch


def unigram_loss(train: torch.Tensor, heldout: torch.Tensor, vocab_size: int) -> float:
    """Cross entropy of add-one-smoothed token frequencies of ``train`` on ``heldout``, nats/token.

    The first token of each window is not scored, as for the language model.
    """
    counts = torch.bincount(train.flatten(), minlength=vocab_size).double() + 1.0
    nats = -(counts / counts.sum()).log()
    return float(nats[heldout[:, 1:].flatten()].mean())


def unigram_perplexity(train: torch.Tensor, heldout: torch.Tensor, vocab_size: int) -> float:
    """Exp of :func:`unigram_loss`."""
    return math.exp(unigram_loss(train, heldout, vocab_size))
