"""Which worker computes which cell, where several commands use one cluster: an actor's content,
without Ray, and what a worker does with it.

Two commands may want the same cell at the same moment, on machines that share no disk. Whoever
claims it first computes it; the other waits, and then finds a finished run, or the state that was
left. A claim is a lease: a worker that dies with its command gives nothing back, and others must
not wait for it for ever.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

LEASE_SECONDS = 60.0
"""After the last word of its holder a claim is anybody's."""
RENEW_SECONDS = 10.0
"""Between two words of a holder."""
LOOK_SECONDS = 1.0
"""Between two looks of one who waits."""


class Claims:
    """Who has what.

    Args:
        clock: Seconds that only go forwards.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._held: dict[str, tuple[str, float]] = {}

    def take(self, key: str, holder: str) -> str:
        """Claim a cell, or say once more that it is held; the answer is who holds it now."""
        now = self._clock()
        current, until = self._held.get(key, (holder, now))
        if current == holder or until <= now:
            self._held[key] = (holder, now + LEASE_SECONDS)
            return holder
        return current

    def give_back(self, key: str, holder: str) -> None:
        """A cell is over, or was left; what another holds stays."""
        if self._held.get(key, ("", 0.0))[0] == holder:
            del self._held[key]


class ClaimedCells:
    """A worker's claims.

    Args:
        ask: Calls a method of the cluster's :class:`Claims`: name, key and holder; ``None`` where
            there is no answer. What cannot be claimed is computed, at worst twice.
        holder: Name of what this worker does, as others read it: no other worker's, but that of its
            next try.
        scope: In which a fingerprint stands for one run: the experiment.
    """

    def __init__(self, ask: Callable[[str, str, str], Any], holder: str, scope: str) -> None:
        self._ask, self._holder, self._scope = ask, holder, scope

    @contextlib.contextmanager
    def __call__(self, fingerprint: str, waiting: Callable[[str], None]) -> Iterator[None]:
        """Have a cell alone for the block.

        Args:
            fingerprint: Of the cell.
            waiting: Told about every second whom it is waited for; may raise.
        """
        key = f"{self._scope}/{fingerprint}"
        while (who := self._ask("take", key, self._holder)) not in (None, self._holder):
            waiting(f"waiting for {who}, which computes the same")
            time.sleep(LOOK_SECONDS)
        over = threading.Event()
        renewing = threading.Thread(
            target=self._renew, args=(key, over), name="renews a claim", daemon=True
        )
        renewing.start()
        try:
            yield
        finally:
            over.set()
            renewing.join()
            self._ask("give_back", key, self._holder)

    def _renew(self, key: str, over: threading.Event) -> None:
        while not over.wait(RENEW_SECONDS):
            self._ask("take", key, self._holder)
