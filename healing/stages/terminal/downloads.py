"""What a command is about to download, said before it does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from healing.config.options import AUTO
from healing.config.presets import DEFAULT_MODEL, preset_for
from healing.errors import HealingError
from healing.models.model_files import bytes_to_fetch

GIVEN = ("collapsed_checkpoint", "attack_run_id", "checkpoint_dir", "heal_run_id")
"""Options that name a state, which says itself what model it is of."""


def size_text(count: int | None) -> str:
    """Bytes in the unit that people read, as ``2.1 GB``."""
    if count is None:
        return "size unknown"
    unit, name = (1e9, "GB") if count >= 1e9 else (1e6, "MB")
    return f"{count / unit:.1f} {name}"


def downloads(config: Any) -> Iterator[str]:
    """A line per model or corpus of a configuration that is not on this machine.

    What cannot be told (no network, no such model) is left to the command itself, which says why.
    """
    if getattr(config, "dry_run", False):
        return
    for name in _models(config):
        with contextlib.suppress(HealingError):
            count = bytes_to_fetch(name, config.revision, config.deduped)
            if count != 0:
                yield (
                    f"downloading model {name} ({size_text(count)}) from the Hugging Face Hub, "
                    "once; nano and micro need no download"
                )
            corpus = preset_for(name).corpus if config.corpus == AUTO else config.corpus
            if corpus == "pile":
                yield "reading text of the Pile from the Hugging Face Hub; --corpus names another"


def _models(config: Any) -> list[str]:
    """The models that are named, or stand for ``auto`` where no state is given."""
    if not hasattr(config, "revision"):
        return []
    if hasattr(config, "model_list"):
        return list(config.model_list())
    if config.model != AUTO:
        return [config.model]
    return [] if any(getattr(config, name, "") for name in GIVEN) else [DEFAULT_MODEL]
