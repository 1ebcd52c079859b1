"""Files of a run: written whole, JSON without invented numbers.

Others may write into the folders too, or made them: a link there leads to somebody else's file, and
a pipe makes who opens it wait for ever. So small files are read where they are files, and what is
written is a new one in the place of whatever has its name.
"""

from __future__ import annotations

import errno
import io
import json
import math
import os
import pathlib
import shutil
import stat
from collections.abc import Mapping, Sequence
from typing import Any

MAX_SMALL = 10_000
"""Characters that are read of a small file."""


def is_plain(path: pathlib.Path) -> bool:
    """Whether there is a file of its own, and no link, pipe, device or folder."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def read_small(path: pathlib.Path) -> str:
    """The beginning of a text, some thousand characters.

    Raises:
        OSError: It cannot be read, or is no file.
        UnicodeDecodeError: It is no text.
    """
    if not is_plain(path):
        raise OSError(errno.EINVAL, "no file", str(path))
    with path.open(encoding="utf-8") as stream:
        return stream.read(MAX_SMALL)


def new_file(path: pathlib.Path) -> io.BufferedWriter:
    """A file that is made in the place of what has its name.

    Raises:
        OSError: It cannot be made; a folder has its name.
    """
    path.unlink(missing_ok=True)
    return path.open("xb")


def write_new(path: pathlib.Path, text: str) -> None:
    """Write a text as :func:`new_file`.

    Raises:
        OSError: It cannot be written.
    """
    with new_file(path) as stream:
        stream.write(text.encode())


def refuse_link(path: pathlib.Path) -> None:
    """Refuse a name that leads elsewhere.

    Raises:
        OSError: It is a link.
    """
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link: remove it", os.fspath(path))


def plain(value: Any) -> Any:
    """A JSON-ready copy: non-finite floats become the strings NaN, Infinity, -Infinity.

    Bare ``NaN`` is not JSON and breaks other readers; ``null`` would hide which it was.
    """
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v) for v in value]
    return value


def number(value: Any) -> Any:
    """Inverse of :func:`plain` for one value."""
    special = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return special.get(value, value) if isinstance(value, str) else value


def write_json(path: pathlib.Path, value: Any) -> pathlib.Path:
    """Write one JSON document; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        write_new(partial, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text in UTF-8; the file appears whole or not at all, and one that is there keeps its
    content under its other names (where it waits to be sent).
    """
    partial = path.with_suffix(path.suffix + ".partial")
    try:
        write_new(partial, text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """One JSON document that is a dictionary, with NaN and infinities restored at any depth."""

    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: restored(v) for k, v in value.items()}
        if isinstance(value, list):
            return [restored(v) for v in value]
        return number(value)

    found: dict[str, Any] = restored(json.loads(path.read_text()))
    return found


RECORD = ".run_id"
"""File of a finished run's folder that says whose results are in it; no artifact."""


def _previous(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent / f".{folder.name}.previous"


def _dropped(folder: pathlib.Path) -> pathlib.Path:
    return folder.parent / f".{folder.name}.dropped"


def _discard(folder: pathlib.Path, whole: pathlib.Path) -> None:
    """Remove a folder: at once by its name, so that half of one is never taken for a whole one."""
    gone = _dropped(folder)
    if gone.exists():
        shutil.rmtree(gone)
    if whole.exists():
        whole.rename(gone)
        shutil.rmtree(gone)


def mark_finished(folder: pathlib.Path, run_id: str) -> None:
    """Everything of a run is in its folder."""
    partial = folder / f"{RECORD}.partial"
    write_new(partial, run_id)
    partial.replace(folder / RECORD)


def _run_of(folder: pathlib.Path) -> str:
    """Whose results are in a folder; empty where it is not whole, or older than the record."""
    try:
        return read_small(folder / RECORD)[:100]
    except (OSError, UnicodeDecodeError):
        return ""


def file_of_run(folder: pathlib.Path, run_id: str, name: str) -> pathlib.Path | None:
    """A file of a finished run where it was written, or was put aside; ``None`` where what is there
    is another run's (of another experiment, or under way), or not known to be this one's.
    """
    for place in (folder, _previous(folder)):
        if _run_of(place) == run_id and (place / name).is_file():
            return place / name
    return None


def _has_results(folder: pathlib.Path) -> bool:
    if _run_of(folder) or (folder / "checkpoints").is_dir():
        return True
    return any(folder.glob("*_summary.json"))  # of versions without the record


def start_folder(folder: pathlib.Path, config: Mapping[str, Any]) -> None:
    """An empty folder for a run that begins: what an earlier one left there would be mistaken for
    its results. The configuration is written first, so that a failed run has it too.

    A finished run's folder is put aside, under a hidden name beside it, until :func:`settle` says
    that there are new results, or that there will be none; the first one put aside stays.
    """
    if _has_results(folder) and not _previous(folder).exists():
        folder.rename(_previous(folder))
    _discard(folder, folder)
    write_json(folder / "config.json", config)


def is_put_aside(folder: pathlib.Path) -> bool:
    """Whether earlier results wait for new ones."""
    return _previous(folder).exists()


def settle(folder: pathlib.Path, run_id: str) -> None:
    """Remove the earlier results where the folder has the new ones of this run; else put them back
    where they are this run's, or where nothing else finished.
    """
    previous = _previous(folder)
    if not previous.exists():
        return
    there = _run_of(folder)
    if there and there == run_id:
        _discard(folder, previous)
    elif not there or _run_of(previous) == run_id:
        _discard(folder, folder)
        previous.rename(folder)


class JsonLines:
    """A ``.jsonl`` file that grows by one flushed line per record; a crash keeps the rest."""

    def __init__(self, path: pathlib.Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        path.write_text("")

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        with self.path.open("a") as stream:
            stream.write(json.dumps(plain(record), allow_nan=False) + "\n")


MAX_JSONL = 256 << 20
"""Bytes of a ``.jsonl`` file that is read: hundred thousands of measured steps."""


def read_jsonl(path: pathlib.Path) -> list[dict[str, Any]]:
    """All records of a ``.jsonl`` file, with NaN and infinities restored.

    Raises:
        ValueError: A line is no JSON object (or one too deep, or with a number of thousands of
            digits), or the file is too large.
    """
    if path.stat().st_size > MAX_JSONL:
        raise ValueError(f"{path.name} has more than {MAX_JSONL} bytes")
    found = []
    for place, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path.name}, line {place}: {_first_line(error)}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path.name}, line {place}: no JSON object")
        found.append({k: number(v) for k, v in record.items()})
    return found


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
