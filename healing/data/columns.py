"""Rows of data as texts: which column holds them, and what is no text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from healing.data.windows import ChatText
from healing.errors import CorpusError

TEXT_COLUMNS = ("text", "content")
"""Columns that are read where none is named, the first that there is."""
Flatten = Callable[[list[dict[str, Any]]], str]
"""Makes one text of the messages of a chat."""


@dataclass(frozen=True)
class Table:
    """Rows of one file or data set.

    Attributes:
        source: Its name, for messages.
        unit: What the rows' numbers count: ``row`` or ``line``.
        rows: (number from 1, row); a row is a mapping, or a text by itself.
        is_ragged: Rows may lack a column that others have (JSON), which counts as null.
    """

    source: str
    unit: str
    rows: Iterable[tuple[int, Any]]
    is_ragged: bool = False


def wanted_columns(names: Iterable[str], column: str) -> list[str]:
    """The column to read of those there are: the one named, else one of :data:`TEXT_COLUMNS`."""
    there = set(names)
    return [name for name in ([column] if column else TEXT_COLUMNS) if name in there][:1]


def _no_column(table: Table, row: Mapping[str, Any], column: str) -> CorpusError:
    lacking = repr(column) if column else " or ".join(map(repr, TEXT_COLUMNS))
    return CorpusError(
        f"corpus {table.source!r} has no column {lacking} (it has: "
        f"{', '.join(map(str, row))}): name the one that holds the documents with --text-column"
    )


def _is_chat(cell: Any) -> bool:
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(m, Mapping) and {"role", "content"} <= set(m) for m in cell)
    )


def _kind(value: Any) -> str:
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list"}
    if isinstance(value, Mapping):
        return "a mapping"
    return names.get(type(value), f"a value of type {type(value).__name__}")


def _whole(text: str, where: str) -> str:
    """The text, unless JSON's escapes made characters of it that no text holds.

    Raises:
        CorpusError: Half a pair of surrogates (U+D800), which no tokenizer takes.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise CorpusError(
            f"{where}: character {error.start + 1} is {half}, half of a surrogate pair and no "
            "character by itself: write the pair, or leave it out"
        ) from error
    return text


def _text(cell: Any, column: str, where: str, is_asked: bool, flatten: Flatten | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, str):
        return _whole(cell, where)
    if _is_chat(cell):
        if is_asked and flatten is not None:
            return ChatText(_whole(flatten([dict(message) for message in cell]), where))
        hint = f"--text-column {column} has the model's chat template make one text of each"
        if is_asked:
            hint = "this stage has no model with a chat template, give it plain text"
        raise CorpusError(f"{where}: column {column!r} holds chats (lists of messages): {hint}")
    raise CorpusError(
        f"{where}: column {column!r} holds {_kind(cell)}, not text: name the column that holds "
        "the documents with --text-column"
    )


def texts_of(
    tables: Iterable[Table], column: str = "", flatten: Flatten | None = None
) -> Iterator[str]:
    """The texts of all rows, in order; a null is an empty text.

    Args:
        tables: Rows.
        column: That holds the documents; empty = the first of :data:`TEXT_COLUMNS` that a row has.
        flatten: For a column that is named and holds chats.

    Raises:
        CorpusError: There is no such column, or a cell that is neither text nor null; the message
            names file, row and column.
    """
    for table in tables:
        first, chosen = None, ""
        for number, row in table.rows:
            where = f"{table.source}, {table.unit} {number}"
            if isinstance(row, str):
                yield _whole(row, where)
                continue
            if not isinstance(row, Mapping):
                raise CorpusError(
                    f"{where} is {_kind(row)}: expected a text or an object with a column of text, "
                    'such as {"text": "..."}'
                )
            first = row if first is None else first
            own = next(iter(wanted_columns(row, column)), "")
            if not own and not table.is_ragged:
                raise _no_column(table, row, column)
            chosen = chosen or own
            yield _text(row.get(own), own, where, bool(column), flatten)
        if first is not None and not chosen:
            raise _no_column(table, first, column)
