"""What ended processes could not send, sent now."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass

from healing.errors import OutageError, TrackingError
from healing.tracking.processes import Process
from healing.tracking.sending.outbox import (
    PLACE,
    Outbox,
    Request,
    outboxes,
    refused_text,
)
from healing.tracking.sending.requests import CREATE, END, JOIN, NAMING, WITH_FILE, Messenger, batch
from healing.tracking.sending.shapes import unusable
from healing.tracking.sending.store_errors import one_line, short, store_address

GOES_ON_SECONDS = 30.0
"""Within which a request of an earlier process arrives, as long as its sending is waited for."""
ENDING_SECONDS = 5.0
"""That the end of a command waits for such a request."""
PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds between the tries of one request."""


@dataclass(frozen=True)
class Delivery:
    """What became of one process' requests.

    Attributes:
        folder: They lie in it; it is gone where everything arrived.
        runs: The store's ids of the runs that they made or went on with.
        requests: That were sent now.
        error: Why the rest was not; empty where there is none.
        away: Whether a later try may do.
        refused: That the store will not take, now or earlier; they stay in the folder.
        why: It will not take the first of them.
    """

    folder: pathlib.Path
    runs: Sequence[str] = ()
    requests: int = 0
    error: str = ""
    away: bool = False
    refused: int = 0
    why: str = ""


Tell = Callable[[int, int], None]
"""Told how many of how many requests are sent."""


def silent(done: int, total: int) -> None:
    """Tell nobody."""


