"""Fingerprints: the hash of what determines a result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

NOT_DETERMINING = frozenset(
    {
        "device",
        "output_dir",
        "cache_dir",
        "verbosity",
        "num_runs",
        "runs_per_checkpoint",
        "checkpoint_dir",
        "attack_run_id",
        "reference_checkpoint",
        "reference_run_id",
        "save_healed",
        "dry_run",
    }
)
"""Fields left out of a cell's fingerprint: they change no number, or what they name does and is put
in where it is known (the kind of device, a reference's weights)."""

NOT_SETTINGS = frozenset(
    {
        "seed",
        "fingerprint",
        "attack_run_id",
        "reference_checkpoint",
        "reference_run_id",
        "reference_fingerprint",
        "model_commit",
        "output_dir",
        "cache_dir",
        "verbosity",
        "device",
        "dry_run",
    }
)
"""Entries of a checkpoint's configuration that runs may differ in and still be pooled."""


def as_params(config: Any) -> dict[str, Any]:
    """The fields of a configuration as a flat dictionary, in declaration order."""
    return dataclasses.asdict(config)


def fingerprint(*parts: Any) -> str:
    """Hash (16 hex digits) of what determines a result.

    Dataclasses contribute every field except :data:`NOT_DETERMINING`, and a model's folder not its
    path: its content is hashed where it is known. Anything else must be JSON-serialisable.
    """
    plain = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            part = {k: v for k, v in as_params(part).items() if k not in NOT_DETERMINING}
            if os.path.isabs(str(part.get("model", ""))):
                part["model"] = "folder"
        plain.append(part)
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
