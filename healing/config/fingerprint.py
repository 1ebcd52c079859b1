"""Fingerprints: the hash of what determines a result."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Any

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.options import ordered_names

LINEAGE = (
    "fingerprint",
    "attack_run_id",
    "model_commit",
    "reference_fingerprint",
    "direction_fingerprint",
)
"""Entries of a checkpoint's configuration that are no fields and say where it comes from: the run
and the weights themselves, which differ from seed to seed."""


def _names_without(cls: type, property_name: str) -> frozenset[str]:
    fields = dataclasses.fields(cls)
    return frozenset(f.name for f in fields if not f.metadata.get(property_name, True))


def not_determining(config: Any) -> frozenset[str]:
    """Fields of a configuration (or class) that are left out of fingerprints.

    See ``determines`` of :func:`healing.config.options.option`.
    """
    return _names_without(config if isinstance(config, type) else type(config), "determines")


def not_separating(config: Any) -> frozenset[str]:
    """Fields of a configuration (or class) that pooled runs may differ in.

    See ``separates`` of :func:`healing.config.options.option`.
    """
    return _names_without(config if isinstance(config, type) else type(config), "separates")


NOT_SETTINGS = not_separating(AttackConfig) | set(LINEAGE)
"""Entries of a checkpoint's configuration that runs may differ in and still be pooled."""


def as_params(config: Any) -> dict[str, Any]:
    """The fields of a configuration as a flat dictionary, in their order."""
    values = dataclasses.asdict(config)
    return {name: values[name] for name in ordered_names(type(config))}


LATER_FIELDS = {
    field.name: field.default
    for kind in (AttackConfig, HealConfig)
    for field in dataclasses.fields(kind)
    if field.metadata.get("later")
}
"""Fields that came later, and their defaults (see ``later`` of
:func:`healing.config.options.option`)."""


def without_defaults(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries of a configuration, without those of :data:`LATER_FIELDS` that say nothing."""
    return {k: v for k, v in entries.items() if k not in LATER_FIELDS or v != LATER_FIELDS[k]}


def fingerprint(*parts: Any) -> str:
    """Hash (16 hex digits) of what determines a result.

    Configurations contribute every field that determines results (:func:`not_determining`), and a
    model's folder not its path: its content is hashed where it is known. Anything else must be
    JSON-serialisable.
    """
    plain = []
    for part in parts:
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            left_out = not_determining(part)
            part = {k: v for k, v in as_params(part).items() if k not in left_out}
            if os.path.isabs(str(part.get("model", ""))):
                part["model"] = "folder"
        plain.append(without_defaults(part) if isinstance(part, dict) else part)
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
