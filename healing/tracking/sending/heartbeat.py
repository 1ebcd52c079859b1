"""The sign of life of runs under way: their process renews a tag of each in the store.

No other machine sees whether a process is there. One that is gone, however it ended, renews
nothing.
"""

from __future__ import annotations

import contextlib
import datetime
import threading
from collections.abc import Iterator
from typing import Protocol

from mlflow.tracking import MlflowClient

from healing.tracking.sending.store_errors import stored

HEARTBEAT = "heartbeat"
"""Tag of a run: when its process last said that it is under way, UTC by that machine's clock."""
BEAT_SECONDS = 30.0
"""Between two of them."""


def beat() -> dict[str, str]:
    """The tag, now."""
    return {HEARTBEAT: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")}


class _OfASender(Protocol):
    @property
    def is_away(self) -> bool: ...

    def run_id(self, own: str) -> str: ...


class Beating(Protocol):
    """A run under way."""

    run_id: str
    is_local: bool

    @property
    def sender(self) -> _OfASender:
        """Knows whether the store is away."""


class Heart:
    """Renews the tags of all runs under way in this process, from one thread, which is there while
    they are. A beat that the store does not take is left out: it is nobody's result.

    Args:
        seconds: Between two beats.
    """

    def __init__(self, seconds: float = BEAT_SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._runs: dict[int, Beating] = {}
        self._over: threading.Event | None = None

    @contextlib.contextmanager
    def beats_for(self, run: Beating) -> Iterator[None]:
        """For the block; the first beat is the tag that the run was made with (:func:`beat`)."""
        with self._lock:
            self._runs[id(run)] = run
            if self._over is None:
                self._over = threading.Event()
                own = (self._over,)
                threading.Thread(target=self._go, args=own, name="heartbeat", daemon=True).start()
        try:
            yield
        finally:
            with self._lock:
                del self._runs[id(run)]
                if not self._runs and self._over is not None:
                    self._over.set()
                    self._over = None

    def _go(self, over: threading.Event) -> None:
        while not over.wait(self._seconds):
            with self._lock:
                runs = list(self._runs.values())
            for run in runs:
                # The store's id of it, once it has one: it may have been away when the run began.
                known = run.sender.run_id(run.run_id)
                is_unknown = run.is_local and known == run.run_id
                if is_unknown or run.sender.is_away or over.is_set():
                    continue
                # Whatever it is: without this thread all runs would be taken for left.
                with contextlib.suppress(Exception), stored(f"the heartbeat of {known}"):
                    for key, value in beat().items():
                        MlflowClient().set_tag(known, key, value)