def deliver(
    output: pathlib.Path, store: str = "", tell: Tell = silent, *, refused: bool = False
) -> Iterator[Delivery]:
    """Send what is left in an output folder to the store that MLflow is set to, process by process.

    Sending twice changes nothing, from whatever machine. A run whose process ended without saying
    how is ended as KILLED. What a running process has is left to it. What the store refuses for
    good is kept with the reason, and the rest goes on.

    Args:
        output: An output folder.
        store: Leave out what was meant for another store than this, and what was refused earlier;
            empty = send, and tell of, all.
        tell: Told of the progress; may raise ``OutageError``, which ends it.
        refused: Try once more what was refused earlier.
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
            found = _deliver(outbox, store or store_address(), tell, refused=refused)
            if not found.error:
                outbox.close(drop=True)
        if found.error or found.requests or found.runs or (found.refused and not store):
            yield found


def _deliver(outbox: Outbox, here: str, tell: Tell, *, refused: bool) -> Delivery:
    try:
        requests, sent = outbox.left()
        if outbox.is_over and not refused:
            return _delivery(outbox)
        tell(0, len(requests))
        if outbox.about("store") != here:
            outbox.meant_for(here)
            sent = 0
    except OutageError as error:
        return Delivery(outbox.folder, error=one_line(error), away=True)
    except (OSError, ValueError) as error:
        return Delivery(
            outbox.folder, error=f"{outbox.folder} cannot be read or written: {one_line(error)}"
        )
    messenger = Messenger()
    again = tuple(outbox.refused) if refused else ()
    done = 0
    try:
        for number, request in enumerate(requests):
            tell(number, len(requests))
            is_due = number >= sent or number in again
            # A run or model that was made before is found again, for its id.
            if is_due or (request.kind in NAMING and number not in outbox.refused):
                done += _is_taken(outbox, messenger, number, request) and is_due
            if number >= sent:
                outbox.sent(number)
        spoken_of = {requests[number].run for number in again} if outbox.is_over else None
        for request in _ends(requests, messenger, outbox, spoken_of):
            with _unless_refused():
                _patiently(messenger, request)
    except (TrackingError, OSError) as error:
        found = _delivery(outbox, _runs(requests, messenger), done)
        away = isinstance(error, OutageError)
        return dataclasses.replace(found, error=one_line(error), away=away)
    return _delivery(outbox, _runs(requests, messenger), done)


def _delivery(outbox: Outbox, runs: Sequence[str] = (), done: int = 0) -> Delivery:
    refused = outbox.refused
    why = refused[min(refused)] if refused else ""
    return Delivery(outbox.folder, runs, done, refused=len(refused), why=why)


def _is_taken(outbox: Outbox, messenger: Messenger, number: int, request: Request) -> bool:
    """Whether the store took a request; what it refuses is kept with the reason.

    Raises:
        OutageError: It is away.
        TrackingError: It is no store of MLflow's.
        OSError: The outbox cannot be written.
    """
    try:
        file = None if unusable(request, None) else _file_of(outbox, number, request)
        _patiently(messenger, request, file)
    except OutageError:
        raise
    except (TrackingError, ValueError, KeyError, TypeError) as error:
        # A wrong address refuses everything.
        messenger.require_answers()
        outbox.refuse(number, request, short(error))
        return False
    if number in outbox.refused:
        outbox.taken(number)
    return True


def _patiently(messenger: Messenger, request: Request, file: pathlib.Path | None = None) -> None:
    """Carry a request out, some times in a row where the store is away for a moment."""
    for pause in PAUSES:
        try:
            return messenger(request, file, again=True)
        except OutageError as error:
            if error.denied:
                raise
            time.sleep(pause)
    messenger(request, file, again=True)


@contextlib.contextmanager
def _unless_refused() -> Iterator[None]:
    """A run that is deleted meanwhile needs no end."""
    try:
        yield
    except OutageError:
        raise
    except TrackingError:
        pass


def _file_of(outbox: Outbox, number: int, request: Request) -> pathlib.Path | None:
    return outbox.file_of(number, request.content["path"]) if request.kind in WITH_FILE else None


def _opened(requests: Sequence[Request], messenger: Messenger) -> list[str]:
    """What the process calls its runs, but for those that the store refused."""
    opened = [r.run for r in requests if r.kind in (CREATE, JOIN)]
    return [run for run in opened if run not in messenger.unmade]


def _runs(requests: Sequence[Request], messenger: Messenger) -> list[str]:
    return [messenger.run_id(run) for run in _opened(requests, messenger)]


def _ends(
    requests: Sequence[Request],
    messenger: Messenger,
    outbox: Outbox,
    spoken_of: Container[str] | None,
) -> list[Request]:
    """Of the runs that nobody ended; ``spoken_of``: of these alone, as the process calls them."""
    ended = {messenger.run_id(r.run) for r in requests if r.kind == END}
    owner = Process.read(outbox.about("process")) or "its process"
    why = f"{owner} ended without ending it"
    found: list[Request] = []
    for own in _opened(requests, messenger):
        run = messenger.run_id(own)
        if run not in ended and (spoken_of is None or own in spoken_of):
            found.append(batch(run, "tags", tags={"failure": why}))
            found.append(Request(run, END, {"status": "KILLED", "time": None}))
    return found


class Background:
    """Sends what earlier processes of an output folder left, while this one computes.

    Args:
        output: The folder.
        say: Told what was sent, and what was not.
    """

    def __init__(self, output: pathlib.Path, say: Callable[[str], None]) -> None:
        self._output, self._say, self._store = output, say, store_address()
        self._done, self._is_enough = 0, threading.Event()
        self._thread = threading.Thread(target=self._send, name="what was left", daemon=True)
        self._thread.start()

    def _send(self) -> None:
        send_left(self._output, self._say, self._tell, self._store)

    def _tell(self, done: int, total: int) -> None:
        self._done += 1
        if self._is_enough.is_set():
            raise OutageError("this command came to its end first")

    def is_over(self, text: str = "") -> bool:
        """Whether everything is in the store, or stays here.

        Args:
            text: Wait for it, as long as it goes on, if a request says this.
        """
        while self._thread.is_alive() and text and self._speaks_of(text):
            before = self._done
            self._thread.join(GOES_ON_SECONDS)
            if self._done == before:
                break
        return not self._thread.is_alive()

    def _speaks_of(self, text: str) -> bool:
        for outbox in outboxes(self._output / PLACE):
            with contextlib.suppress(OSError):
                if outbox.says(text):
                    return True
        return False

    def wait(self, seconds: float) -> bool:
        """Wait so long at most; whether it is over."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def end(self) -> None:
        """Send nothing more; what is under way has :data:`ENDING_SECONDS`."""
        self._is_enough.set()
        self._thread.join(ENDING_SECONDS)


def send_left(
    output: pathlib.Path, say: Callable[[str], None], tell: Tell = silent, store: str = ""
) -> None:
    """Send what earlier processes of this output folder could not send to the same store."""
    for found in deliver(output, store or store_address(), tell):
        if found.error:
            say(f"warning: {found.folder} still waits to be sent: {found.error}")
        else:
            refused = f"; {found.refused} more {refusal(found)}" if found.refused else ""
            runs = _named(found.runs) or "no run"
            say(f"sent {found.requests} request(s) of an earlier process ({runs}){refused}")


def refusal(found: Delivery) -> str:
    """What became of the requests that a store refused."""
    return refused_text(found.folder, found.why)


def _named(runs: Sequence[str]) -> str:
    return ", ".join(f"run {run}" for run in runs[:3]) + (", …" if len(runs) > 3 else "")
