"""A checkpoint's file as data from strangers: what it may hold, found out before it is used.

In this order: the directory of the file (sizes), the instructions of its pickle (which constructors
they name), its plain values (types, sizes), its tensors (dense, and no larger than the file). No
byte of a weight is read until then. The digests that were written with it tell a damaged file from
a whole one.
"""

from __future__ import annotations

import hashlib
import json
import math
import pathlib
import pickle
import pickletools
import re
import struct
import typing
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from healing.config.attack import AttackConfig
from healing.config.fingerprint import LINEAGE
from healing.config.heal import HealConfig
from healing.config.options import fields_of
from healing.errors import CheckpointError
from healing.registry import NAME

CHECKPOINT_KEYS = ("step", "model_state_dict", "checkpoint_type", "description")
DIGESTS = "digests"
HEADER, WEIGHTS = "header", "weights"
"""Entries of :data:`DIGESTS`: the hash of everything but the weights, and theirs."""

MAX_PICKLE = 8 << 20
"""Bytes of a checkpoint's pickle. Names, shapes and places of a tensor take about 300 of them."""
MAX_LEAVES, MAX_TEXT, MAX_DEPTH = 2_000, 4_096, 5
"""Plain values of a configuration, characters of one, and how deep they may lie: a healed
checkpoint holds the configuration of its attack."""
MAX_SHARED = 4
"""Times that tensors may claim the bytes of the file: tied weights are stored once, under two
names or more."""
MAX_STEP = 10**12
MAX_SEED = 2**31 - 1

STORAGES = ("Float", "Half", "BFloat16", "Double", "Long", "Int", "Short", "Char", "Byte", "Bool")
CONSTRUCTORS = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}Storage" for name in STORAGES),
}
"""All that a pickle of dense tensors and plain values names."""

_NAMING = ("GLOBAL", "INST", "STACK_GLOBAL", "EXT1", "EXT2", "EXT4")
"""Instructions that name one."""

DAMAGED = (
    RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError,
    AssertionError, ArithmeticError, MemoryError, pickle.UnpicklingError, struct.error, zlib.error,
    zipfile.BadZipFile,
)  # fmt: skip
"""What the parts of torch's reader raise where bytes are not what they expect."""

_INVISIBLE = {"Cc", "Cf", "Cs"}
_RUN_ID = re.compile(r"[\w-]{0,64}", re.ASCII)
_TEXTS = (
    *LINEAGE, "healthy_digest", "collapsed_digest", "heal_run_id", "noise_match", "code",
    "checkpoint", "direction_arm", "start",
)  # fmt: skip
_MAY_BE_ABSENT = ("model", "revision", "model_commit")
_MAPPINGS = ("attack", "corpus_digests")
_NUMBERS = ("attack_steps_done", "attack_rank", "replicate")


def _own_types() -> dict[str, tuple[type, ...]]:
    """Entry of a configuration → types that it may have."""
    found: dict[str, set[type]] = {}
    for kind in (AttackConfig, HealConfig):
        for field, scalar, may_be_auto in fields_of(kind):
            own = found.setdefault(field.name, set())
            own |= {scalar, int} if scalar is float else {scalar}
            own |= {str} if may_be_auto else set()
    types: dict[str, tuple[type, ...]] = {name: tuple(own) for name, own in found.items()}
    types |= dict.fromkeys(_TEXTS, (str,))
    types |= dict.fromkeys(_MAPPINGS, (dict,))
    types |= dict.fromkeys(_NUMBERS, (int, float))
    return types


OWN_TYPES = _own_types()


def _refused(path: object, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {why}: it is not loaded; make it anew with the attack entry point"
    )


