"""What a worker says of its chain to the board of the sweep, and hears there."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

from healing.errors import HealingError
from healing.progress import Stop
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.launching.board import Ended, Now
from healing.stages.launching.chain import CellResult
from healing.stages.launching.ray_task import Task
from healing.stages.terminal.console import CellProgress
from healing.tracking.sending.kept_states import StoredSnapshots
from healing.tracking.snapshots import Kept
from healing.tracking.store import MlflowStore

TELL_SECONDS = 1.0
"""Between two words of a worker to the command; a stop is heard of as often."""


class RayWatch:
    """Tells the board of one chain's cells, from a thread of its own, and hears a stop there.

    Args:
        board: Of the sweep, an actor.
        task: That is run.
        worker: Name of this try of it.
        store: Whose children have the number of the try as a tag.
        stop: Set where the command says so.
    """

    def __init__(self, board: Any, task: Task, worker: str, store: MlflowStore, stop: Stop) -> None:
        self._board, self._task, self._worker = board, task, worker
        self._store, self._stop = store, stop
        self._now = Now(-1, 1, 0.0, task.chain.title)
        self._cell = CellProgress(self, 1)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tells the board", daemon=True)

    def __enter__(self) -> RayWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def is_over(self) -> bool:
        """Whether the sweep ends."""
        return self._stop.is_set()

    def begins(self, cell: SweepCell, runs: int) -> CellProgress:
        """The board counts the tries of a cell: a worker that dies in it takes the chain along,
        which Ray runs again.

        Raises:
            HealingError: It was tried often enough.
        """
        self._now = Now(self._now.cell + 1, runs, 0.0, cell.title)
        place = (self._task.number, self._now.cell)
        worker = self._worker
        tries, vain = self._asked(
            lambda: self._board.begins.remote(place, worker, self._now), (1, 1)
        )
        most = 1 + self._task.chain.config.retries
        if vain > most:
            raise HealingError(died_text(most, self._task.memory))
        self._store.tags["try"] = str(tries)
        self._tell()
        self._cell = CellProgress(self, runs)
        return self._cell

    def goes_on(self, step: int) -> None:
        """The run under way goes on from this step."""
        place, since = (self._task.number, self._now.cell), (self._cell.over, step)
        self._asked(lambda: self._board.goes_on.remote(place, since), None)

    def tell(self, cell: CellProgress, share: float, text: str) -> None:
        """What goes to the board next."""
        self._now = Now(self._now.cell, self._now.runs, share, text)

    def ended(self, result: CellResult) -> None:
        """The cell is over, whatever becomes of its chain."""
        verdict = result.view.tags.get("verdict", "") if result.view else ""
        ended = Ended(self._task.number, result.cell.title, result.failure, verdict)
        place = (self._task.number, self._now.cell)
        self._asked(lambda: self._board.ended.remote(place, ended), None)

    def say(self, text: str) -> None:
        """A warning, which the command shows: nobody reads what is written here."""
        self._asked(lambda: self._board.say.remote(f"{self._now.text}: {text}"), None)

    def _asked(self, call: Callable[[], Any], otherwise: Any) -> Any:
        """The board's answer. It is there while its command is, and a command that is gone ends
        its workers too.
        """
        import ray

        try:
            return ray.get(call())
        except ray.exceptions.RayError:
            return otherwise

    def _tell(self) -> None:
        number, now = self._task.number, self._now
        signum = self._asked(lambda: self._board.tell.remote(number, now), None)
        if signum is not None:
            self._stop.signum = signum
            self._stop.set()

    def _follow(self) -> None:
        while not self._ended.wait(TELL_SECONDS):
            self._tell()


class _Warnings(logging.Handler):
    """Hands warnings on."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self._say = say

    def emit(self, record: logging.LogRecord) -> None:
        """One of them."""
        self._say(f"{record.levelname.lower()}: {record.getMessage()}")


@contextlib.contextmanager
def warnings_to(say: Callable[[str], None]) -> Iterator[None]:
    """What this package warns of in the block is told: a worker's own output goes nowhere."""
    handler, logger = _Warnings(say), logging.getLogger("healing")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class ToldStates(StoredSnapshots):
    """Says where a run goes on."""

    told: Callable[[int], None]

    def load(self, folder: pathlib.Path, fingerprint: str) -> Kept | None:
        """As of every snapshot."""
        kept = super().load(folder, fingerprint)
        self.told(kept.step if kept else 0)
        return kept


def died_text(tries: int, memory: int) -> str:
    """Why a cell is given up whose worker died every time."""
    asked = f"; it was given {memory / 1e9:.2f} GB" if memory else ""
    return (
        f"its worker died in each of {tries} tries in a row, none of which came further{asked}: "
        "killed for want of memory, perhaps (--worker-memory), or its machine was taken away "
        "(--retries)"
    )
