"""Files of text on this machine: which ones a path means, and their bytes as text.

Paths are paths and never patterns. Of a folder the files of one kind are read, at any depth,
without hidden ones and without symbolic links that lead out of it.
"""

from __future__ import annotations

import codecs
import contextlib
import io
import os
import pathlib
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from healing.data.compressed import COMPRESSIONS, DAMAGE, open_bytes
from healing.errors import CorpusError

TEXT, JSON_LINES, JSON, TABLE, PARQUET, ARROW = "text", "jsonl", "json", "csv", "parquet", "arrow"
KINDS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON,
    ".csv": TABLE,
    ".tsv": TABLE,
    ".parquet": PARQUET,
    ".arrow": ARROW,
}
"""Ending → what a file holds."""
ENDINGS = f"{', '.join(KINDS)} (all but the last two also with {', '.join(COMPRESSIONS)})"
ABOUT_DATA = frozenset(["dataset_info.json", "dataset_infos.json", "dataset_dict.json"])
"""Files that describe a data set and hold none of it."""


@dataclass(frozen=True, order=True)
class TextFile:
    """A file and how to read it.

    Attributes:
        path: Where it is.
        ending: In lower case, with its compression: ``.jsonl.gz``.
        kind: A value of :data:`KINDS`.
        compression: One of :data:`COMPRESSIONS`, or empty.
    """

    path: pathlib.Path
    ending: str
    kind: str
    compression: str

    @property
    def is_prose_beside_data(self) -> bool:
        """Whether it is left out where a folder holds data, too: a README is not the data set."""
        return self.ending.startswith(".md")


def text_file(path: pathlib.Path) -> TextFile | None:
    """How to read a file, by its ending in upper or lower case; ``None`` = unknown."""
    stem, last = os.path.splitext(path.name.lower())
    compression = last if last in COMPRESSIONS else ""
    ending = os.path.splitext(stem)[1] if compression else last
    kind = KINDS.get(ending)
    if kind is None or (compression and kind in (PARQUET, ARROW)):
        return None
    return TextFile(path, ending + compression, kind, compression)


def one_file(path: pathlib.Path) -> TextFile:
    """The file that was named.

    Raises:
        CorpusError: Nothing is known of its ending.
    """
    found = text_file(path)
    if found is None:
        ending = "".join(path.suffixes[-2:]) or "no ending"
        raise CorpusError(
            f"{path} is not of a kind that is read ({ending}): if it is plain text in UTF-8, name "
            f"it .txt; read are {ENDINGS}"
        )
    return found


def _homes(root: pathlib.Path) -> list[pathlib.Path]:
    """Where links in a folder may lead: below it, and from a snapshot in the Hub's cache to the
    ``blobs`` of its repository, where all of its files are.
    """
    for place in (root, *root.parents):
        if place.parent.name == "snapshots" and (place.parent.parent / "refs").is_dir():
            return [root, place.parent.parent / "blobs"]
    return [root]


def _is_below(path: pathlib.Path, places: list[pathlib.Path]) -> bool:
    return any(path.is_relative_to(place) for place in places)


def files_of(folder: pathlib.Path) -> list[TextFile]:
    """The files of a folder that hold its text, sorted by path.

    Raises:
        CorpusError: There is none, or they are of several kinds.
    """
    homes, found, others, outside = _homes(folder.resolve()), [], 0, 0
    for place, names, files in os.walk(folder):  # links to folders are not followed
        names[:] = [name for name in names if not name.startswith(".")]
        for name in files:
            path = pathlib.Path(place, name)
            known = None if name.lower() in ABOUT_DATA else text_file(path)
            if name.startswith(".") or known is None or not path.is_file():
                others += 1
            elif path.is_symlink() and not _is_below(path.resolve(), homes):
                outside += 1
            else:
                found.append(known)
    if any(not file.is_prose_beside_data for file in found):
        data = {file.kind for file in found if not file.is_prose_beside_data}
        found = [f for f in found if f.kind in data or not f.is_prose_beside_data]
    by_kind: dict[str, list[TextFile]] = {}
    for file in sorted(found):
        by_kind.setdefault(file.kind, []).append(file)
    if not by_kind:
        links = f" and {outside} symbolic links that lead out of it" if outside else ""
        raise CorpusError(
            f"{folder} holds no text: {others} files of other kinds or hidden{links} were left "
            f"out; read are {ENDINGS}"
        )
    if len(by_kind) > 1:
        counts = "; ".join(f"{len(v)} {v[0].ending}, first {v[0].path}" for v in by_kind.values())
        raise CorpusError(
            f"{folder}: expected files of one kind, found {counts}: name one file, or a folder "
            "with one kind"
        )
    return next(iter(by_kind.values()))


def unreadable(file: TextFile, reason: object) -> CorpusError:
    """One sentence for a file that is damaged or not what its ending says."""
    lines = str(reason).strip().splitlines() or [type(reason).__name__]
    return CorpusError(
        f"{file.path} could not be read as {file.ending} ({lines[0]}): mend it, or copy it anew"
    )


def _first_bad_byte(file: TextFile) -> int:
    """Where the bytes stop being UTF-8, counted from 0."""
    decoder, position = codecs.getincrementaldecoder("utf-8")(), 0
    with open_bytes(file.path, file.compression) as stream:
        while chunk := stream.read(1 << 20):
            pending = len(decoder.getstate()[0])
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                return position - pending + error.start
            position += len(chunk)
    return position


def _other_encoding(file: TextFile) -> CorpusError:
    with open_bytes(file.path, file.compression) as stream:
        is_utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding = "UTF-16" if is_utf16 else "WINDOWS-1252"
    path = shlex.quote(str(file.path))
    first = "decompress it, then " if file.compression else ""
    return CorpusError(
        f"{file.path} is not UTF-8 text (byte {_first_bad_byte(file)}): {first}convert it, for "
        f"instance by: iconv -f {encoding} -t UTF-8 {path} > {path}.utf8 && mv {path}.utf8 {path}"
    )


@contextlib.contextmanager
def opened(file: TextFile, newline: str | None = None) -> Iterator[io.TextIOWrapper]:
    """A file as decompressed UTF-8 text, with or without a byte order mark.

    Args:
        file: Text, JSON or a table.
        newline: As of :func:`open`: ``None`` makes every line end a newline.

    Raises:
        CorpusError: It is damaged, or in another encoding: which byte, and what to run.
    """
    try:
        with io.TextIOWrapper(
            open_bytes(file.path, file.compression), encoding="utf-8-sig", newline=newline
        ) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise _other_encoding(file) from error
    except DAMAGE as error:
        raise unreadable(file, error) from error
