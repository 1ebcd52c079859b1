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
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from healing import __version__
from healing.config.fingerprint import fingerprint
from healing.errors import OutputError, TrackingError
from healing.models.loading import resolve_device
from healing.progress import Stop, Stopped
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.state_classes import STATE_CLASSES
from healing.stages.driver import Driver
from healing.stages.launching.board import Now
from healing.stages.launching.chain import CellResult
from healing.stages.launching.chain_run import run_chain
from healing.stages.launching.claims import ClaimedCells, Claims
from healing.stages.launching.ray_cluster import NAMESPACE, ON_HEAD
from healing.stages.launching.ray_task import Task, Unfit
from healing.stages.launching.ray_watch import RayWatch, ToldStates, warnings_to
from healing.stages.terminal.console import Console
from healing.tracking.output_folder import downloads_in
from healing.tracking.processes import only_owner, owned_if_free
from healing.tracking.queries import RunView
from healing.tracking.sending.outbox import PLACE
from healing.tracking.sending.workers import CHAIN, TASK, close_runs_of_chain, use_store
from healing.tracking.snapshots import FileSnapshots
from healing.tracking.store import MlflowStore

STORING_SHARE = 0.75
"""Of the seconds that a worker has to end: for the last states, on their way to the store."""
DOWNLOADS = ".downloads"
"""Folder of what a chain fetched from the store, in its own."""
_CELLS = tuple(f"healing.stages.cells.{name}" for name in ("attack", "heal", "basin"))


def code_here() -> str:
    """What has to be the same on every machine, or cells would have other fingerprints."""
    return fingerprint(__version__, platform.python_version(), code_digest(*_CELLS))


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


def _claims(task: Task) -> ClaimedCells:
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

    holder = f"chain {task.number} of run {task.above.run_id}"  # also where it was handed on
    return ClaimedCells(ask, holder, task.above.experiment_id)


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
    import ray

    use_store(task.store)
    with contextlib.suppress(OSError):  # another machine, which needs none of its files
        os.chdir(task.folder)
    here = _here()
    if why := why_unfit(task, here.machine):
        return Unfit(here.node, here.machine, why)
    results = None
    with contextlib.suppress(Stopped), contextlib.ExitStack() as ending:
        try:
            folder = ending.enter_context(_own_folder(task, here, board))
        except OutputError as error:
            ray.get(board.leaves.remote(task.number))  # it may have waited for the folder
            return Unfit(here.node, here.machine, str(error))
        ending.enter_context(downloads_in(folder / DOWNLOADS))
        _enter(task, here, board)
        _tidy(folder.parent, board)
        results = _run(task, finished, board, here, folder)
        # What was stopped goes on from it; what the store did not take waits in it.
        if results is not None and not (folder / PLACE).exists():
            shutil.rmtree(folder, ignore_errors=True)
    over = task.chain.name() if results is not None else ""
    ray.get(board.leaves.remote(task.number, over))
    return results


def why_unfit(task: Task, machine: str) -> str:
    """Why no chain of a sweep can run here, in words; empty where it can."""
    if code_here() != task.code:
        return (
            "it has other code than this command, or other versions of Python, torch or "
            "transformers: install the same on every machine"
        )
    if task.only_on not in ("", machine):
        return f"MLFLOW_TRACKING_URI is a file of {task.only_on}: start a server (docs/cluster.md)"
    if task.proof and not pathlib.Path(task.proof).is_file():
        return (
            f"files of runs go to {pathlib.Path(task.proof).parent}, which is another folder there "
            "than here: share it, or start the server with --serve-artifacts or S3, and set "
            "MLFLOW_EXPERIMENT_NAME to a new experiment (docs/cluster.md)"
        )
    return ""


def _enter(task: Task, here: _Here, board: Any) -> None:
    """Say who has the chain now, and end what a worker that died in it left running."""
    import ray

    if ray.get(board.enters.remote(task.number, here.worker)) > 1:
        again = "its worker died, and the cell is tried again"
        with contextlib.suppress(TrackingError):  # a store that is away: the command does it later
            close_runs_of_chain(task.above.experiment_id, task.above.run_id, task.number, again)


def _tidy(scratch: pathlib.Path, board: Any) -> None:
    """Remove what workers that died here left of chains that others have finished since."""
    import ray

    for name in ray.get(board.done_with.remote()):
        folder = scratch / name
        with contextlib.suppress(OSError):
            if folder.is_dir() and not (folder / PLACE).exists():
                with owned_if_free(folder) as is_free:
                    if is_free:
                        shutil.rmtree(folder, ignore_errors=True)


def _run(
    task: Task, finished: Mapping[str, RunView], board: Any, here: _Here, folder: pathlib.Path
) -> list[CellResult] | None:
    stop, console = Stop(), Console("quiet")
    chain = task.chain.below(str(folder), verbosity="quiet")
    tags = here.tags() | {CHAIN: task.number, "device": resolve_device(chain.config.device).type}
    store = MlflowStore(tags=tags, finished=finished)
    with (
        store.below(task.above, folder, console.say) as run,
        RayWatch(board, task, here.worker, store, stop) as watch,
        warnings_to(watch.say),
    ):
        own = FileSnapshots(STATE_CLASSES)
        states = ToldStates(
            own,
            task.above.experiment_id,
            watch.say,
            store.listener.is_under_way,
            store.stored_id,
        )
        states.told = watch.goes_on
        alone = _claims(task)
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