def read_content(path: pathlib.Path) -> dict[str, Any]:
    """The entries of a checkpoint's file, tensors mapped; no code that it may carry is run.

    Raises:
        CheckpointError: Missing, damaged, larger inside than outside, or holding anything but
            dense tensors and plain values.
    """
    try:
        is_file = path.is_file()
    except (OSError, ValueError) as error:  # a name that no file system has
        raise CheckpointError(f"{_short(path)} cannot be the path of a file") from error
    if not is_file:
        raise CheckpointError(f"no checkpoint at {_short(path)}: give the path of one")
    try:
        _check_pickle(path, _pickle_of(path))
        data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except CheckpointError:
        raise
    except DAMAGED as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else ""
        if reason:
            raise CheckpointError(f"{path} cannot be read: {reason}") from error
        raise CheckpointError(
            f"{path} is damaged, truncated or not a torch checkpoint: copy or make it anew"
        ) from error
    missing = [k for k in CHECKPOINT_KEYS if not isinstance(data, dict) or k not in data]
    if missing:
        raise CheckpointError(
            f"{path} lacks {', '.join(missing)}: expected {', '.join(CHECKPOINT_KEYS)}"
        )
    return typing.cast("dict[str, Any]", data)


def _short(path: object) -> str:
    text = str(path)
    return text if len(text) <= 300 else f"{text[:100]}…{text[-100:]} ({len(text)} characters)"


def _pickle_of(path: pathlib.Path) -> bytes:
    """The pickle in the file, whose directory claims no more than there is."""
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        names = [entry.filename for entry in entries]
        packed = [e for e in entries if e.compress_type != zipfile.ZIP_STORED]
        if packed or sum(e.file_size for e in entries) > path.stat().st_size:
            raise _refused(path, "says that it holds more bytes than it has")
        pickles = [e for e in entries if e.filename.endswith("data.pkl")]
        if len(set(names)) < len(names) or len(pickles) != 1:
            raise _refused(path, "holds an entry twice, or not one pickle")
        if pickles[0].file_size > MAX_PICKLE:
            raise _refused(path, f"describes its tensors in {pickles[0].file_size} bytes")
        return archive.read(pickles[0])


def _check_pickle(path: pathlib.Path, content: bytes) -> None:
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name == "PROTO" and argument != 2:
            raise _refused(path, f"has a pickle of protocol {argument}, not 2 as torch writes it")
        named = str(argument) if opcode.name in ("GLOBAL", "INST") else opcode.name
        if opcode.name in _NAMING and named not in CONSTRUCTORS:
            raise CheckpointError(
                f"{path} holds objects other than tensors and plain values "
                f"({printable(named)[:80]}), which are not loaded: make it anew with the "
                "attack entry point"
            )


def printable(text: str) -> str:
    """Text without control characters, for a message."""
    return "".join("\ufffd" if unicodedata.category(c) in _INVISIBLE else c for c in text)


def check_header(path: object, data: Mapping[str, Any]) -> None:
    """Check everything in a file that is no tensor.

    Raises:
        CheckpointError: A value is of another type than its own, or too large.
    """
    step, config = data["step"], data.get("config") or {}
    if type(step) is not int or not 0 <= step <= MAX_STEP or not isinstance(config, dict):
        raise CheckpointError(
            f"{path}: step is not a number or config is not a mapping that names a model"
        )
    for name in ("checkpoint_type", "description"):
        if not isinstance(data[name], str) or len(data[name]) > MAX_TEXT:
            raise CheckpointError(f"{path}: {name} is not a text of at most {MAX_TEXT} characters")
    _check_plain(path, config)
    _check_entries(path, config)


