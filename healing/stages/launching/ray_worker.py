"""One chain of a sweep in a worker of a Ray cluster.

A worker shares no disk with anybody: it has a folder of its own, and what it needs is in its
arguments or in the tracking store. Only descriptions travel as arguments and results, no tensors.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import platform
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from healing import __version__
from healing.config.fingerprint import fingerprint
from healing.errors import HealingError, OutputError, TrackingError
from healing.models.loading import resolve_device
from healing.progress import Stop, Stopped
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.state_classes import STATE_CLASSES
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.driver import Driver
from healing.stages.launching.board import Ended, Now
from healing.stages.launching.chain import CellResult, Chain
from healing.stages.launching.chain_run import run_chain
from healing.stages.launching.claims import ClaimedCells, Claims
from healing.stages.launching.ray_cluster import NAMESPACE, ON_HEAD
from healing.stages.terminal.console import CellProgress, Console
from healing.tracking.open_runs import Above
from healing.tracking.output_folder import downloads_in
from healing.tracking.processes import only_owner
from healing.tracking.queries import RunView
from healing.tracking.sending.kept_states import StoredSnapshots
from healing.tracking.sending.outbox import PLACE
from healing.tracking.sending.workers import TASK, close_runs_of_task, use_store
from healing.tracking.snapshots import FileSnapshots
from healing.tracking.store import MlflowStore

TELL_SECONDS = 1.0
"""Between two words of a worker to the command; a stop is heard of as often."""
STORING_SHARE = 0.75
"""Of the seconds that a worker has to end: for the last states, on their way to the store."""
DOWNLOADS = ".downloads"
"""Folder of what a chain fetched from the store, in its own."""
_CELLS = tuple(f"healing.stages.cells.{name}" for name in ("attack", "heal", "basin"))


def code_here() -> str:
    """What has to be the same on every machine, or cells would have other fingerprints."""
    return fingerprint(__version__, platform.python_version(), code_digest(*_CELLS))


@dataclass(frozen=True)
class Task:
    """One chain, and what a worker on another machine needs to run it.

    Attributes:
        number: Of the chain in its sweep.
        chain: Everything that decides its runs.
        above: Run of the command.
        store: As of :func:`healing.tracking.sending.workers.settings_of_store`.
        folder: Of the command: paths are relative to it, where the machine has it.
        code: Of the command, as of :func:`code_here`.
        memory: Bytes that were asked for it; 0 = none.
    """

    number: int
    chain: Chain
    above: Above
    store: Mapping[str, str]
    folder: str
    code: str
    memory: int = 0


class Unfit(NamedTuple):
    """A machine that can run no chain of this sweep: nothing was begun there.

    Attributes:
        node: Ray's id of it.
        machine: Its name.
        why: In words.
    """

    node: str
    machine: str
    why: str


@dataclass(frozen=True)
class _Here:
    """Where a task runs.

    Attributes:
        machine: Its name.
        node: Ray's id of it.
        task: Ray's id of the task, the same at every try.
        worker: Of this try alone.
    """

    machine: str
    node: str
    task: str
    worker: str

    def tags(self) -> dict[str, str]:
        """Of every run that is made here."""
        return {"node": self.machine, "ray_node_id": self.node, TASK: self.task}


def _here() -> _Here:
    import ray

    context = ray.get_runtime_context()
    worker = f"{context.get_worker_id()}-{time.time_ns()}"  # a worker runs task after task
    return _Here(platform.node(), context.get_node_id(), str(context.get_task_id()), worker)


def scratch_of(worker_dir: str, node: str) -> pathlib.Path:
    """The folder of one machine's workers; another node on the same machine has another.

    Raises:
        OutputError: It cannot be made, or is another user's.
    """
    own = f"llm-healing-{os.getuid()}"
    root = pathlib.Path(worker_dir).expanduser() if worker_dir else None
    place = (root or pathlib.Path(tempfile.gettempdir()) / own) / node[:12]
    with _usable(place):
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        if place.parent.stat().st_uid != os.getuid() and not worker_dir:
            raise PermissionError("it belongs to another user")
    return place


@contextlib.contextmanager
def _usable(place: pathlib.Path) -> Iterator[None]:
    """A worker's folder that cannot be written is told in one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(
            f"--worker-dir: {place} on {platform.node()} cannot be used ({reason}): name a folder "
            "that can be written on every machine"
        ) from error


class _Watch:
    """Tells the board of one chain's cells, from a thread of its own, and hears a stop there.

    Args:
        board: Of the sweep, an actor.
        task: That is run.
        here: Where it runs.
        store: Whose children have the number of the try as a tag.
        stop: Set where the command says so.
    """

    def __init__(self, board: Any, task: Task, here: _Here, store: MlflowStore, stop: Stop) -> None:
        self._board, self._task, self._here = board, task, here
        self._store, self._stop = store, stop
        self._now = Now(-1, 1, 0.0, task.chain.title)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tells the board", daemon=True)

    def __enter__(self) -> _Watch:
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
        worker = self._here.worker
        tries = self._asked(lambda: self._board.begins.remote(place, worker, self._now), 1)
        most = 1 + self._task.chain.config.retries
        if tries > most:
            raise HealingError(died_text(most, self._task.memory))
        self._store.tags["try"] = str(tries)
        self._tell()
        return CellProgress(self, runs)

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


