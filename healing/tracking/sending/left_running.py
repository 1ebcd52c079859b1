"""Runs that are RUNNING in the store: which of them are under way, and the ends of those that were
left, as by a process that was killed. They would be RUNNING for ever.

Of this machine's processes the kernel tells whether they are there, of others' only the heartbeats
of their runs (:mod:`healing.tracking.sending.heartbeat`). Clocks of two machines differ: a
heartbeat is compared with what it was before, not with the time, but where it is older than a day.
"""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable

from healing.errors import OutageError, TrackingError
from healing.tracking.open_runs import PROCESS
from healing.tracking.processes import Process, this_process
from healing.tracking.queries import RunView, get_run, search
from healing.tracking.sending.heartbeat import BEAT_SECONDS, HEARTBEAT
from healing.tracking.sending.workers import end_left

SILENT_SECONDS = 180.0
"""Without a heartbeat, of a store that answers: the process is gone."""
UNANSWERED_SECONDS = 600.0
"""That a run of another process is waited for while the store does not answer."""
LONG_AGO = datetime.timedelta(days=1)
"""No two clocks differ by as much, whatever time zones they were set in."""
_RUNNING = "attributes.status = 'RUNNING'"


class Listener:
    """Tells runs that are under way from those that were left.

    Args:
        clock: Seconds that only go forwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._heard: dict[str, tuple[str, float, float]] = {}
        self._found: dict[str, tuple[RunView, float]] = {}

    def is_under_way(self, run: RunView) -> bool:
        """Whether another process may be at a run. It takes some looks to know that one of another
        machine is not: its heartbeat has stayed as it is for :data:`SILENT_SECONDS`. Between two
        looks at most the time of one heartbeat counts, since the store may have been away, for the
        other too.

        Args:
            run: As the store has it now.
        """
        text = run.tags.get(PROCESS, "")
        owner = Process.read(text)
        if run.status != "RUNNING" or text == this_process().text():
            return False
        if owner is not None and (owner.is_gone or owner.is_here):
            return owner.is_here
        beat = run.tags.get(HEARTBEAT, "")
        if not beat or _is_long_ago(beat):
            return False
        now = self._clock()
        with self._lock:
            before, silent, looked = self._heard.get(run.run_id, (beat, 0.0, now))
            silent = silent + min(now - looked, BEAT_SECONDS) if beat == before else 0.0
            self._heard[run.run_id] = (beat, silent, now)
        return silent < SILENT_SECONDS

    def find(self, experiment_id: str, fingerprint: str) -> RunView | None:
        """A run of another process that computes the same now."""
        same = search(experiment_id, f"{_RUNNING} and tags.fingerprint = '{fingerprint}'")
        found = next((run for run in same if self.is_under_way(run)), None)
        with self._lock:
            self._found.pop(fingerprint, None)
            if found is not None:
                self._found[fingerprint] = (found, self._clock())
        return found

    def last(self, fingerprint: str) -> RunView | None:
        """What :meth:`find` found, where it cannot ask now: nothing follows from no answer, but
        after :data:`UNANSWERED_SECONDS` without one nobody is waited for.
        """
        with self._lock:
            found, then = self._found.get(fingerprint, (None, 0.0))
        return found if self._clock() - then < UNANSWERED_SECONDS else None


def _is_long_ago(beat: str) -> bool:
    try:
        then = datetime.datetime.fromisoformat(beat)
        return datetime.datetime.now(datetime.UTC) - then > LONG_AGO
    except (ValueError, TypeError):
        return True  # somebody made it up


class LeftRunning:
    """Ends as KILLED what others left RUNNING in an experiment: at once where that is sure, else
    beside what this process does, once it is.

    Args:
        experiment_id: MLflow's id.
        listener: Tells which they are.
        say: Told of each that is ended later.
        seconds: Between two looks.
    """

    def __init__(
        self,
        experiment_id: str,
        listener: Listener,
        say: Callable[[str], None],
        seconds: float = BEAT_SECONDS,
    ) -> None:
        self._experiment_id, self._listener, self._say = experiment_id, listener, say
        self._seconds, self._over = seconds, threading.Event()
        self._first: dict[str, str] = {}
        self._thread = threading.Thread(target=self._follow, name="ends left runs", daemon=True)

    def close(self) -> list[str]:
        """End those that are sure to be left; a line per run. Of the others those that belong to
        another machine are looked at again, until they are heard of or :meth:`end` is called.
        """
        lines = []
        for run in search(self._experiment_id, _RUNNING):
            owner = Process.read(run.tags.get(PROCESS, ""))
            if owner is None:
                continue  # nobody knows whose it is
            if owner.is_gone or _is_long_ago(run.tags.get(HEARTBEAT, _NEVER)):
                lines += _close(run, f"{owner} ended without ending it")
            elif not owner.is_here and HEARTBEAT in run.tags:
                self._listener.is_under_way(run)
                self._first[run.run_id] = run.tags[HEARTBEAT]
        if self._first:
            self._thread.start()
        return lines

    def end(self) -> None:
        """Look no more."""
        self._over.set()
        if self._thread.ident is not None:
            self._thread.join(1.0)

    def _follow(self) -> None:
        while self._first and not self._over.wait(self._seconds):
            try:
                self.look()
            except TrackingError:
                continue  # away, for the others too

    def look(self) -> None:
        """Once more at those of which nothing is known."""
        running = {run.run_id: run for run in search(self._experiment_id, _RUNNING)}
        for run_id, first in list(self._first.items()):
            run = running.get(run_id)
            if run is None or run.tags.get(HEARTBEAT) != first:
                del self._first[run_id]
            elif not self._listener.is_under_way(run):
                del self._first[run_id]
                owner = Process.read(run.tags.get(PROCESS, ""))
                silent = f"nothing is heard of {owner} since {first}"
                for line in _close(run, silent):
                    self._say(line)


_NEVER = datetime.datetime.max.replace(tzinfo=datetime.UTC).isoformat()
"""Stands for the heartbeat of a run that is older than heartbeats: nothing follows from it."""


def close_gone_on_with(run_id: str, by: str) -> list[str]:
    """End as KILLED the run that another goes on with, and what else its process left RUNNING: who
    has the folder of a run knows that its process is gone, also where that was on another machine.

    Args:
        run_id: That was left.
        by: The run that goes on.

    Returns:
        A line per run; none where it had ended, is not in the store, or is this machine's and
        there.
    """
    try:
        left = get_run(run_id)
    except OutageError:
        raise
    except TrackingError:
        return []  # deleted, or of another store
    text = left.tags.get(PROCESS, "")
    owner = Process.read(text)
    if left.status != "RUNNING" or (owner is not None and owner.is_here):
        return []
    why = f"{owner or 'its process'} ended without ending it, run {by} goes on"
    running = search(left.experiment_id, _RUNNING)
    same = [run for run in running if owner is not None and run.tags.get(PROCESS) == text]
    return [line for run in same or [left] for line in _close(run, why)]


def _close(run: RunView, why: str) -> list[str]:
    """End a run as KILLED; a line that says so, none where it had come to its own end."""
    if not end_left(run.run_id, why):
        return []
    return [f"run {run.run_id} ({run.name}) was left running: {why}; it is KILLED now"]
