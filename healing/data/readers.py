"""Documents of local files, one reader per kind of file."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import pathlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from healing.config.shared import BLANK_LINES, LINE, WHOLE_FILE
from healing.data.columns import Flatten, Table, texts_of, wanted_columns
from healing.data.local_files import (
    ARROW,
    JSON,
    JSON_LINES,
    PARQUET,
    TABLE,
    TEXT,
    TextFile,
    files_of,
    one_file,
    opened,
    unreadable,
)
from healing.errors import CorpusError

_BLANK = re.compile(r"\n[ \t]*\n")
_PIECE = 1 << 20
_CONTINUES = b"\xff" * 4
_ENDS = _CONTINUES + bytes(4)
"""What every message of an Arrow stream begins with, and the last, empty one."""
LONGEST_CELL = 2**31 - 1
"""Characters of a cell of a table; the csv module's own limit is 131,072, which is one document."""


def _paragraphs(pieces: Iterable[str]) -> Iterator[str]:
    """What blank lines part, as if the pieces were one text: a separator ends with its second line
    end, so that what is left after the last one can be joined to the next piece.
    """
    before: list[str] = []  # looked through, without a separator
    rest = ""
    for piece in pieces:
        *whole, rest = _BLANK.split(rest + piece)
        if whole:
            yield "".join([*before, whole[0]])
            yield from whole[1:]
            before = []
        # What may be the beginning of a separator is looked at again, and nothing else.
        line = rest.rfind("\n")
        cut = line if line >= 0 and not rest[line:].strip("\n \t") else len(rest)
        before.append(rest[:cut])
        rest = rest[cut:]
    if last := "".join([*before, rest]):
        yield last


def _text_documents(file: TextFile, split_rule: str) -> Iterator[str]:
    with opened(file) as stream:
        pieces = iter(lambda: stream.read(_PIECE), "")
        if split_rule == WHOLE_FILE:
            documents = iter(["".join(pieces)])
        elif split_rule == LINE:
            documents = (line.rstrip("\n") for line in stream)
        else:
            documents = _paragraphs(pieces)
        for document in documents:
            if "\0" in document:
                raise unreadable(file, "it holds NUL characters, so it is UTF-16 or not text")
            yield document


def _json_lines(file: TextFile) -> Iterator[tuple[int, Any]]:
    with opened(file) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:  # also of numbers of many digits
                raise unreadable(file, f"line {number} is not JSON: {error}") from error


def _json(file: TextFile) -> Iterator[tuple[int, Any]]:
    """An array of rows, one row, or (where more follows) one row per line."""
    with opened(file) as stream:
        text = stream.read()
    if not text.strip():
        return
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if str(error).startswith("Extra data"):
            yield from _json_lines(file)
            return
        raise unreadable(file, f"it is not JSON: {error}") from error
    yield from enumerate(value if isinstance(value, list) else [value], 1)


def _table(file: TextFile) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(LONGEST_CELL)
    delimiter = "\t" if file.ending.startswith(".tsv") else ","
    with opened(file, newline="") as stream:
        try:
            # Strict: a quote that is never closed would make one cell of all that follows it.
            yield from enumerate(csv.DictReader(stream, delimiter=delimiter, strict=True), 1)
        except csv.Error as error:
            raise unreadable(file, error) from error


def _selected(batches: Iterable[pyarrow.RecordBatch], column: str) -> Iterator[pyarrow.RecordBatch]:
    for batch in batches:
        yield batch.select(wanted_columns(batch.schema.names, column) or batch.schema.names)


def _arrow_batches(file: TextFile, column: str) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.OSFile(str(file.path)) as source:
        try:
            batches: Any = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two file formats
            source.seek(0)
            reader = pyarrow.ipc.open_file(source)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
            yield from _selected(batches, column)
            return
        yield from _selected(batches, column)
        # Its reader takes the end of the file for the end of the rows, wherever that is.
        source.seek(0)
        is_old = source.read(len(_CONTINUES)) != _CONTINUES  # of before 2019, with other marks
        source.seek(max(0, source.size() - len(_ENDS)))
        if not is_old and source.read() != _ENDS:
            raise EOFError("it has no end mark: it was cut short")


def _parquet_batches(file: TextFile, column: str) -> Iterator[pyarrow.RecordBatch]:
    with pyarrow.parquet.ParquetFile(file.path) as reader:
        names = reader.schema_arrow.names
        yield from reader.iter_batches(1024, columns=wanted_columns(names, column) or None)


