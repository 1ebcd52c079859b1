"""What identifies a cell's runs before anything of it is loaded: a key, which they have as a tag.

A healing run's fingerprint holds the digests of the healthy and of the collapsed weights, which
takes loading the one and fetching the other: gigabytes for nothing where the cell finished long
ago. The key holds in their place what decides these weights, the model's files and all that is
asked of the attack. Two runs of one key have one fingerprint where an attack gives the same weights
again; where it does not, as on some accelerators, each is as good as the other.
"""

from __future__ import annotations

import functools
import hashlib
import pathlib
from typing import Any

from healing.config.basin import BasinConfig
from healing.config.fingerprint import fingerprint
from healing.config.heal import HealConfig
from healing.errors import HealingError
from healing.models.loading import resolve_device
from healing.models.local_models import ADAPTER_WEIGHTS, weight_files
from healing.models.model_files import Location, locate, tokenizer_location
from healing.models.weight_headers import UnusableError
from healing.progress import during, enter, tick
from healing.registry import SHAM
from healing.stages.cells.attack import attack_code
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.heal import heal_code
from healing.stages.cells.inputs import corpus_for, device_kind, measurement_modules
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.launching.cell_configs import attack_config, heal_config
from healing.stages.launching.chain import Chain

BESIDE_WEIGHTS = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Endings of configurations, tokenizers and templates."""
BLOCK = 2**24
"""Bytes of a file between two moments at which a stop is heard."""


def heal_key(chain: Chain, cell: SweepCell) -> str:
    """Key of a cell's healing run; empty where none can be told, as where something is wrong with
    the cell, which its run will say.
    """
    try:
        config = heal_config(chain.config, cell, chain.source, chain.healer)
        attack = "" if cell.role == SHAM else _attack_key(chain, cell)
        sources = _sources(config)
        enter("reading text")
        return fingerprint(
            "heal",
            config,
            attack,
            sources,
            corpus_for(config).digests,
            heal_code(config, *measurement_modules(config)),
            device_kind(config),
            chain.healer.digest if chain.healer else "",
        )
    except (HealingError, UnusableError, OSError):
        return ""


def basin_key(config: BasinConfig) -> str:
    """Key of the landscape of one healing run, whose id stands for its weights."""
    code = code_digest("healing.stages.cells.basin")
    return fingerprint(
        "basin", config, config.heal_run_id, code, resolve_device(config.device).type
    )


def _attack_key(chain: Chain, cell: SweepCell) -> str:
    """What decides a cell's attack, but the model and the texts, which are those of its healing."""
    reference, direction = (
        _attack_key(chain, chain.first(arm)) if arm else ""
        for arm in (cell.matched_to, cell.direction)
    )
    config = attack_config(chain.config, cell, reference, direction)
    return fingerprint("attack", config, reference, direction, attack_code(config))


def _sources(config: HealConfig) -> list[Any]:
    """Content of the model's files, and of the tokenizer's where another one is named."""
    enter("looking at the model's files")
    found = [_content(locate(config.model, config.revision, config.deduped, weights=False))]
    if config.tokenizer:
        found.append(_content(tokenizer_location(config.tokenizer)))
    return found


def _content(place: Location) -> list[Any]:
    """The commit where there is one, else a digest of every file of the model."""
    if place.commit:
        return [place.source, place.commit]
    folder = place.folder
    if place.gguf:
        read = {folder / place.gguf}  # with its configuration and its tokenizer
    else:
        read = {path for path in folder.iterdir() if path.suffix.lower() in BESIDE_WEIGHTS}
        read |= {*weight_files(folder), *(folder / name for name in ADAPTER_WEIGHTS)}
    digests = {
        str(path.relative_to(folder)): _digest(path, path.stat().st_mtime_ns)
        for path in sorted(read)
        if path.is_file()
    }
    return [digests, _content(place.base) if place.base else []]


@functools.lru_cache(maxsize=256)
def _digest(path: pathlib.Path, changed: int) -> str:
    """Of one file's content, once a process and change."""
    digest = hashlib.sha256()
    with during("reading the model's files"), path.open("rb") as file:
        while block := file.read(BLOCK):
            tick()
            digest.update(block)
    return digest.hexdigest()
