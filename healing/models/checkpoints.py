"""Checkpoints of collapsed and healed models: safe to read, strict to load, whole on disk."""

from __future__ import annotations

import errno
import functools
import math
import os
import pathlib
import pickle
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
from healing.models.loading import LoadedModel, state_digest

CHECKPOINT_NAME = "checkpoint_post_treatment.pt"
HEALED_NAME = "checkpoint_post_healing.pt"
COLLAPSED_KIND, HEALED_KIND = "post_treatment", "post_healing"
CHECKPOINT_KEYS = ("step", "model_state_dict", "checkpoint_type", "description")


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
    """

    step: int
    state: dict[str, torch.Tensor]
    description: str
    config: dict[str, Any]
    kind: str = COLLAPSED_KIND
    known_digest: str = ""

    @functools.cached_property
    def digest(self) -> str:
        """Hash of the weights (16 hex digits)."""
        return self.known_digest or state_digest(self.state)

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
        state[name] = moved.setdefault(place, value.detach().cpu())
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
    partial = path.with_suffix(".partial")
    content = {
        "step": step,
        "model_state_dict": cpu_state(model),
        "checkpoint_type": kind,
        "description": description,
        "config": config,
    }
    try:
        torch.save(content, partial)
        partial.replace(path)
    except RuntimeError as error:  # what torch makes of a disk that is full
        raise OSError(errno.EIO, str(error).partition("\n")[0], str(path)) from error
    finally:
        partial.unlink(missing_ok=True)


def read_checkpoint(path: pathlib.Path) -> Checkpoint:
    """Read a checkpoint without running any code it may carry.

    Raises:
        CheckpointError: Missing, damaged, unsafe, or without the expected entries.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: give the path of a {CHECKPOINT_NAME}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or holds objects other than tensors and plain values, "
            "which are not loaded: make it anew with the attack entry point"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is truncated or not a torch checkpoint: copy or make it anew"
        ) from error
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(data, dict) or k not in data]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: expected {', '.join(CHECKPOINT_KEYS)}"
        )
    state = data["model_state_dict"]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: model_state_dict is not a mapping of names to tensors")
    config = data.get("config") or {}
    keys = ("model", "revision", "model_commit")
    named = [config.get(k, "") for k in keys] if isinstance(config, dict) else [0]
    if not isinstance(data["step"], int) or not all(isinstance(v, str | None) for v in named):
        raise CheckpointError(
            f"{path}: step is not a number or config is not a mapping that names a model"
        )
    kind = str(data["checkpoint_type"])
    return Checkpoint(data["step"], state, str(data["description"]), config, kind)


def _mismatch(model: nn.Module, state: dict[str, torch.Tensor]) -> str:
    own = model.state_dict()
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
    notes += _torn_ties(own, state) if not notes else []
    return "; ".join(notes)


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
        CheckpointError: A tensor is missing, unexpected or of another shape, or tied ones differ;
            the model is unchanged then.
    """
    notes = _mismatch(loaded.model, checkpoint.state)
    if notes:
        raise CheckpointError(
            f"{path} is not a checkpoint of model {loaded.name} ({notes}): "
            f"name the right one with --model ({', '.join(MODELS)} …)"
        )
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
