"""Named random streams: one seed, one independent generator per purpose."""

from __future__ import annotations

import hashlib

import torch


def named_generator(seed: int, *names: object) -> torch.Generator:
    """A CPU generator that depends on the seed and the names alone.

    Two streams of one seed are independent (their seeds are hashes), and adding a stream changes
    none of the others.
    """
    text = ":".join(str(part) for part in (seed, *names))
    return torch.Generator().manual_seed(int(hashlib.sha256(text.encode()).hexdigest()[:15], 16))
