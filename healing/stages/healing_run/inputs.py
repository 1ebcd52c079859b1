"""What a healing configuration names to be healed: checkpoints, or the attack that comes first."""

from __future__ import annotations

import pathlib

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.paths import local_path
from healing.config.shared import SAVING
from healing.errors import CheckpointError
from healing.models.checkpoints import CHECKPOINT_NAME
from healing.stages.cells.heal import resolve_from_checkpoint
from healing.stages.stage import checkpoint_file, run_of
from healing.tracking.store import Store


def find_checkpoints(folder: str) -> list[pathlib.Path]:
    """All collapsed checkpoints below a folder, sorted.

    Raises:
        CheckpointError: There is no such folder, or none in it.
    """
    root = local_path(folder, "--checkpoint-dir")
    if not root.is_dir():
        raise CheckpointError(f"--checkpoint-dir {folder} is not a folder: name an existing one")
    named = sorted(root.rglob(CHECKPOINT_NAME))
    # What a link leads to outside is not in the folder, whoever made the link.
    found = [path for path in named if path.resolve().is_relative_to(root)]
    if not found:
        links = " (symbolic links that lead out of it are left out)" if named else ""
        raise CheckpointError(
            f"no {CHECKPOINT_NAME} below {folder}{links}: run the attack entry point first, or "
            "name another folder"
        )
    return found


def local_checkpoint(config: HealConfig, store: Store) -> pathlib.Path | None:
    """The one checkpoint that a configuration names, on this machine; ``None`` where it names none.

    Raises:
        TrackingError: The store has no such run or file.
    """
    if config.attack_run_id:
        run = run_of(config.attack_run_id, "attack", "--attack-run-id", store)
        return store.download(f"runs:/{run.run_id}/checkpoints/{CHECKPOINT_NAME}")
    given = config.collapsed_checkpoint
    if not given:
        return None
    return checkpoint_file(given, "attack", CHECKPOINT_NAME, "--collapsed-checkpoint", store)


def fresh_attack_config(config: HealConfig) -> AttackConfig:
    """The attack that comes first where nothing is named to heal."""
    resolved = resolve_from_checkpoint(config, None, "")
    shared = {
        name: getattr(resolved, name)
        for name in (
            "model",
            "revision",
            "deduped",
            "corpus",
            "tokenizer",
            "text_column",
            "split_rule",
            "max_documents",
            "seed",
            "batch_size",
            "sequence_length",
            "probe_tokens",
            "measurement_interval",
            "measurements",
            "threads",
            "device",
            "output_dir",
            "cache_dir",
            "verbosity",
            "log_layers",
            "log_images",
            *SAVING,
        )
    }
    return AttackConfig(arm=config.arm, **shared, **config.given_of_the_attack())
