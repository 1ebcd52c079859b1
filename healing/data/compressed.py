"""Compressed files that must be whole: what is cut short or followed by something else is refused.

``zstandard``'s own reader ends in silence where a file was cut, and those of :mod:`lzma` and
:mod:`bz2` where something damaged follows the first of several streams (``pbzip2``, ``pixz``, files
joined by ``cat``); each would lose the rest of the documents unseen.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pathlib
import zlib
from collections.abc import Callable
from typing import IO, Any, cast

import zstandard

PIECE = 4096
"""Compressed bytes handed over at once: of the tightest of files they become some 130 MB."""
PROGRAMS = {".gz": "gzip", ".xz": "xz", ".bz2": "bzip2", ".zst": "zstd"}
"""Ending → the command that makes such files from its input, and with ``-dc`` text of them."""
COMPRESSIONS = tuple(PROGRAMS)
"""Second endings of text, JSON and tables; Parquet and Arrow compress inside."""
DAMAGE = (OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""What reading or decompressing a damaged file raises."""

_DECODERS: dict[str, Callable[[], Any]] = {
    ".xz": lzma.LZMADecompressor,
    ".bz2": bz2.BZ2Decompressor,
    ".zst": lambda: zstandard.ZstdDecompressor().decompressobj(),
}


class _Streams(io.RawIOBase):
    """One or more compressed streams, one after another, with or without zeros between them."""

    def __init__(self, path: pathlib.Path, start: Callable[[], Any]) -> None:
        self._file = path.open("rb")
        self._start, self._decoder = start, start()
        self._rest, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._file.close()
        super().close()

    def _next(self) -> bool:
        """Decompress a piece; whether there was one.

        Raises:
            EOFError: The file ends within a stream, or before the first.
        """
        piece, self._rest = self._rest or self._file.read(PIECE), b""
        if not piece:
            if self._decoder is not None:
                raise EOFError("it ends before its end: it was cut short")
            return False
        if self._decoder is None:
            piece = piece.lstrip(b"\0")
            if not piece:
                return True
            self._decoder = self._start()
        self._ready = memoryview(self._decoder.decompress(piece))
        if self._decoder.eof:
            self._rest, self._decoder = self._decoder.unused_data, None
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._next():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count


def open_bytes(path: pathlib.Path, compression: str) -> IO[bytes]:
    """The bytes of a file, decompressed.

    Args:
        path: The file.
        compression: One of :data:`COMPRESSIONS`, or empty.

    Raises:
        OSError, EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError: It is damaged, cut
            short or empty (:data:`DAMAGE`); also while reading.
    """
    if not compression:
        return path.open("rb")
    if compression in _DECODERS:
        return io.BufferedReader(_Streams(path, _DECODERS[compression]))
    if not os.path.getsize(path):
        raise EOFError("it is empty, and the smallest compressed file is not")
    return cast("IO[bytes]", gzip.open(path, "rb"))