def _leaves(value: Any, where: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every plain value below one, with its place; a generator, so that it can be left early."""
    if depth > MAX_DEPTH:
        yield where, value  # of no plain type
    elif isinstance(value, dict):
        for name, below in value.items():
            yield f"{where}, a name", name if isinstance(name, str) else (name,)
            yield from _leaves(below, f"{where}.{name}"[:200], depth + 1)
    elif isinstance(value, (list, tuple)):
        for below in value:
            yield from _leaves(below, where, depth + 1)
    else:
        yield where, value


def _check_plain(path: object, config: Mapping[str, Any]) -> None:
    for number, (where, value) in enumerate(_leaves(config, "config")):
        if number >= MAX_LEAVES:
            raise _refused(path, f"has more than {MAX_LEAVES} values in its config")
        if isinstance(value, str):
            good = len(value) <= MAX_TEXT and printable(value) == value
        elif isinstance(value, int):
            good = abs(value) < 2**63
        else:
            good = value is None or isinstance(value, float)
        if not good:
            where = printable(where)
            raise _refused(path, f"has a value in {where} that is no plain number or short text")


def _check_entries(path: object, config: Mapping[str, Any]) -> None:
    for name, value in config.items():
        types = OWN_TYPES.get(name)
        if types is None or (value is None and name in _MAY_BE_ABSENT):
            continue
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            kinds = " or ".join(sorted(t.__name__ for t in types))
            raise _refused(path, f"says {printable(repr(value)[:80])} for {name}, no {kinds}")
        if not _is_well_formed(name, value):
            raise _refused(path, f"says {value!r} for {name}, which it cannot be")
    if "attack" in config:
        _check_entries(path, config["attack"])


def _is_well_formed(name: str, value: Any) -> bool:
    """Whether it can be what it is used as: names go into paths, ids into addresses."""
    if name == "arm" or name == "direction_arm":
        return not value or NAME.fullmatch(value) is not None
    if name == "seed":
        return 0 <= value <= MAX_SEED
    if name.endswith("run_id"):
        return _RUN_ID.fullmatch(value) is not None
    return name not in _NUMBERS or math.isfinite(value)


def check_tensors(path: pathlib.Path, state: Any) -> None:
    """Check what torch made of a file's weights without reading them.

    Raises:
        CheckpointError: Not a mapping of names to dense tensors that the file has room for.
    """
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise CheckpointError(f"{path}: model_state_dict is not a mapping of names to tensors")
    claimed = 0
    for name, value in state.items():
        if not isinstance(name, str) or len(name) > MAX_TEXT or printable(name) != name:
            raise _refused(path, "has a tensor without a proper name")
        if problem := _unusable(value):
            raise _refused(path, f"holds {problem} under {name}")
        claimed += value.numel() * value.element_size()
    if claimed > MAX_SHARED * path.stat().st_size:
        raise _refused(path, f"has tensors of {claimed} bytes, more than are in it")


def _unusable(value: torch.Tensor) -> str:
    """Why a tensor is not an array of real numbers as it stands in the file; empty where it is."""
    if value.layout is not torch.strided or value.is_quantized or value.device.type != "cpu":
        return "a sparse, quantized or absent tensor"
    if value.is_complex() or value.is_conj() or value.is_neg():
        return "complex numbers"
    storage = value.untyped_storage().nbytes()
    if (value.storage_offset() + value.numel()) * value.element_size() > storage:
        return "a tensor of more entries than are stored"
    return "" if _is_dense(value) else "a tensor whose entries share memory or have gaps"


def _is_dense(value: torch.Tensor) -> bool:
    """Whether entries lie side by side, each at a place of its own, in any order of dimensions."""
    sizes = [(st, n) for st, n in zip(value.stride(), value.shape, strict=True) if n != 1]
    expected = 1
    for stride, size in sorted(sizes):
        if stride != expected:
            return value.numel() == 0
        expected *= size
    return True


def header_digest(content: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> str:
    """Hash (64 hex digits) of everything but the floating weights: plain values, names, shapes,
    formats, and buffers of whole numbers.
    """
    tensors = [
        [name, str(v.dtype), list(v.shape), "" if v.is_floating_point() else _raw(v)]
        for name, v in sorted(state.items())
    ]
    plain = [content[name] for name in ("step", "checkpoint_type", "description")]
    text = json.dumps([*plain, content.get("config") or {}, tensors], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _raw(value: torch.Tensor) -> str:
    return hashlib.sha256(value.detach().contiguous().numpy().tobytes()).hexdigest()


def written_weights(path: object, data: Mapping[str, Any]) -> str:
    """The digest of its weights that a file holds, once that of all else is found to be right;
    empty in files that were written before there were any.

    Raises:
        CheckpointError: The file was changed after it was written.
    """
    if DIGESTS not in data:
        return ""
    digests = data[DIGESTS]
    good = isinstance(digests, dict) and set(digests) == {HEADER, WEIGHTS}
    if not good or digests[HEADER] != header_digest(data, data["model_state_dict"]):
        raise _refused(path, "was changed or damaged after it was written (other digest)")
    return str(digests[WEIGHTS])
