"""Files of weights by their headers alone: names and formats of tensors, and whether all is there.

Other readers loop for ever, or speak in their own words, where a length in a header is not that of
the file.
"""

from __future__ import annotations

import functools
import math
import mmap
import pathlib
import pickle
import struct
import warnings
import zipfile
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

COPY_ANEW = "copy it anew"
FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""Formats of numbers that are weights as they are: header's name → torch's."""
_TORCH_NAMES = {
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "U16": "uint16",
    "U32": "uint32", "U64": "uint64", "BOOL": "bool", "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", **FLOATS,
}  # fmt: skip


class UnusableError(Exception):
    """Why a folder or file is not a model that can be loaded, and what to do."""

    def __init__(self, reason: str, hint: str) -> None:
        super().__init__(reason)
        self.reason, self.hint = reason, hint


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def tensors_of(path: pathlib.Path) -> dict[str, str]:
    """Name → format (``float16``, ``int8``, as torch names it) of every tensor in a file.

    Args:
        path: ``.safetensors``, or a pickled state of torch, of which no code is run.

    Raises:
        UnusableError: It is missing, damaged, cut short, or holds more than tensors by name.
    """
    if not path.is_file():
        raise UnusableError(f"its {path.name} is not there", COPY_ANEW)
    if path.suffix == ".safetensors":
        return _in_safetensors(path)
    return _in_pickle(path)


def _in_safetensors(path: pathlib.Path) -> dict[str, str]:
    try:
        with safe_open(path, "pt") as file:
            formats = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(path, error) from error
    return {name: _TORCH_NAMES.get(format, format) for name, format in formats.items()}


_BROKEN = (
    OSError, RuntimeError, ValueError, TypeError, EOFError, LookupError, AttributeError,
    ArithmeticError, AssertionError, MemoryError, struct.error, zipfile.BadZipFile,
)  # fmt: skip
"""What torch's reader raises where bytes are not what it expects."""


def _in_pickle(path: pathlib.Path) -> dict[str, str]:
    try:
        # Mapped, nothing is read but the names; older files cannot be mapped.
        mapped = zipfile.is_zipfile(path)
        with warnings.catch_warnings():  # torch's, of its own quantized tensors
            warnings.simplefilter("ignore", UserWarning)
            state: Any = torch.load(path, map_location="meta", weights_only=True, mmap=mapped)
        return {
            str(name): str(value.dtype).removeprefix("torch.")
            for name, value in state.items()
            if isinstance(value, torch.Tensor)
        }
    except pickle.UnpicklingError as error:  # its text advises to run what the file asks for
        raise UnusableError(
            f"its {path.name} is damaged, or holds Python objects beside tensors, which are never "
            "loaded",
            "copy it anew, or name a copy of the model in safetensors",
        ) from error
    except NotImplementedError as error:  # torch has no numbers of that format without their bytes
        raise UnusableError(
            f"its {path.name} holds tensors in one of torch's own quantized formats",
            "name the unquantized model, or a GGUF file of it",
        ) from error
    except _BROKEN as error:
        raise _damaged(path, error) from error


def _damaged(path: pathlib.Path, error: BaseException) -> UnusableError:
    said = _first_line(error)
    return UnusableError(f"its {path.name} is damaged or cut short, {said}", COPY_ANEW)


# ---- GGUF

_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Type in the header → bytes of one value."""
_UINT32, _STRING, _ARRAY = 4, 8, 9
_LARGEST_DEPTH = 4
"""Of arrays in arrays."""


class _Header:
    """A place in a mapped GGUF file that never goes beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data, self.at, self._order = data, 0, "<"
        if self._read("4s") != b"GGUF":
            raise ValueError("it does not begin as one")
        version = self._read("I")
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order, self.at = ">", 4
            version = self._read("I")
        if version not in (2, 3):
            raise ValueError(f"version {version} of the format is unknown")

    def _read(self, kind: str) -> Any:
        before = self.at
        self.skip(struct.calcsize(self._order + kind))
        return struct.unpack_from(self._order + kind, self._data, before)[0]

    def number(self, size: int = 8) -> int:
        found: int = self._read("Q" if size == 8 else "I")
        return found

    def skip(self, size: int) -> None:
        if self.at + size > len(self._data):
            raise ValueError(f"it has {len(self._data):,} bytes and goes on at {self.at:,}")
        self.at += size

    def text(self) -> str:
        length, before = self.number(), self.at
        self.skip(length)
        return self._data[before : self.at].decode()

    def value(self, kind: int, depth: int = 0) -> int | None:
        """Go past a value; it, where it is an unsigned number of four bytes."""
        if kind == _UINT32:
            return self.number(4)
        if kind in _SCALARS:
            self.skip(_SCALARS[kind])
        elif kind == _STRING:
            self.skip(self.number())
        elif kind == _ARRAY and depth < _LARGEST_DEPTH:
            inner, count = self.number(4), self.number()
            if inner in _SCALARS:
                self.skip(count * _SCALARS[inner])
            else:
                for _ in range(count):
                    self.value(inner, depth + 1)
        else:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return None


def check_gguf(path: pathlib.Path) -> None:
    """Check that everything that a GGUF file's header speaks of is in the file.

    Raises:
        UnusableError: It is damaged or cut short. Numbers that are others than they were, of the
            same length, are not noticed: the format has no checksums.
    """
    try:
        found = path.stat()
        _check_gguf(path, found.st_mtime_ns, found.st_size)
    except (ValueError, OSError, struct.error, OverflowError) as error:
        raise _damaged(path, error) from error


@functools.lru_cache(maxsize=2)  # asked for several times a run; a vocabulary takes half a second
def _check_gguf(path: pathlib.Path, _changed: int, _size: int) -> None:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        header = _Header(data)
        n_tensors, n_values = header.number(), header.number()
        alignment, blocks = 32, 0
        for _ in range(n_values):
            key = header.text()
            value = header.value(header.number(4))
            if key == "general.alignment":
                alignment = value or 0
            elif key.endswith(".block_count"):
                blocks = value or 0
        if alignment.bit_count() != 1:
            raise ValueError(f"its alignment is {alignment}")
        if blocks > n_tensors:
            raise ValueError(f"it says {blocks:,} blocks and has {n_tensors:,} tensors")
        ends = dict(_tensor_end(header) for _ in range(n_tensors))
        begin = -(-header.at // alignment) * alignment
        for name, end in ends.items():
            if begin + end > len(data):
                raise ValueError(
                    f"it has {len(data):,} bytes and its {name} ends at {begin + end:,}"
                )


def _tensor_end(header: _Header) -> tuple[str, int]:
    """Name, and bytes from the beginning of all tensors to the end of this one."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    name, dimensions = header.text(), header.number(4)
    header.skip(8 * dimensions)
    header.at -= 8 * dimensions
    count = math.prod(header.number() for _ in range(dimensions))
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(header.number(4))]
    return name, header.number() + count * size // block
