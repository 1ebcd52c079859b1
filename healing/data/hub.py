"""Models on the Hugging Face Hub, from the network or the cache, one commit per process.

Files come by ``huggingface_hub`` into its cache (``HF_HOME``), whole and by commit, and are loaded
from there: what runs is one known commit, and a second load asks for no file again.
"""

from __future__ import annotations

import functools
import glob
import json
import os
import pathlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import huggingface_hub
from huggingface_hub import constants, is_offline_mode
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
    XetDownloadError,
)
from huggingface_hub.utils import _http, disable_progress_bars

from healing.errors import ModelError

if not sys.stderr.isatty():
    disable_progress_bars()

WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Whole file and index of each format, in transformers' order. Pickled ones are read by
``torch.load(weights_only=True)``, where a repository has nothing else (Pythia's earlier revisions).
"""
SMALL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    *(index for _, index in WEIGHTS),
)

CONNECTION_ERRORS = (HTTPError, OSError)
"""What a broken, refused or silent connection raises, and what the Hub answers as an error."""

DOWNLOAD_ERRORS = (*CONNECTION_ERRORS, RuntimeError, ValueError, XetDownloadError)
"""The same of a download, which Xet's client may end with errors of its own."""


def _client() -> Any:
    """The library's own client, but for this: that one waits for ever for a server that accepts and
    does not answer.
    """

    def limit(request: Any) -> None:
        given = request.extensions["timeout"]
        seconds = float(constants.HF_HUB_ETAG_TIMEOUT)
        request.extensions["timeout"] = {
            part: seconds if value is None else value for part, value in given.items()
        }

    client = _http.default_client_factory()
    client.event_hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
    return client


huggingface_hub.set_client_factory(_client)


@dataclass(frozen=True)
class Snapshot:
    """Files of one commit.

    Attributes:
        folder: Where they are.
        commit: 40 hex digits.
    """

    folder: pathlib.Path
    commit: str


_TOKEN = re.compile(r"Bearer\s+[^'\"\s]+|\bhf_[A-Za-z0-9]{20}[^'\"\s]*")
"""A login in an error's text, whatever characters crept into it: what is printed is kept."""


def first_line(error: BaseException) -> str:
    """The first line of an error's text without logins, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return _TOKEN.sub("***", lines[0]) if lines else type(error).__name__


def refusal(error: BaseException, kind: str, repo: str) -> str:
    """What the Hub's answer means for a ``model`` or ``dataset``, and what to do about it."""
    page = f"{constants.ENDPOINT}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, RevisionNotFoundError):
        return f"no such revision: its branches and tags are listed at {page}/tree/main"
    log_in = "log in (hf auth login, or set HF_TOKEN)"
    if isinstance(error, GatedRepoError):
        return f"it is gated: accept its terms at {page}, then {log_in}"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no such {kind} that you may read: check the name, or {log_in}"
    return first_line(error)


_PINNED: dict[tuple[str, str], str] = {}


def pin(repo: str, revision: str, commit: str) -> None:
    """Let a branch or tag mean one commit from now on in this process: the one that a checkpoint
    was made from, also where the branch has moved since.
    """
    _PINNED[repo, revision] = commit


@functools.cache
def _resolve(repo: str, revision: str) -> str:
    """Commit of a revision: as the Hub says now, else as the cache knows.

    Raises:
        ModelError: There is no such model or revision, or nobody to ask.
    """
    try:
        return huggingface_hub.HfApi().resolve_revision(repo, revision=revision).resolved
    except RevisionResolutionError as error:
        raise ModelError(_not_cached(repo, revision, error.__cause__ or error)) from error
    except (*CONNECTION_ERRORS, HFValidationError) as error:
        reason = refusal(error, "model", repo)
        raise ModelError(f"model {repo}, revision {revision}: {reason}") from error


def _not_cached(repo: str, revision: str, error: BaseException) -> str:
    where = f"revision {revision} of model {repo} is not in the cache {constants.HF_HUB_CACHE}"
    if isinstance(error, OfflineModeIsEnabled) or is_offline_mode():
        return (
            f"{where}, and HF_HUB_OFFLINE forbids the network: unset it to download the model, set "
            "HF_HOME to a cache that has it, or use --model nano or micro, which need no download"
        )
    return (
        f"{where}, and the Hub at {constants.ENDPOINT} cannot be reached ({first_line(error)}): "
        "check the network, set HF_HOME to a cache that has it, or use --model nano or micro, "
        "which need no download"
    )


def _fetch(repo: str, revision: str, commit: str, patterns: Sequence[str]) -> pathlib.Path:
    try:
        folder = huggingface_hub.snapshot_download(
            repo, revision=commit, allow_patterns=list(patterns)
        )
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        # A gated model tells of itself and refuses its files; a commit is not looked up before.
        reason = refusal(error, "model", repo)
        raise ModelError(f"model {repo}, revision {revision}: {reason}") from error
    except DOWNLOAD_ERRORS as error:
        if is_offline_mode():
            raise ModelError(_not_cached(repo, revision, error)) from error
        raise ModelError(
            f"the download of model {repo} (revision {revision}) from {constants.ENDPOINT} was not "
            f"completed ({first_line(error)}): run again, complete files are kept"
        ) from error
    return pathlib.Path(folder)


def _file_names(repo: str, snapshot: Snapshot) -> list[str]:
    try:
        return [
            f.path for f in huggingface_hub.get_cached_repo_tree(repo, revision=snapshot.commit)
        ]
    except CachedRepoTreeNotFoundError:  # a cache that another program filled
        return os.listdir(snapshot.folder)


@functools.cache
def _small_files(repo: str, revision: str, commit: str) -> Snapshot:
    return Snapshot(_fetch(repo, revision, commit, SMALL_FILES), commit)


def small_files(repo: str, revision: str) -> Snapshot:
    """Configuration and tokenizer of a model.

    Args:
        repo: Hub id.
        revision: Branch, tag or commit.

    Raises:
        ModelError: In one sentence why not, and what to do.
    """
    pinned = _PINNED.get((repo, revision), "")
    return _small_files(repo, pinned or revision, pinned or _resolve(repo, revision))


def _weight_files(repo: str, revision: str, small: Snapshot) -> list[str]:
    """Names of the files that hold the weights: the whole one, else those that the index names."""
    names = set(_file_names(repo, small))
    for whole, index in WEIGHTS:
        if whole in names:
            return [whole]
        if index in names:
            break
    else:
        raise ModelError(
            f"revision {revision} of model {repo} has neither model.safetensors nor "
            "pytorch_model.bin: name a revision or model with weights for transformers"
        )
    damaged = f"{index} of model {repo}, revision {revision},"
    try:
        named = set(json.loads((small.folder / index).read_text())["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ModelError(f"{damaged} is damaged ({first_line(error)}): name another") from error
    if lacking := sorted(named - names, key=str):
        raise ModelError(
            f"{damaged} names {len(lacking)} files that are not there, first {lacking[0]}: "
            "name a revision with all of them"
        )
    return sorted(named)


@functools.cache
def _whole(repo: str, revision: str, small: Snapshot) -> Snapshot:
    weights = [glob.escape(name) for name in _weight_files(repo, revision, small)]
    folder = _fetch(repo, revision, small.commit, [*SMALL_FILES, *weights])
    return Snapshot(folder, small.commit)


def has_weights(repo: str, revision: str) -> bool:
    """Whether a model's weights are in the cache: only its small files are asked for.

    Raises:
        ModelError: These cannot be had.
    """
    small = small_files(repo, revision)
    return all((small.folder / name).is_file() for name in _weight_files(repo, revision, small))


def bytes_to_fetch(repo: str, revision: str) -> int | None:
    """Bytes of a model's weights that are not in the cache; ``None`` where the Hub tells no sizes.

    Raises:
        ModelError: Its small files cannot be had.
    """
    small = small_files(repo, revision)
    names = _weight_files(repo, revision, small)
    missing = {name for name in names if not (small.folder / name).is_file()}
    if not missing:
        return 0
    try:
        tree = huggingface_hub.get_cached_repo_tree(repo, revision=small.commit)
    except CachedRepoTreeNotFoundError:
        return None
    sizes = [getattr(entry, "size", None) for entry in tree if entry.path in missing]
    return None if None in sizes else sum(filter(None, sizes))


def snapshot(repo: str, revision: str) -> Snapshot:
    """Configuration, tokenizer and weights of a model (safetensors where there are any).

    Args:
        repo: Hub id.
        revision: Branch, tag or commit.

    Raises:
        ModelError: In one sentence why not, and what to do.
    """
    return _whole(repo, revision, small_files(repo, revision))
