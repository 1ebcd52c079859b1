"""What ended processes could not send, sent now."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from healing.errors import OutageError, TrackingError
from healing.tracking.processes import Process
from healing.tracking.sending.outbox import PLACE, Outbox, Request, outboxes
from healing.tracking.sending.requests import CREATE, END, JOIN, NAMING, WITH_FILE, Messenger, batch
from healing.tracking.sending.store_errors import one_line, store_address


@dataclass(frozen=True)
class Delivery:
    """What became of one process' requests.

    Attributes:
        folder: They lie in it; it is gone where everything arrived.
        runs: The store's ids of the runs that they made or went on with.
        requests: That were sent now.
        error: Why the rest was not; empty where there is none.
        away: Whether a later try may do.
    """

    folder: pathlib.Path
    runs: Sequence[str] = ()
    requests: int = 0
    error: str = ""
    away: bool = False


Tell = Callable[[int, int], None]
"""Told how many of how many requests are sent."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def deliver(output: pathlib.Path, store: str = "", tell: Tell = silent) -> Iterator[Delivery]:
    """Send what is left in an output folder to the store that MLflow is set to, process by process.

    Sending twice changes nothing, from whatever machine. A run whose process ended without saying
    how is ended as KILLED. What a running process has is left to it.

    Args:
        output: An output folder.
        store: Leave out what was meant for another store than this; empty = send all.
        tell: Told of the progress.
    """
    for outbox in outboxes(output / PLACE):
        if store and outbox.about("store") not in (store, ""):  # nothing is written yet
            continue
        with outbox.opened() as ended:
            if not ended and store:
                continue  # this process, among others
            if not ended:
                owner = Process.read(outbox.about("process")) or "another process"
                yield Delivery(outbox.folder, error=f"{owner} still runs and sends it")
                continue
            found = _deliver(outbox, tell)
        if not found.error:
            outbox.close(drop=True)
        if found.error or found.requests or found.runs:
            yield found


def _deliver(outbox: Outbox, tell: Tell) -> Delivery:
    try:
        requests, sent = outbox.left()
    except (OSError, ValueError) as error:
        return Delivery(outbox.folder, error=f"{outbox.folder} cannot be read: {one_line(error)}")
    if outbox.about("store") != store_address():
        sent = 0  # of another store
    messenger = Messenger()
    done = 0
    try:
        for number, request in enumerate(requests):
            tell(number, len(requests))
            # A run or model that was made before is found again, for its id.
            if number < sent and request.kind not in NAMING:
                continue
            messenger(request, _file_of(outbox, number, request), again=True)
            outbox.sent(max(number, sent - 1))
            done += number >= sent
        for request in _ends(requests, messenger, outbox):
            messenger(request, None, again=True)
    except (TrackingError, ValueError, KeyError, TypeError) as error:
        away = isinstance(error, OutageError)
        return Delivery(outbox.folder, _runs(requests, messenger), done, one_line(error), away)
    return Delivery(outbox.folder, _runs(requests, messenger), done)


def _file_of(outbox: Outbox, number: int, request: Request) -> pathlib.Path | None:
    return outbox.file_of(number, request.content["path"]) if request.kind in WITH_FILE else None


def _runs(requests: Sequence[Request], messenger: Messenger) -> list[str]:
    opened = [r.run for r in requests if r.kind in (CREATE, JOIN)]
    return [messenger.run_id(run) for run in opened]


def _ends(requests: Sequence[Request], messenger: Messenger, outbox: Outbox) -> list[Request]:
    """Of the runs that nobody ended."""
    ended = {messenger.run_id(r.run) for r in requests if r.kind == END}
    owner = Process.read(outbox.about("process")) or "its process"
    why = f"{owner} ended without ending it"
    found: list[Request] = []
    for run in _runs(requests, messenger):
        if run not in ended:
            found.append(batch(run, "tags", tags={"failure": why}))
            found.append(Request(run, END, {"status": "KILLED", "time": None}))
    return found


def send_left(output: pathlib.Path, say: Callable[[str], None]) -> None:
    """Send what earlier processes of this output folder could not send to the same store."""
    for found in deliver(output, store_address()):
        if found.error:
            say(f"warning: {found.folder} still waits to be sent: {found.error}")
        else:
            say(f"sent {found.requests} request(s) of an earlier process ({_named(found.runs)})")


def _named(runs: Sequence[str]) -> str:
    return ", ".join(f"run {run}" for run in runs[:3]) + (", …" if len(runs) > 3 else "")
