"""Checkpoints of collapsed and healed models: safe to read, strict to load, whole on disk."""

from __future__ import annotations

import errno
import functools
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from healing.config.options import AUTO
from healing.config.presets import (
    FOLDER,
    MAIN,
    MODELS,
    canonical_model,
    model_kind,
    same_revision,
    source_of,
)
from healing.data import hub
from healing.errors import CheckpointError
from healing.models.checkpoint_files import (
    DIGESTS,
    HEADER,
    WEIGHTS,
    check_header,
    check_tensors,
    header_digest,
    printable,
    read_content,
    written_weights,
)
from healing.models.loading import LoadedModel, state_sha256

logger = logging.getLogger(__name__)

CHECKPOINT_NAME = "checkpoint_post_treatment.pt"
HEALED_NAME = "checkpoint_post_healing.pt"
COLLAPSED_KIND, HEALED_KIND = "post_treatment", "post_healing"


@dataclass(frozen=True)
class Checkpoint:
    """A collapsed or healed state on disk.

    Attributes:
        step: Attack or healing step it was taken after.
        state: Parameter name → tensor, on the CPU (of a file: mapped, read as it is used).
        description: One line.
        config: What made it ({} in files of the predecessor).
        kind: ``post_treatment`` (collapsed) or ``post_healing``.
        known_digest: Hash of the weights, where the tensors are not at hand any more.
        written_digest: Hash of the weights (64 hex digits) as they were saved; empty where unknown.
        path: Where it was read, for messages.
    """

    step: int
    state: dict[str, torch.Tensor]
    description: str
    config: dict[str, Any]
    kind: str = COLLAPSED_KIND
    known_digest: str = ""
    written_digest: str = ""
    path: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the weights (16 hex digits).

        Raises:
            CheckpointError: They are not the weights that were saved.
        """
        if self.known_digest:
            return self.known_digest
        found = state_sha256(self.state)
        if self.written_digest and found != self.written_digest:
            raise CheckpointError(
                f"{self.path} was damaged after it was written (its weights have another digest "
                "than the one saved with them): copy it anew, or make it again"
            )
        if self.path and not self.written_digest:
            logger.warning(
                f"{printable(self.path)} carries no digest (an older version or another program "
                "wrote it): whether its weights are as they were saved cannot be told"
            )
        return found[:16]

    def without_tensors(self) -> Checkpoint:
        """What is still asked of it once a model holds its weights."""
        return replace(self, state={}, known_digest=self.digest)

    @property
    def model_name(self) -> str | None:
        """The model it names, if it names one."""
        return self.config.get("model")

    @property
    def revision(self) -> str:
        """The model's revision on the Hub; older files name none, and are of the newest."""
        return str(self.config.get("revision", ""))

    @property
    def commit(self) -> str:
        """The commit on the Hub that its model was; empty in older files and of other models."""
        return str(self.config.get("model_commit", ""))

    def pin_commit(self) -> None:
        """Let its revision mean that commit in this process, also where a branch has moved since:
        its healthy reference is the model it was made from.
        """
        if self.model_name and self.commit:
            repo = source_of(self.model_name, self.deduped)
            hub.pin(repo, self.revision or MAIN, self.commit)

    @property
    def deduped(self) -> bool:
        """Whether the model is a Pythia trained on the deduplicated Pile."""
        return bool(self.config.get("deduped", False))

    @property
    def tokenizer(self) -> str:
        """The tokenizer that was named for the model; empty = its own."""
        return str(self.config.get("tokenizer", ""))

    def model_fields(
        self, path: object, model: str, revision: str, deduped: bool
    ) -> dict[str, Any]:
        """The model to load for it, as fields of a configuration; the checkpoint's own where it
        names one.

        A folder may have moved: another one is accepted, and its weights are compared when loaded.

        Args:
            path: Where it was read from, for the message.
            model: As the user named it, or ``auto``.
            revision: As the user named it (the checkpoint's commit is as good), or empty.
            deduped: As the user said.

        Raises:
            CheckpointError: The user names another model than the checkpoint.
        """
        named = self.model_name
        if named is None:
            return {"model": model, "revision": revision, "deduped": deduped}
        if model != AUTO and os.path.isabs(named) and model_kind(model) == FOLDER:
            named = canonical_model(model)
        is_of = f"{path} is a checkpoint of"
        if model not in (AUTO, self.model_name) and canonical_model(model) != named:
            raise CheckpointError(
                f"{is_of} model {named}, --model says {model}: leave --model out or name the same"
            )
        is_its = same_revision(revision, self.revision) or revision == self.commit
        if revision and not is_its:
            raise CheckpointError(
                f"{is_of} revision {self.revision or MAIN} of model {named}, --revision says "
                f"{revision}: leave --revision out or name the same"
            )
        if deduped and not self.deduped:
            raise CheckpointError(f"{is_of} model {named} without --deduped: leave --deduped out")
        return {"model": named, "revision": self.revision, "deduped": self.deduped}


