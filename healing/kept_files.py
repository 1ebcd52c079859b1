"""Files of the cache folder: written whole or not at all, and no more of them than is allowed."""

from __future__ import annotations

import contextlib
import pathlib
import time
import uuid
from collections.abc import Iterator

PARTIAL = ".partial"
WRITING_SECONDS = 3600.0
"""A file that was half written for longer than this was left by a process that died."""


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file of another name to write, which gets its own name at the end of the block: who reads
    beside this finds all of it or nothing. After a failure nothing is left.
    """
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def make_room(
    folder: pathlib.Path,
    pattern: str,
    size: int,
    most_bytes: int,
    replaced: pathlib.Path | None = None,
) -> None:
    """Remove what killed processes left half written, and the files of a pattern with the oldest
    times until more fit. One that may not be removed stays, and the bound is passed.

    Args:
        folder: Of the files.
        pattern: That their names match.
        size: Bytes that are to fit.
        most_bytes: Of all files together.
        replaced: One of them that goes in any case.
    """
    for path in folder.glob(f".*{PARTIAL}"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > WRITING_SECONDS:
                path.unlink()
    files = []
    for path in folder.glob(pattern):
        with contextlib.suppress(OSError):  # removed by another process
            status = path.stat()
            if path != replaced:
                files.append((status.st_mtime, status.st_size, path))
    total = sum(bytes_ for _, bytes_, _ in files) + size
    for _, bytes_, path in sorted(files):
        if total <= most_bytes:
            return
        with contextlib.suppress(PermissionError):
            path.unlink(missing_ok=True)
            total -= bytes_
