"""States of runs under way that are also in the store, so that a cell whose machine is gone goes on
on another.

A state is written to disk first, as ever; a thread then stores the newest as an artifact of its run
and names it in a tag. It is a safety net and no result: what cannot be stored is said once, and
the run goes on. When the cell is over its states are removed from the store.
"""

from __future__ import annotations

import contextlib
import pathlib
import re
import tempfile
import threading
from collections.abc import Callable, Iterator

from mlflow.entities import RunTag
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient

from healing.errors import TrackingError
from healing.tracking.queries import RunView, download, search
from healing.tracking.sending.store_errors import stored
from healing.tracking.snapshots import FileSnapshots, Kept

STATE, STEP = "kept_state", "kept_state_step"
"""Tags of a run: the file of its newest state in the store, and the steps that were done."""
PLACE = "state"
"""Folder of a run's artifacts."""
_NAME = re.compile(r"\d{9}-[0-9a-f]{32}\.pt")


class StoredSnapshots:
    """Snapshots on this machine's disk and in the store.

    Args:
        own: On disk.
        experiment_id: Where runs are looked for that were left on another machine.
        say: Told of a state that could not be stored or fetched.
        under_way: Whether somebody may be at a run, whose states are not for others then.
        id_of: The store's id of a run of this process, which may have begun while it was away.
    """

    def __init__(
        self,
        own: FileSnapshots,
        experiment_id: str,
        say: Callable[[str], None] = lambda _: None,
        under_way: Callable[[RunView], bool] = lambda _: False,
        id_of: Callable[[str], str] = lambda run_id: run_id,
    ) -> None:
        self._own, self._experiment_id, self._say = own, experiment_id, say
        self._under_way = under_way
        self._runs: dict[pathlib.Path, set[str]] = {}
        self._uploads = _Uploads(say, id_of)

    def load(self, folder: pathlib.Path, fingerprint: str) -> Kept | None:
        """The one with the most steps, of this disk or of the store; only a better one is fetched.
        Its bytes are checked as those of this disk are.
        """
        here, known = self._own.load(folder, fingerprint), self._runs.setdefault(folder, set())
        if here is not None:
            known.add(here.run_id)
        try:
            named = self._stored(fingerprint)
            known |= {run.run_id for run in named if run.status != "RUNNING"}
            found = max(named, key=_step, default=None)
            known |= {found.run_id} if found else set()
            if found is None or (here is not None and here.step >= _step(found)):
                return here
            self._fetch(found, folder)
        except (TrackingError, OSError) as error:
            self._say(f"warning: the state of another machine cannot be had: {error}")
            return here
        return self._own.load(folder, fingerprint)

    def _stored(self, fingerprint: str) -> list[RunView]:
        """The runs of a cell that were left and have a state in the store."""
        left = search(self._experiment_id, f"tags.fingerprint = '{fingerprint}'")
        named = [r for r in left if _NAME.fullmatch(r.tags.get(STATE, ""))]
        return [r for r in named if r.status != "FINISHED" and not self._under_way(r)]

    def _fetch(self, run: RunView, folder: pathlib.Path) -> None:
        """Put a stored state before those of this disk."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as partial:
            path = download(f"runs:/{run.run_id}/{PLACE}/{run.tags[STATE]}", partial)
            self._own.adopt(folder, path)

    def save(self, folder: pathlib.Path, kept: Kept) -> None:
        """Keep it on disk; then it is stored, while the cell goes on."""
        self._own.save(folder, kept)
        self._runs.setdefault(folder, set()).add(kept.run_id)
        newest = max(self._own.place(folder).glob("*-*.pt"))
        self._uploads.put(kept.run_id, newest, kept.step)

    def drop(self, folder: pathlib.Path) -> None:
        """Remove all of them, here and in the store."""
        self._own.drop(folder)
        for run_id in self._runs.pop(folder, set()):
            self._uploads.forget(run_id)

    def close(self, seconds: float) -> None:
        """Wait so long at most until what was saved is stored."""
        self._uploads.close(seconds)


def _step(run: RunView) -> int:
    text = run.tags.get(STEP, "")
    return int(text) if text.isdecimal() else 0


class _Uploads:
    """Stores states one after the other, of each run the newest only."""

    def __init__(self, say: Callable[[str], None], id_of: Callable[[str], str]) -> None:
        self._say, self._id_of, self._told = say, id_of, set[str]()
        self._waiting: dict[str, tuple[pathlib.Path, int]] = {}
        self._stored: dict[str, str] = {}
        self._under_way, self._closed = "", False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="stores states", daemon=True)
        self._thread.start()

    def put(self, run_id: str, path: pathlib.Path, step: int) -> None:
        """A newer state of a run."""
        with self._changed:
            self._waiting[run_id] = (path, step)
            self._changed.notify_all()

    def forget(self, run_id: str) -> None:
        """A run's states are not needed any more; one that is on its way is waited for."""
        with self._changed:
            self._waiting.pop(run_id, None)
            self._changed.wait_for(lambda: self._under_way != run_id)
        with self._failure_said("a state that is not needed any more stays in the store"):
            _remove(self._id_of(run_id))

    def close(self, seconds: float) -> None:
        """Nothing more comes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                run_id = self._under_way = next(iter(self._waiting))
                path, step = self._waiting.pop(run_id)
            try:
                with self._failure_said("a state is kept on this machine alone"):
                    _store(self._id_of(run_id), path, step, self._stored.get(run_id, ""))
                    self._stored[run_id] = path.name
                    self._told.discard("a state is kept on this machine alone")
            finally:
                with self._changed:
                    self._under_way = ""
                    self._changed.notify_all()

    @contextlib.contextmanager
    def _failure_said(self, what: str) -> Iterator[None]:
        """A store that is away, or takes no files, costs the net and nothing else: that is said
        once, until it takes some again.
        """
        try:
            yield
        except TrackingError as error:
            if what not in self._told:
                self._told.add(what)
                self._say(f"warning: {what}: {error}")


def _store(run_id: str, path: pathlib.Path, step: int, before: str) -> None:
    """Store a state, name it, and remove the one before: at every moment one that is named is
    whole.
    """
    if not path.is_file():
        return  # a newer one took its place
    with stored(f"the state of run {run_id}"):
        client = MlflowClient()
        client.log_artifact(run_id, str(path), PLACE)
        tags = [RunTag(STATE, path.name), RunTag(STEP, str(step))]
        client.log_batch(run_id, tags=tags)
        if before and before != path.name:
            root = client.get_run(run_id).info.artifact_uri
            get_artifact_repository(root).delete_artifacts(f"{PLACE}/{before}")


def _remove(run_id: str) -> None:
    """The tag goes last: as long as there is a file, it is named."""
    with stored(f"the removal of the state of run {run_id}"):
        client = MlflowClient()
        run = client.get_run(run_id)
        if run.data.tags.get(STATE):
            get_artifact_repository(run.info.artifact_uri).delete_artifacts(PLACE)
            client.log_batch(run_id, tags=[RunTag(STATE, ""), RunTag(STEP, "")])
