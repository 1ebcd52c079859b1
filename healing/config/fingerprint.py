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

LATER_FIELDS = {"tokenizer": "", "text_column": "", "split_rule": "blank_lines"}
"""Fields that came later, and their defaults, under which results are those of before: fingerprints
and settings hold them only where they have another value."""

NOT_SETTINGS = frozenset(
    {
        "seed",
        "measurements",
        "fingerprint",
        "attack_run_id",
        "reference_checkpoint",
        "reference_run_id",
        "reference_fingerprint",
        "model_commit",
        "output_dir",
        "verbosity",
        "device",
        "dry_run",
    }
)
"""Entries of a checkpoint's configuration that runs may differ in and still be pooled."""


def as_params(config: Any) -> dict[str, Any]:
    """The fields of a configuration as a flat dictionary, in declaration order."""
    return dataclasses.asdict(config)


def without_defaults(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a configuration, without those of :data:`LATER_FIELDS` that say nothing."""
    return {k: v for k, v in entries.items() if k not in LATER_FIELDS or v != LATER_FIELDS[k]}


def fingerprint(*parts: Any) -> str:
    """Hash (16 hex digits) of what determines a result.

    Dataclasses contribute every field except :data:`NOT_DETERMINING` (of :data:`LATER_FIELDS` only
    those that are set), and a model's folder not its path: its content is hashed where it is known.
    Anything else must be JSON-serialisable.
    """
    plain = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            part = {k: v for k, v in as_params(part).items() if k not in NOT_DETERMINING}
            if not part.get("measurements"):  # none: as before there were any
                part.pop("measurements", None)
            if os.path.isabs(str(part.get("model", ""))):
                part["model"] = "folder"
        plain.append(without_defaults(part) if isinstance(part, dict) else part)
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