def _columnar(file: TextFile, column: str) -> Iterator[tuple[int, Any]]:
    """Rows with the wanted column alone, where there is one: others may be large."""
    number = 0
    read = _parquet_batches if file.kind == PARQUET else _arrow_batches
    try:
        if not file.path.stat().st_size:
            return
        for batch in read(file, column):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except UnicodeDecodeError as error:
        raise unreadable(file, f"a text after row {number} is not UTF-8: {error}") from error
    except (ValueError, OverflowError, pyarrow.ArrowException, OSError, EOFError) as error:
        where = f"after row {number}: " if number else ""
        raise unreadable(file, f"{where}{error}") from error


def _rows(file: TextFile, column: str) -> Table:
    path = str(file.path)
    if file.kind == JSON_LINES:
        return Table(path, "line", _json_lines(file), is_ragged=True)
    if file.kind == JSON:
        return Table(path, "row", _json(file), is_ragged=True)
    if file.kind == TABLE:
        return Table(path, "row", _table(file))
    assert file.kind in (PARQUET, ARROW)
    return Table(path, "row", _columnar(file, column))


@contextlib.contextmanager
def _plainly_named(folder: pathlib.Path) -> Iterator[str]:
    """The folder under a name in which fsspec finds nothing but a path: it takes ``::`` for a chain
    of file systems, and what precedes ``://`` for one of them.
    """
    if "::" not in str(folder) and "://" not in str(folder):
        yield str(folder)
        return
    with tempfile.TemporaryDirectory() as place:
        link = pathlib.Path(place, "data")
        link.symlink_to(folder.resolve(), target_is_directory=True)
        yield str(link)


def _saved_data_set(folder: pathlib.Path, column: str) -> Table | None:
    """Rows of a folder that ``datasets``' ``save_to_disk`` wrote; ``None`` = it is not one."""
    has_splits = (folder / "dataset_dict.json").is_file()
    is_one = (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    if not has_splits and not is_one:
        return None
    import datasets

    try:
        with _plainly_named(folder) as path:
            data = datasets.load_from_disk(path)
        if isinstance(data, datasets.DatasetDict):
            names = list(data)
            if "train" not in names and len(names) != 1:
                raise CorpusError(
                    f"{folder} holds the splits {', '.join(names)} and no train: name one of them, "
                    f"as {folder / names[0]}"
                )
            data = data["train" if "train" in names else names[0]]
        if wanted := wanted_columns(data.column_names, column):
            data = data.select_columns(wanted)
        return Table(str(folder), "row", _saved_rows(folder, data))
    except CorpusError:
        raise
    except _DAMAGED_SETS as error:
        raise _unreadable_set(folder, error) from error


_DAMAGED_SETS = (
    ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, OSError,
    pyarrow.ArrowException,
)  # fmt: skip
"""What ``datasets`` raises where a folder is not as it left it."""


def _unreadable_set(folder: pathlib.Path, error: BaseException) -> CorpusError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return CorpusError(
        f"{folder} could not be read as a data set saved by save_to_disk ({reason}): save it anew"
    )


def _saved_rows(folder: pathlib.Path, data: Iterable[Any]) -> Iterator[tuple[int, Any]]:
    rows = iter(data)
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except _DAMAGED_SETS as error:
            raise _unreadable_set(folder, error) from error
        yield number, row


def local_documents(
    path: pathlib.Path,
    *,
    column: str = "",
    split_rule: str = BLANK_LINES,
    flatten: Flatten | None = None,
) -> Iterator[str]:
    """The documents of a file or folder, blank ones among them, in the order of the paths.

    Args:
        path: A file, a folder of files of one kind, or one that ``save_to_disk`` wrote.
        column: Of rows, the one that holds the documents; empty = ``text`` or ``content``.
        split_rule: What parts the documents of a text file: ``blank_lines``, ``line``, or
            ``file`` (nothing: each file is one).
        flatten: Makes one text of a chat, where a column of chats is named.

    Raises:
        CorpusError: Which file, where in it, why not, and what to do.
    """
    if path.is_dir():
        saved = _saved_data_set(path, column)
        if saved is not None:
            yield from texts_of([saved], column, flatten)
            return
        files = files_of(path)
    elif path.is_file():
        files = [one_file(path)]
    else:
        raise CorpusError(f"{path} is neither a file nor a folder: name one of them")
    if files[0].kind != TEXT:
        yield from texts_of((_rows(file, column) for file in files), column, flatten)
        return
    if column:
        raise CorpusError(
            f"{path} is text without columns, and --text-column is {column}: leave it out"
        )
    for file in files:
        yield from _text_documents(file, split_rule)
