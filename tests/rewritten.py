"""Checkpoints whose content a test changes: signed anew, so that the change itself is met."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import torch

from healing.models.checkpoint_files import DIGESTS, HEADER, WEIGHTS, header_digest
from healing.models.checkpoints import state_sha256


def rewritten(
    path: pathlib.Path, target: pathlib.Path, change: Callable[[dict[str, Any]], object]
) -> pathlib.Path:
    """Write a checkpoint's content, changed in place by a function, to another file."""
    data = torch.load(path, weights_only=True)
    del data[DIGESTS]
    change(data)
    state = data["model_state_dict"]
    data[DIGESTS] = {HEADER: header_digest(data, state), WEIGHTS: state_sha256(state)}
    torch.save(data, target)
    return target