def _claims(here: _Here, task: Task) -> ClaimedCells:
    """Of a chain: its next try has what a worker that died held. All commands of the cluster share
    the actor, which outlives each.
    """
    import ray

    name = f"claims-{task.code[:16]}"  # other code has other fingerprints
    options = {"name": name, "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}

    def ask(method: str, key: str, holder: str) -> Any:
        try:
            actor = ray.remote(Claims).options(**options, **ON_HEAD).remote()
            return ray.get(getattr(actor, method).remote(key, holder))
        except (ray.exceptions.RayError, ValueError):  # the latter of two that make it at once
            return None

    return ClaimedCells(ask, f"Ray's task {here.task}", task.above.experiment_id)


def died_text(tries: int, memory: int) -> str:
    """Why a cell is given up whose worker died every time."""
    asked = f"; it was given {memory / 1e9:.2f} GB" if memory else ""
    return (
        f"its worker died in each of {tries} tries{asked}: killed for want of memory, perhaps "
        "(--worker-memory), or its machine was taken away (--retries)"
    )


@contextlib.contextmanager
def _own_folder(task: Task, here: _Here, board: Any) -> Iterator[pathlib.Path]:
    """The chain's folder on this machine, for the block alone; what a try before left is in it.

    Raises:
        OutputError: It cannot be written.
        Stopped: The sweep ends while another command has it.
    """
    import ray

    def waiting(text: str) -> None:
        now = Now(0, 1, 0.0, f"{task.chain.title}: {text}")
        signum = ray.get(board.tell.remote(task.number, now))
        if signum is not None:
            raise Stopped(signum)

    place = scratch_of(task.chain.config.worker_dir, here.node) / task.chain.name()
    with contextlib.ExitStack() as ending:
        with _usable(place):
            ending.enter_context(only_owner(place, waiting))
        yield place


def work(
    task: Task, finished: Mapping[str, RunView], board: Any
) -> list[CellResult] | Unfit | None:
    """Run one chain; ``None`` where it was told to stop.

    Args:
        task: The chain and its command.
        finished: Fingerprint → finished run of the chain, when the sweep began.
        board: Of the sweep, an actor.

    Raises:
        HealingError: The store did not come back.
    """
    use_store(task.store)
    with contextlib.suppress(OSError):  # another machine, which needs none of its files
        os.chdir(task.folder)
    here = _here()
    if code_here() != task.code:
        why = (
            "it has other code than this command, or other versions of Python, torch or "
            "transformers: install the same on every machine"
        )
        return Unfit(here.node, here.machine, why)
    results = None
    with contextlib.suppress(Stopped), contextlib.ExitStack() as ending:
        try:
            folder = ending.enter_context(_own_folder(task, here, board))
        except OutputError as error:
            return Unfit(here.node, here.machine, str(error))
        ending.enter_context(downloads_in(folder / DOWNLOADS))
        _enter(task, here, board)
        results = _run(task, finished, board, here, folder)
        # What was stopped goes on from it; what the store did not take waits in it.
        if results is not None and not (folder / PLACE).exists():
            shutil.rmtree(folder, ignore_errors=True)
    _leave(task, board)
    return results


def _enter(task: Task, here: _Here, board: Any) -> None:
    """Say who has the chain now, and end what a worker that died in it left running."""
    import ray

    if ray.get(board.enters.remote(task.number, here.worker)) > 1:
        again = "its worker died, and the cell is tried again"
        with contextlib.suppress(TrackingError):  # a store that is away: the command does it later
            close_runs_of_task(task.above.experiment_id, here.task, again)


def _leave(task: Task, board: Any) -> None:
    import ray

    ray.get(board.leaves.remote(task.number))


def _run(
    task: Task, finished: Mapping[str, RunView], board: Any, here: _Here, folder: pathlib.Path
) -> list[CellResult] | None:
    stop, console = Stop(), Console("quiet")
    chain = task.chain.below(str(folder), verbosity="quiet")
    tags = here.tags() | {"device": resolve_device(chain.config.device).type}
    store = MlflowStore(tags=tags, finished=finished)
    with (
        store.below(task.above, folder, console.say) as run,
        _Watch(board, task, here, store, stop) as watch,
    ):
        own = FileSnapshots(STATE_CLASSES)
        under_way = store.listener.is_under_way
        states = StoredSnapshots(own, task.above.experiment_id, watch.say, under_way)
        alone = _claims(here, task)
        driver = Driver(console, store, stop=stop, snapshots=states, alone=alone)
        try:
            results = run_chain(chain, driver, run, watch)
        except Stopped:
            return None
        except torch.AcceleratorError as error:
            # Nothing can be computed by this process any more: it dies, and is tried again.
            watch.say(f"its device failed ({' '.join(str(error).split())[:200]})")
            states.close(STORING_SHARE * chain.config.ending_seconds)
            os._exit(1)
        finally:
            states.close(STORING_SHARE * chain.config.ending_seconds)
    return None if stop.is_set() else results