def cpu_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict on the CPU; tied weights stay one tensor. May share memory with the model."""
    moved: dict[tuple[Any, ...], torch.Tensor] = {}
    state = {}
    for name, value in model.state_dict().items():
        place = (value.device, value.data_ptr(), value.shape, value.stride())
        # Contiguous: what has gaps or is expanded would be refused when it is read.
        state[name] = moved.setdefault(place, value.detach().cpu().contiguous())
    return state


def save_checkpoint(
    path: pathlib.Path,
    model: nn.Module,
    step: int,
    description: str,
    config: dict[str, Any],
    kind: str = COLLAPSED_KIND,
) -> None:
    """Write a checkpoint that ``torch.load(weights_only=True)`` reads.

    The file appears whole or not at all (written beside, then renamed). Tied weights are under each
    of their names, stored once.

    Raises:
        OSError: It cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, state = path.with_suffix(".partial"), cpu_state(model)
    content: dict[str, Any] = {
        "step": step,
        "model_state_dict": state,
        "checkpoint_type": kind,
        "description": description,
        "config": config,
    }
    content[DIGESTS] = {
        HEADER: header_digest(content, state),
        WEIGHTS: state_sha256(state),
    }
    try:
        torch.save(content, partial)
        partial.replace(path)
    except RuntimeError as error:  # what torch makes of a disk that is full
        raise OSError(errno.EIO, _write_failure(error, path.parent, state), str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def _write_failure(
    error: Exception, folder: pathlib.Path, state: Mapping[str, torch.Tensor]
) -> str:
    needed = sum(value.numel() * value.element_size() for value in state.values())
    free = shutil.disk_usage(folder).free
    reason = str(error).partition("\n")[0]
    return f"{reason}; it takes {needed / 1e9:.2g} GB, {free / 1e9:.2g} GB are free"


def read_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Read a checkpoint without running any code it may carry, and without reading its weights.

    Raises:
        CheckpointError: Missing, damaged, unsafe, without the expected entries, or holding what
            is no plain value or dense tensor (:mod:`healing.models.checkpoint_files`).
    """
    data = read_content(path)
    check_header(path, data)
    state = data["model_state_dict"]
    check_tensors(path, state)
    return Checkpoint(
        data["step"],
        state,
        data["description"],
        data.get("config") or {},
        data["checkpoint_type"],
        written_digest=written_weights(path, data),
        path=str(path),
    )


def _mismatch(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> str:
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    shapes = [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
    notes = []
    if missing:
        notes.append(f"{len(missing)} tensors missing, first {missing[0]}")
    if extra:
        notes.append(f"{len(extra)} unexpected, first {extra[0]}")
    if shapes:
        key = sorted(shapes)[0]
        notes.append(
            f"{len(shapes)} of another shape, first {key} "
            f"{tuple(state[key].shape)} for {tuple(own[key].shape)}"
        )
    kinds = [k for k in own.keys() & state.keys() if not _same_kind(own[k], state[k])]
    if kinds:
        key = sorted(kinds)[0]
        notes.append(f"{len(kinds)} of another kind of number, first {key} ({state[key].dtype})")
    return "; ".join(notes)


def _same_kind(own: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether numbers are of one kind: real ones of any precision, else the very same format."""
    both = own.is_floating_point() and other.is_floating_point()
    return both or own.dtype == other.dtype


def require_fitting(loaded: LoadedModel, checkpoint: Checkpoint, path: object) -> None:
    """Compare names, shapes and kinds of numbers with a model's, before any weight is read.

    Raises:
        CheckpointError: They differ.
    """
    _require(loaded, _mismatch(loaded.model.state_dict(), checkpoint.state), path)


def _require(loaded: LoadedModel, notes: str, path: object) -> None:
    if notes:
        raise CheckpointError(
            f"{path} is not a checkpoint of model {loaded.name} ({notes}): "
            f"name the right one with --model ({', '.join(MODELS)} …)"
        )


def _torn_ties(own: Mapping[str, torch.Tensor], state: Mapping[str, torch.Tensor]) -> list[str]:
    """Names that are one tensor in the model and two different ones in a state."""
    first: dict[int, str] = {}
    for name, value in own.items():
        twin = first.setdefault(value.data_ptr(), name) if value.numel() else name
        if twin != name and not torch.equal(state[twin].nan_to_num(), state[name].nan_to_num()):
            return [f"{twin} and {name} are tied in the model and differ here"]
    return []


@torch.no_grad()
def weight_distance(model: nn.Module, state: Mapping[str, torch.Tensor]) -> float:
    """‖W−W₀‖/‖W₀‖ of a state against a model's parameters, as an attack's ``weight_change``.

    One tensor at a time; NaN where the state lacks a parameter or has another shape.
    """
    moved, own = 0.0, 0.0
    for name, parameter in model.named_parameters():
        other = state.get(name)
        if other is None or other.shape != parameter.shape:
            return math.nan
        here = parameter.detach().cpu()
        difference = other.to(here.dtype) - here
        moved += float(torch.linalg.vector_norm(difference, dtype=torch.float64)) ** 2
        own += float(torch.linalg.vector_norm(here, dtype=torch.float64)) ** 2
    return math.sqrt(moved / own) if own else math.nan


def load_state(loaded: LoadedModel, checkpoint: Checkpoint, path: object) -> None:
    """Put a checkpoint's weights into a model, strictly, as float32.

    Raises:
        CheckpointError: A tensor is missing, unexpected, of another shape or kind, or tied ones
            differ, or the weights are not those that were saved; the model is unchanged then.
    """
    require_fitting(loaded, checkpoint, path)
    _require(loaded, "; ".join(_torn_ties(loaded.model.state_dict(), checkpoint.state)), path)
    _ = checkpoint.digest  # compared with the one that was saved
    loaded.model.load_state_dict(checkpoint.state, strict=True)


def require_made_from(checkpoint: Checkpoint, loaded: LoadedModel, path: object) -> None:
    """Check that a checkpoint comes from these healthy weights, where it says so.

    Raises:
        CheckpointError: It was made from others.
    """
    made_from = checkpoint.config.get("healthy_digest")
    if made_from and made_from != loaded.digest:
        raise CheckpointError(
            f"{path} was made from other weights of {loaded.name} than the ones here: "
            "the healthy state of its run is not this model"
        )
