"""A request on its way, and what is said of those that do not arrive."""

from __future__ import annotations

import multiprocessing.pool
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from healing.errors import OutageError, OutputError, TrackingError
from healing.tracking.output_folder import with_room
from healing.tracking.sending.outbox import Outbox, Request, refused_text
from healing.tracking.sending.store_errors import short

T = TypeVar("T")


class CarryOut(Protocol):
    """Does what a request asks.

    Raises ``OutageError`` where the store is away, ``TrackingError`` where it refuses.
    """

    def __call__(self, request: Request, file: pathlib.Path | None, *, again: bool) -> None:
        """``file``: of an artifact; ``again``: it was tried before, and may have arrived."""

    def run_id(self, run: str) -> str:
        """The store's id of a run; what it is called as long as the store has none."""

    def experiment_id(self, run: str) -> str:
        """Of a run; empty where it is not known."""


@dataclass
class Waiting:
    """A request on its way.

    Attributes:
        request: What to do.
        number: In the outbox; ``None`` = it is in memory alone.
        file: Of an artifact.
        tried: Whether it may have arrived.
        kept: The file's copy, once the request had to wait.
        awaited: Whether somebody waits for its answer, and hears of a refusal.
        error: Why the store refused it.
        over: Set when it was sent or refused.
    """

    request: Request
    number: int | None
    file: pathlib.Path | None
    tried: bool = False
    kept: pathlib.Path | None = None
    awaited: bool = True
    error: TrackingError | None = None
    over: threading.Event = field(default_factory=threading.Event)


def keep(waiting: Waiting, outbox: Outbox | None, scratch: Callable[[], pathlib.Path]) -> None:
    """Copy the file of a request that has to wait.

    Args:
        waiting: The request.
        outbox: Takes the copy.
        scratch: Makes the folder that does, of a process that keeps nothing on disk.

    Raises:
        OutputError: It cannot be written.
    """
    assert waiting.file is not None, "a request with a file"
    place = outbox.folder if outbox is not None else scratch()
    try:
        if outbox is None:
            folder = pathlib.Path(tempfile.mkdtemp(dir=place))
            waiting.kept = pathlib.Path(shutil.copy2(waiting.file, folder))
        elif waiting.number is not None:
            outbox.keep(waiting.number, waiting.file)
            waiting.kept = outbox.kept_file(waiting.number, waiting.file)
    except FileNotFoundError:  # the store will say so
        return
    except OSError as error:
        raise OutputError(
            f"{waiting.file} could not be kept for later in {place} ({error.strerror or error}): "
            "free some of its disk"
        ) from error


def unwritten_text(outbox: Outbox | None, error: OSError) -> str:
    """Of a request that an outbox has no room for."""
    assert outbox is not None, "nothing else is written"
    why = with_room(error.strerror or str(error), outbox.folder)
    return (
        f"{outbox.folder} could not be written ({why}): free some of its disk or make it writable, "
        "and start again; what was written before stays"
    )


def waits_text(outbox: Outbox | None, pending: Sequence[Waiting], why: str, lost: str = "") -> str:
    """Of a process that ends before its store is back.

    Args:
        outbox: Of the process; ``None`` = nothing is kept.
        pending: What was not sent.
        why: The store did not take it.
        lost: Why some of it is not on disk, or its files are not; empty = all is.
    """
    if outbox is None:
        return f"{len(pending)} request(s) could not be stored: {why}"
    gone = sum(w.number is None or (w.file is not None and not w.kept) for w in pending)
    wait = f"{len(pending) - gone} request(s) wait in {outbox.folder}"
    found = f"the tracking store did not come back ({why}): {wait}"
    send = f"`python -m entrypoints.sync {outbox.root}` once the store is there"
    if lost:
        return f"{found}, for {send}, and {gone} are lost or incomplete: {lost}"
    return f"{found}. All results are on disk; send them with {send}"


def unheard_text(outbox: Outbox | None, refused: Sequence[TrackingError]) -> str:
    """Of what a store refused while nobody waited for its answer."""
    if outbox is None or not outbox.refused:
        return (
            f"{len(refused)} request(s) were refused by the store. The first: {short(refused[0])}"
        )
    return f"{len(refused)} request(s) {refused_text(outbox.folder, short(refused[0]))}"


def answer(question: Callable[[], T], seconds: float | None) -> T:
    """Ask in a thread that is left where there is no answer in time: the end of the process does
    not wait for it, as it would for one of an executor.

    Raises:
        OutageError: There is none.
        TrackingError: The store refuses.
    """
    with multiprocessing.pool.ThreadPool(1) as pool:
        try:
            return pool.apply_async(question).get(seconds)
        except multiprocessing.TimeoutError:
            raise OutageError("the tracking store gives no answer") from None
