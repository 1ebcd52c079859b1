"""Rows of the Hub's data sets on disk: streamed once per machine and commit, for all processes.

A file holds rows as they came, of their columns the one that is read. Texts are made of them as of
the stream's, so that no number depends on whether the file was there. It is JSON, one row per line,
compressed: reading one runs no code. Its first line says what it holds, its last has the digest.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import filelock
import huggingface_hub
import zstandard
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

from healing.data.columns import wanted_columns
from healing.data.compressed import DAMAGE, open_bytes
from healing.kept_files import make_room, written_whole
from healing.progress import during, tick

logger = logging.getLogger(__name__)

FORMAT = "rows-1"
"""Part of every question: another way of keeping rows needs another name."""

MOST_BYTES = 10 * 10**9
"""Of all files together; what was not used for longest goes first."""

ENDING = ".jsonl.zst"
SAY_AFTER_SECONDS = 2.0
"""Another process is waited for in silence so long."""

Row = dict[str, Any]
Read = Callable[[Iterable[Row]], list[str]]


class _DamagedError(Exception):
    """A file does not hold what its name and its digest say."""


class _UnkeepableError(Exception):
    """Rows are too many, or one holds what JSON does not give back as it was."""


@dataclass(frozen=True)
class Wanted:
    """What decides the rows of a data set, but for its commit.

    Attributes:
        dataset: Hub id.
        configuration: Empty = the only one.
        column: That holds the documents, as it was asked for; empty = a usual one.
        limit: Rows read at most.
    """

    dataset: str
    configuration: str
    column: str
    limit: int

    def question(self) -> dict[str, Any]:
        """All of it, and what reads the files of a commit."""
        made_by = {"format": FORMAT, "datasets": importlib.metadata.version("datasets")}
        return {**asdict(self), **made_by}

    @property
    def name(self) -> str:
        """How names of its files begin."""
        words = json.dumps(self.question(), sort_keys=True)
        readable = re.sub(r"[^A-Za-z0-9._]+", "-", self.dataset)[:80]
        return f"{readable}-{hashlib.sha256(words.encode()).hexdigest()[:16]}"


_PINNED: dict[str, str] = {}


def pin(dataset: str, commit: str) -> None:
    """Let a data set mean one commit in this process, if it means none yet: the one that all
    workers of a sweep read, whatever the Hub has by then.
    """
    _PINNED.setdefault(dataset, commit)


def commit_of(dataset: str) -> str:
    """Commit of a data set: as it is pinned, else as the Hub says when this process first asks.

    Raises:
        HTTPError, OSError: The Hub cannot be reached, or refuses.
        ValueError: The id, or what the Hub says, cannot be one.
    """
    if dataset not in _PINNED:
        pin(dataset, _asked(dataset))
    return _PINNED[dataset]


def _asked(dataset: str) -> str:
    """A Hub that is asked too often, or has a short failure, is asked again some times."""
    huggingface_hub.utils.validate_repo_id(dataset)
    for seconds in (*AGAIN_AFTER, None):
        answer = get_session().get(
            f"{constants.ENDPOINT}/api/datasets/{dataset}",
            params={"expand": "sha"},
            headers=build_hf_headers(),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
        )
        if seconds is None or not _is_busy(answer.status_code):
            break
        # Not as long as it asks for, as the library would: there may be a text on this disk.
        for _ in range(seconds):
            tick()
            time.sleep(1.0)
    hf_raise_for_status(answer)
    try:
        found = str(answer.json().get("sha"))
    except (ValueError, AttributeError) as error:
        raise ConnectionError("what answers there is not the Hub") from error
    if not re.fullmatch(r"[0-9a-f]{40}", found):
        raise ValueError(f"the Hub names no commit of it, but {found[:80]!r}")
    return found


AGAIN_AFTER = (1, 2, 4)
"""Seconds after which a question to the Hub is asked again."""


def _is_busy(status: int) -> bool:
    return status >= 500 or status in (408, 425, 429)


def is_unreachable(error: BaseException) -> bool:
    """Whether the Hub gave no answer, of the errors that asking it ends with: what it has not, or
    does not give to everyone, is not looked for on the disk; nor where the question cannot be put,
    as with a login that no request can hold.
    """
    if type(error).__name__ == "LocalProtocolError":
        return False
    if not isinstance(error, HfHubHTTPError):
        return True
    status = error.response.status_code
    return _is_busy(status) or status == 407  # of a proxy that wants a login


@dataclass(frozen=True)
class RowCache:
    """Rows in a folder of their own.

    Attributes:
        folder: Made when something is kept; ``None`` = nothing is.
        most_bytes: Bound of the folder's size.
    """

    folder: pathlib.Path | None
    most_bytes: int = MOST_BYTES

    def texts(
        self, wanted: Wanted, commit: str, stream: Callable[[], Iterable[Row]], read: Read
    ) -> list[str]:
        """The texts of a commit: from disk where its rows are kept, else from the stream, whose
        rows are kept. Of several processes one streams, and the others wait for it.

        A folder that cannot be written costs a warning: the text is streamed, and not kept.

        Args:
            wanted: Which rows.
            commit: 40 hex digits.
            stream: Begins to fetch the rows.
            read: Makes texts of rows, of ``wanted.limit`` rows at most.
        """
        if self.folder is None:
            return read(stream())
        path = self.folder / f"{wanted.name}-{commit}{ENDING}"
        question = wanted.question() | {"commit": commit}
        with contextlib.suppress(_DamagedError):  # told once it is this process' turn
            if (kept := _rows(path, question)) is not None:
                with contextlib.suppress(OSError):
                    os.utime(path)  # what is used last goes last
                return read(kept)
        with _turn(path) as is_writable:
            kept = _rows_or_warning(path, question)
            if kept is None:
                seen: list[Row] = []
                texts = read(_noted(stream(), wanted.column, seen))
                if is_writable:
                    self._keep(path, question, seen)
                return texts
        return read(kept)

    def newest(self, wanted: Wanted) -> tuple[str, list[Row]] | None:
        """Commit and rows that were used last, for when the Hub cannot be asked; ``None`` where
        nothing is kept.
        """
        found = []
        for path in self.folder.glob(f"{wanted.name}-*{ENDING}") if self.folder else ():
            with contextlib.suppress(OSError):  # removed by another process
                found.append((path.stat().st_mtime, path))
        for _, path in sorted(found, reverse=True):
            commit = path.name.removesuffix(ENDING).rpartition("-")[2]
            rows = _rows_or_warning(path, wanted.question() | {"commit": commit})
            if rows is not None:
                return commit, rows
        return None

    def _keep(self, path: pathlib.Path, question: Row, rows: list[Row]) -> None:
        try:
            with written_whole(path) as partial:
                _write(partial, question, rows)
                size = partial.stat().st_size
                if size > self.most_bytes:
                    raise _UnkeepableError(f"{size} bytes, of {self.most_bytes} at most")
                make_room(path.parent, f"*{ENDING}", size, self.most_bytes, path)
        except (OSError, zstandard.ZstdError, _UnkeepableError) as error:
            _say_unkept(path.parent, error)


def row_cache(cache_dir: str) -> RowCache:
    """The cache below a folder as a configuration names it; empty = nothing is kept."""
    return RowCache(pathlib.Path(os.path.expanduser(cache_dir)) / "texts" if cache_dir else None)


def _say_unkept(folder: pathlib.Path, error: BaseException) -> None:
    logger.warning(
        f"text from the Hub cannot be kept in {folder} ({error}): every process streams it"
    )


@contextlib.contextmanager
def _turn(path: pathlib.Path) -> Iterator[bool]:
    """The block runs in one process of the machine at a time; whether the folder can be written.
    Where it cannot, or has no locks, nobody waits for anybody.
    """
    # By itself it would take a file for a lock where there are none, which nobody gives back whose
    # machine is gone.
    lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        _say_unkept(path.parent, error)
        yield False
        return
    try:
        _acquire(lock)
    except OSError as error:
        if not os.access(path.parent, os.W_OK):
            _say_unkept(path.parent, error)
            yield False
            return
        logger.warning(
            f"{path.parent} cannot be locked ({error}): several processes may fetch the same text"
        )
        yield True
        return
    try:
        yield True
    finally:
        lock.release()


def _acquire(lock: filelock.BaseFileLock) -> None:
    with contextlib.suppress(filelock.Timeout):
        lock.acquire(timeout=SAY_AFTER_SECONDS)
        return
    with during("waiting for another process that fetches the same text"):
        while not lock.is_locked:
            tick()
            with contextlib.suppress(filelock.Timeout):
                lock.acquire(timeout=1.0)


def _noted(rows: Iterable[Row], column: str, seen: list[Row]) -> Iterator[Row]:
    """The same rows; what is read of each is added to ``seen``."""
    for row in rows:
        seen.append({name: row[name] for name in wanted_columns(row, column)})
        yield row


def _line(row: Row) -> bytes:
    """A row as JSON, and a line feed.

    Raises:
        _UnkeepableError: JSON would not give it back as it is (times, bytes, NaN in a chat).
    """
    try:
        text = json.dumps(row, ensure_ascii=False)
        is_same = all(isinstance(cell, str) for cell in row.values()) or json.loads(text) == row
    except (TypeError, ValueError, RecursionError) as error:
        raise _UnkeepableError(str(error)) from error
    if not is_same:
        raise _UnkeepableError("a chat holds what is no JSON")
    return text.encode("utf-8", "surrogatepass") + b"\n"


def _write(path: pathlib.Path, question: Row, rows: list[Row]) -> None:
    digest = hashlib.sha256()
    with path.open("wb") as file, zstandard.ZstdCompressor().stream_writer(file) as stream:
        for row in (question, *rows):
            line = _line(row)
            digest.update(line)
            stream.write(line)
        stream.write(_line({"sha256": digest.hexdigest()}))


def _rows_or_warning(path: pathlib.Path, question: Row) -> list[Row] | None:
    try:
        return _rows(path, question)
    except _DamagedError as error:
        logger.warning(f"{path} is damaged ({error}): it is not used, and fetched again")
        return None


def _rows(path: pathlib.Path, question: Row) -> list[Row] | None:
    """What a file holds; ``None`` where there is none.

    Raises:
        _DamagedError: It is not as it was written, or cannot be read.
    """
    digest, lines, last = hashlib.sha256(), [], b""
    try:
        with open_bytes(path, ".zst") as file:
            for line in file:
                digest.update(last)
                lines += [json.loads(last.decode("utf-8", "surrogatepass"))] if last else []
                last = line
        if json.loads(last) != {"sha256": digest.hexdigest()}:
            raise _DamagedError("its digest is another one")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (*DAMAGE, ValueError, RecursionError) as error:
        raise _DamagedError(str(error)) from error
    if lines[:1] != [question]:
        raise _DamagedError("it holds other rows than its name says")
    return lines[1:]
