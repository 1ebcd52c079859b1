"""Sends requests in order from a thread of its own; a store that is away stops nobody for long."""

from __future__ import annotations

import contextlib
import itertools
import pathlib
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable

from healing.errors import OutageError, OutputError, TrackingError
from healing.tracking.sending.outbox import PICTURES, Outbox, Request
from healing.tracking.sending.requests import CREATE, JOIN
from healing.tracking.sending.store_errors import short
from healing.tracking.sending.waiting import (
    CarryOut,
    Waiting,
    keep,
    unheard_text,
    unwritten_text,
    waits_text,
)

BLOCKING_SECONDS = 5.0
"""That a computation waits for a slow or absent store, in all."""
QUICK_SECONDS = 0.5
"""An answer within this time is no waiting."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 15.0
"""Seconds between two tries of a store that is away; doubled each time."""
UNLIMITED = 1e6
"""Seconds that a file may take."""
PATIENCE = 30.0
"""Seconds that the end of a process waits for a store that is away."""


class Sender:
    """The requests of one process: first on disk, then in the store, in order, once each.

    As long as the store answers, a request is over when :meth:`put` returns. While it is away, the
    requests wait, on disk if there is an outbox; they are sent when it is back. What the store
    refuses is raised where it was handed over; where nobody waits there any more, it is said, kept
    with the reason, and raised when everything else was sent.

    Args:
        carry_out: Does what a request asks.
        outbox: On disk; ``None`` = nothing is kept beyond the process.
        say: Told when the store goes and comes back.
        clock: Seconds.
    """

    def __init__(
        self,
        carry_out: CarryOut,
        outbox: Outbox | None = None,
        say: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._carry_out, self._outbox, self.say, self._clock = carry_out, outbox, say, clock
        self._queue: deque[Waiting] = deque()
        self._changed = threading.Condition()
        self._away: OutageError | None = None
        self._unheard: list[TrackingError] = []
        self._told_of: set[str] = set()
        self._answered = self._closed = False
        self._asked: float | None = None
        self._scratch: pathlib.Path | None = None
        self._broken: BaseException | None = None
        self._left = BLOCKING_SECONDS
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    @property
    def away(self) -> OutageError | None:
        """Why the store cannot be reached now; ``None`` = it can, as far as is known."""
        return self._away

    @property
    def is_away(self) -> bool:
        """Whether nothing is to be asked of the store now: it failed last, or has not answered for
        :data:`BLOCKING_SECONDS`. One that answers slowly is there.
        """
        asked = self._asked
        hangs = asked is not None and self._clock() - asked > BLOCKING_SECONDS
        return self._away is not None or hangs

    @property
    def keeps(self) -> bool:
        """Whether requests outlive the process."""
        return self._outbox is not None

    def run_id(self, run: str) -> str:
        """The store's id of a run; what it is called as long as the store has none."""
        return self._carry_out.run_id(run)

    def experiment_id(self, run: str) -> str:
        """Of a run; empty where it is not known."""
        return self._carry_out.experiment_id(run)

    def place_of(self, path: pathlib.Path) -> str:
        """A file's path as a request names it: below the output folder where it is there, so that
        the folder can be sent from another machine.
        """
        whole = path.resolve()
        if self._outbox is not None and whole.is_relative_to(self._outbox.root):
            return whole.relative_to(self._outbox.root).as_posix()
        return str(whole)

    def scratch(self) -> pathlib.Path:
        """A folder for files that only go to the store; it is gone when they are there."""
        if self._scratch is None:
            if self._outbox is not None:
                self._scratch = self._outbox.folder / PICTURES
                self._scratch.mkdir(parents=True, exist_ok=True)
            else:
                self._temporary = tempfile.TemporaryDirectory(prefix="llm-healing-")
                self._scratch = pathlib.Path(self._temporary.name)
        return self._scratch

    def put(
        self,
        request: Request,
        file: pathlib.Path | None = None,
        *,
        patience: float | None = None,
        outlasts: bool = False,
    ) -> bool:
        """Hand a request over.

        Args:
            request: What to do.
            file: Of an artifact; kept as it is now, should it have to wait.
            patience: Seconds to wait for the answer of a store that is not known to be away;
                ``None`` = what is left of :data:`BLOCKING_SECONDS`, as in the middle of a
                computation.
            outlasts: Wait as long for a store that is away.

        Returns:
            Whether it is over; else it waits its turn.

        Raises:
            TrackingError: The store refuses this request.
            OutputError: It cannot be written to disk.
        """
        self._require_thread()
        if self._closed:  # the process' own run is over: nobody else sends
            if error := self._try(Waiting(request, None, file)):
                raise error
            return True
        waiting = self._queued(request, file)
        if not self._is_heard(waiting, 0.0 if self.is_away else patience, outlasts=outlasts):
            self._keep(waiting)
            return False
        if waiting.error is not None:
            raise waiting.error
        return True

    def offer(self, request: Request) -> None:
        """Hand over what nobody waits for, from any thread. Where it cannot be written to disk,
        that is tried again with what is handed over next.
        """
        if not self._closed:
            with contextlib.suppress(OutputError):
                self._queued(request, None, awaited=False)

    def _require_thread(self) -> None:
        if self._broken is not None:
            raise RuntimeError("the thread that sends has ended") from self._broken

    def _queued(
        self, request: Request, file: pathlib.Path | None, *, awaited: bool = True
    ) -> Waiting:
        with self._changed:
            waiting = Waiting(request, None, file, awaited=awaited)
            full = self._unwritten(waiting)
            waiting.awaited = awaited and full is None
            # The store, if it is there, is told all the same: this may be how the run ends.
            if full is None or request.kind not in (CREATE, JOIN):
                self._queue.append(waiting)
            if not self._thread.is_alive() and not self._closed:
                self._thread.start()
            self._changed.notify_all()
        if full is not None:
            raise OutputError(unwritten_text(self._outbox, full)) from full
        return waiting

    def _unwritten(self, *more: Waiting) -> OSError | None:
        """Write what is in memory alone, and more, to the outbox, in order; why that failed."""
        if self._outbox is None:
            return None
        # Since it is tried in order, these are the last ones.
        last = itertools.takewhile(lambda waiting: waiting.number is None, reversed(self._queue))
        try:
            for waiting in (*reversed(list(last)), *more):
                waiting.number = self._outbox.append(waiting.request)
        except OSError as error:
            return error
        return None

    def _keep(self, waiting: Waiting) -> None:
        """Keep a file that waits: where it lies, a later run may write another, or nothing be."""
        if waiting.file is not None and waiting.kept is None:
            keep(waiting, self._outbox, self.scratch)

    def _is_heard(self, waiting: Waiting, patience: float | None, *, outlasts: bool) -> bool:
        """Wait until the request is over, the store is away, or it took too long; whether it is
        over. If not, nobody waits for it from now on.
        """
        began = self._clock()
        allowed = self._left if patience is None else patience
        with self._changed:
            self._changed.wait_for(
                lambda: (
                    waiting.over.is_set()
                    or self._broken is not None
                    or (self._away is not None and not outlasts)
                ),
                timeout=allowed,
            )
            spent = self._clock() - began
            if patience is None and spent > QUICK_SECONDS:
                self._left = max(0.0, self._left - spent)
            waiting.awaited = waiting.over.is_set()
            return waiting.awaited

    def settle(self, patience: float = BLOCKING_SECONDS) -> None:
        """Wait until everything arrived, the store is away, or an answer takes too long; files are
        given the time that they take.
        """
        with self._changed:
            while self._queue and self._away is None and self._broken is None:
                head = self._queue[0]
                if not self._changed.wait(None if head.file is not None else patience):
                    return

    def close(self, patience: float | None = None) -> None:
        """Send what is left and end.

        Args:
            patience: Seconds that it takes at most; ``None`` = :data:`PATIENCE` since the last
                request arrived.

        Raises:
            OutageError: Something could not be sent; it is on disk if there is an outbox.
            OutputError: Something could neither be sent nor written to disk.
            TrackingError: The store refused what nobody waited for.
        """
        if self._closed:
            return
        goes_on, patience = patience is None, PATIENCE if patience is None else patience
        self._say_waiting(patience)
        with self._changed:
            end, count = self._clock() + patience, len(self._queue)
            while self._queue and self._broken is None:
                head = self._queue[0]
                if goes_on and len(self._queue) < count:
                    end, count = self._clock() + patience, len(self._queue)
                uploading = head.file is not None and self._away is None
                left = None if uploading else end - self._clock()
                if left is not None and left <= 0:
                    break
                self._changed.wait(1.0 if left is None else min(1.0, left))
            self._closed = True
            pending = list(self._queue)
            reason = self._away
            full = self._unwritten()
            self._changed.notify_all()
        lost = unwritten_text(self._outbox, full) if full is not None else ""
        for waiting in pending:
            try:
                if self._outbox is not None:
                    self._keep(waiting)
            except OutputError as error:
                lost = lost or str(error)
        if self._outbox is not None:
            self._outbox.close(drop=not pending)
        if pending:
            why = short(reason) if reason else "the store gave no answer"
            text = waits_text(self._outbox, pending, why, lost)
            raise OutputError(text) if lost else OutageError(text) from reason
        if self._unheard:
            raise TrackingError(unheard_text(self._outbox, self._unheard)) from self._unheard[0]

    def forget(self) -> None:
        """End without having sent anything: the process does not begin."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()
        if self._outbox is not None:
            self._outbox.close(drop=True)

    def _say_waiting(self, patience: float) -> None:
        if self.is_away and self._queue and patience >= 1.0:
            self.say(
                f"the store is away; waiting up to {patience:.0f} seconds for it "
                "(Ctrl-C twice: not at all)"
            )

    def _run(self) -> None:
        """The thread. What it cannot handle is raised where the next request is handed over."""
        try:
            self._send_all()
        except BaseException as error:
            with self._changed:
                self._broken = error
                self._changed.notify_all()
            raise

    def _send_all(self) -> None:
        """One request after the other, each until it is over."""
        pause, is_second = FIRST_PAUSE, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    return
                waiting = self._queue[0]
            error = self._try(waiting)
            with self._changed:
                if isinstance(error, OutageError):
                    if is_second or self._away is not None:  # one failure is none
                        self._gone(error)
                    is_second = True
                    self._changed.wait_for(lambda: self._closed, timeout=pause)
                    pause = min(2.0 * pause, LONGEST_PAUSE)
                    continue
                pause, is_second = FIRST_PAUSE, False
                self._back()
                waiting.error = error
                if error is not None and not waiting.awaited:
                    self._set_aside(waiting, error)
                if self._queue:  # not forgotten meanwhile
                    self._queue.popleft()
                if self._outbox is not None and waiting.number is not None:
                    self._outbox.sent(waiting.number)
                waiting.over.set()
                self._changed.notify_all()

    def _set_aside(self, waiting: Waiting, error: TrackingError) -> None:
        """Keep what the store refused while nobody waited, and say so once for each run."""
        self._unheard.append(error)
        if self._outbox is not None and waiting.number is not None:
            with contextlib.suppress(OSError):  # it is raised in any case
                self._outbox.refuse(waiting.number, waiting.request, short(error))
        if waiting.request.run not in self._told_of:
            self._told_of.add(waiting.request.run)
            self.say(f"warning: {short(error)}; what else the run is told goes on")

    def _try(self, waiting: Waiting) -> TrackingError | None:
        """Carry a request out; what is wrong with it or the store."""
        again, waiting.tried = waiting.tried, True
        file = waiting.kept or waiting.file
        if file is None:  # a file takes its time
            self._asked = self._clock()
        try:
            self._carry_out(waiting.request, file, again=again)
        except OutageError as error:
            # Who is not let in at first has no store; later it may be a matter of time.
            return error.refusal() if error.denied and not self._answered else error
        except TrackingError as error:
            # It may have been kept, and be gone from where it lay, while it was on its way.
            return self._try(waiting) if file != (waiting.kept or waiting.file) else error
        finally:
            self._asked = None
        self._answered = True
        return None

    def _gone(self, error: OutageError) -> None:
        if self._away is None:
            written = self._outbox and self._queue[-1].number is not None
            what = "its requests wait on disk" if written else "its requests wait"
            self.say(f"warning: the tracking store is away, {what}: {short(error)}")
        self._away = error
        self._changed.notify_all()

    def _back(self) -> None:
        if self._away is not None:
            self.say(f"the tracking store is back; {len(self._queue)} request(s) are being sent")
        self._away = None
