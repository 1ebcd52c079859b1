"""The local folder that results are written to: tried before any long work, and what becomes of a
write that fails.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

from safetensors import SafetensorError

from healing.errors import ConfigError, OutputError

_TRIED = bytes(4096)
_MAX_PART = 255
"""Bytes of one component of a path."""


def output_folder(directory: str) -> pathlib.Path:
    """``--output-dir`` as a path.

    Raises:
        OutputError: It cannot be one: an address, an unknown user's home, too long.
    """
    try:
        if "://" in directory:
            raise ValueError("results go to a folder of this machine, not to an address")
        if any(len(part.encode()) > _MAX_PART for part in directory.split("/")):
            raise ValueError("too long")
        return pathlib.Path(directory).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise OutputError(
            f"--output-dir {directory[:200]} cannot be a folder ({_reason(error)}): name another"
        ) from error


def run_folder(output_dir: str, place: str, name: str) -> pathlib.Path:
    """Local folder of one run, always inside of the output folder.

    Raises:
        ConfigError: The name is more than one path component.
        OutputError: It, or a folder between it and the output folder, is a link.
    """
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ConfigError(
            f"{name!r} cannot be the name of a run's folder: what it is made of (arm, model) has "
            "to be plain names"
        )
    output = output_folder(output_dir)
    folder = output / place / name
    for path in (folder, *folder.parents):
        if path == output:
            break
        if path.is_symlink():
            raise OutputError(
                f"{path} is a link, and nothing is written or removed where it leads: remove it, "
                "or give the folder that it leads to as --output-dir"
            )
    return folder


def _existing(path: pathlib.Path) -> pathlib.Path:
    """The path itself, or the nearest folder above that is there."""
    return next(p for p in (path, *path.parents) if os.path.lexists(p))


def require_writable(directory: str) -> None:
    """Try to write where results will go; nothing is left there.

    Raises:
        OutputError: It, or what is above it, is a file or cannot be written.
    """
    place = _existing(output_folder(directory))
    if not place.is_dir():
        raise OutputError(
            f"--output-dir {directory} cannot be a folder: {place} is a file; name another folder"
        )
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(_TRIED)  # reaches the disk when the file is closed
    except OSError as error:
        raise OutputError(
            f"--output-dir {directory} cannot be written ({place}: {_reason(error)}): make it "
            "writable, free some of its disk, or name another folder"
        ) from error


def require_room(folder: pathlib.Path, needed: int) -> None:
    """Refuse weights that the disk has no room for, before they are made.

    Args:
        folder: Where they will be.
        needed: Bytes.

    Raises:
        OutputError: Fewer are free.
    """
    free = shutil.disk_usage(_existing(folder)).free
    if needed > free:
        raise OutputError(
            f"{folder} is to hold weights of {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are "
            "free on its disk: free some, or name another folder with --output-dir"
        )


def _reason(error: Exception) -> str:
    words = error.strerror if isinstance(error, OSError) else ""
    return words or " ".join(str(error).split())[:200] or type(error).__name__


def size_text(count: int) -> str:
    """A number of bytes for a person: ``512 bytes``, ``3.2 MB``."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes"


def with_room(reason: str, folder: pathlib.Path, needed: int = 0) -> str:
    """Why a write failed, with the bytes that it takes (0 = few) and that are free."""
    if reason.endswith("are free"):
        return reason  # said where it failed
    takes = f"it takes {size_text(needed)}, " if needed else ""
    try:
        free = shutil.disk_usage(_existing(folder)).free
    except OSError:  # the disk is gone
        return reason
    return f"{reason}; {takes}{size_text(free)} are free"


@contextlib.contextmanager
def writing(folder: pathlib.Path, needed: int = 0) -> Iterator[None]:
    """Turn a write that fails into one line.

    Args:
        folder: Of what is written.
        needed: Bytes that all of it takes; 0 = little.

    Raises:
        OutputError: What could not be written, why, how much it takes and how much is free, and
            what to do.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        name = getattr(error, "filename", None) or folder
        reason = with_room(_reason(error), folder, needed)
        raise OutputError(
            f"{name} could not be written ({reason}): free some of its disk, make it writable, or "
            "name another folder with --output-dir, and start again; what was written before stays"
        ) from error


_PLACES: list[str] = []


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="llm-healing-")


def downloads_folder() -> str:
    """Where files go that are fetched from the store for this process alone. Its end removes them,
    or that of the block of :func:`downloads_in`.
    """
    return _PLACES[-1] if _PLACES else _temporary().name


@contextlib.contextmanager
def downloads_in(folder: pathlib.Path) -> Iterator[None]:
    """What is fetched in the block goes here; whatever was in it is removed, before and after. For
    processes that may be killed rather than ended, and do one thing at a time.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _PLACES.append(str(folder))
    try:
        yield
    finally:
        _PLACES.pop()
        shutil.rmtree(folder, ignore_errors=True)
