"""Bases of low-curvature subspaces on disk: decomposed once per healthy model and energy, for all
seeds and arms.

A file holds what :class:`healing.curvature.subspaces.MatrixSubspace` holds, bit for bit, so that no
number depends on whether it was there. It is safetensors: reading one runs no code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from healing.curvature.subspaces import MatrixSubspace, SingularSubspace
from healing.kept_files import make_room, written_whole
from healing.progress import phase

FORMAT = "gram-1"
"""Part of every key: another way of making the bases needs another name."""

LEAST_NUMBERS = 10_000_000
"""Below this many weights the bases are made in about a second, and not kept."""

ABOUT = "about"
"""Entry of a file's metadata: which matrices are wide, and the digest of all numbers."""
MOST_BYTES = 10 * 10**9
"""Of all files together; the longest unused go first."""


@dataclass(frozen=True)
class BasisCache:
    """Bases in a folder of its own.

    Attributes:
        folder: Made when something is kept.
        most_bytes: Bound of the folder's size.
        least_numbers: Weights that a model has at least for its bases to be kept.
    """

    folder: pathlib.Path
    most_bytes: int = MOST_BYTES
    least_numbers: int = LEAST_NUMBERS

    def subspace(
        self, weights: Mapping[str, torch.Tensor], energy: float, digest: str
    ) -> SingularSubspace:
        """The subspaces of the weights, from disk where they are there, else made and kept.

        What cannot be read or written is made and goes unkept: the folder may be full, or another
        user's.

        Args:
            weights: The matrices.
            energy: Share of the leading directions.
            digest: Hash of the model's weights; empty = nothing is kept.
        """
        if not digest or sum(w.numel() for w in weights.values()) < self.least_numbers:
            return SingularSubspace.of(weights, energy)
        path = self.folder / f"{_key(weights, energy, digest)}.safetensors"
        found = _read(path, weights)
        if found is None:
            found = SingularSubspace.of(weights, energy)
            with contextlib.suppress(OSError, SafetensorError):
                self._keep(path, found)
        return found

    def _keep(self, path: pathlib.Path, subspace: SingularSubspace) -> None:
        tensors, wide = {}, []
        for name, space in subspace.matrices.items():
            tensors[f"{name}/leading"], tensors[f"{name}/rest"] = space.leading, space.rest
            wide += [name] if space.wide else []
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > self.most_bytes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        make_room(self.folder, "*.safetensors", size, self.most_bytes)
        about = json.dumps({"wide": wide, "sha256": _digest(tensors)})
        with written_whole(path) as partial:
            save_file(tensors, partial, {ABOUT: about})  # of several entries the order varies


def kept_bases(
    weights: Mapping[str, torch.Tensor], energy: float, digest: str, folder: str
) -> SingularSubspace:
    """:meth:`BasisCache.subspace` of a folder as a configuration names it; empty = none is kept."""
    if not folder:
        return SingularSubspace.of(weights, energy)
    cache = BasisCache(pathlib.Path(os.path.expanduser(folder)) / "bases")
    return cache.subspace(weights, energy, digest)


def _key(weights: Mapping[str, torch.Tensor], energy: float, digest: str) -> str:
    """All that the last digits of the bases depend on."""
    device = next(iter(weights.values())).device.type
    threads = torch.get_num_threads() if device == "cpu" else ""
    return f"{FORMAT}-{digest}-{energy!r}-torch{torch.__version__}-{device}{threads}"


def _read(path: pathlib.Path, weights: Mapping[str, torch.Tensor]) -> SingularSubspace | None:
    """What a file holds, on the weights' devices; ``None`` where it is absent, damaged or of other
    matrices.
    """
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            wide, matrices, tensors = set(about["wide"]), {}, {}
            for name, weight in phase("reading kept bases", weights.items(), len(weights)):
                for side in ("leading", "rest"):
                    tensors[f"{name}/{side}"] = file.get_tensor(f"{name}/{side}")
                parts = (tensors[f"{name}/{side}"] for side in ("leading", "rest"))
                leading, rest = (part.to(weight.device) for part in parts)
                matrices[name] = space = MatrixSubspace(leading, rest, name in wide)
                if not _fits(space, weight):
                    return None
            if _digest(tensors) != about["sha256"]:
                return None
        os.utime(path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return SingularSubspace(matrices)


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of the bytes of all tensors, in the order of their names."""
    found = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        raw: Any = tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        found.update(raw)
    return found.hexdigest()


def _fits(space: MatrixSubspace, weight: torch.Tensor) -> bool:
    short, long = sorted(weight.shape)
    return (
        space.leading.shape == (long, space.k)
        and space.rest.shape == (short, short - space.k)
        and space.wide == (weight.shape[0] < weight.shape[1])
        and {space.leading.dtype, space.rest.dtype} == {weight.dtype}
    )
