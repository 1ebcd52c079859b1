"""A store that keeps nothing beyond the process: for runs that are not tracked."""

from __future__ import annotations

import contextlib
import pathlib
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from healing.errors import TrackingError
from healing.tracking import queries
from healing.tracking.page_text import said
from healing.tracking.queries import PARENT, RunView, since_finished
from healing.tracking.run import Run
from healing.tracking.run_logger import SHARED_PARAMS
from healing.tracking.sending.logged_models import ModelFiles

EXPERIMENT = "not tracked"


class LocalRun:
    """What a run is told, kept in memory; artifacts stay where they were written."""

    def __init__(self, name: str, tags: Mapping[str, Any]) -> None:
        self.run_id, self.experiment_id = uuid.uuid4().hex, EXPERIMENT
        self.name, self.status = name, "RUNNING"
        self._params: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._metrics: dict[str, float] = {}
        self.files: dict[str, pathlib.Path] = {}
        self.tags(tags)

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Keep parameters as ``prefix.name``; the shared ones under their bare name too."""
        self._params |= {f"{prefix}.{name}": text for name, text in said(values).items()}
        self._params |= {name: str(values[name]) for name in SHARED_PARAMS if name in values}

    def n_params(self, count: int, name: str = "n_params") -> None:
        """Keep a number of parameters."""
        self._params[name] = str(count)

    def tags(self, values: Mapping[str, Any], *, later: bool = False) -> None:
        """Keep tags."""
        self._tags |= said(values)
        self.name = self._tags.get("mlflow.runName", self.name)

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Keep the last value of each metric."""
        self._metrics |= {name: float(value) for name, value in values.items()}

    def history(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Keep the last value of each metric."""
        for step, values in points:
            self.metrics(values, step)

    def flush(self) -> None:
        """Nothing is held back."""

    def describe(self, markdown: str) -> None:
        """Keep the description as the tag that MLflow has for it."""
        self.tags({"mlflow.note.content": markdown})

    def artifact(self, path: pathlib.Path, folder: str | None = None) -> None:
        """Remember where a file is."""
        self.files[f"{folder}/{path.name}" if folder else path.name] = path

    def rescue(self, *paths: pathlib.Path) -> None:
        """Files stay where they are in any case."""

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, Any]) -> None:
        """Inputs are in the run's ``config.json`` and checkpoints by their digests."""

    def image(self, key: str, step: int, picture: Any) -> None:
        """There is no UI that shows it; what it is drawn from is in the run's files."""

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """There is no UI that shows it; what it holds is in the run's files."""

    def model(self, model: ModelFiles) -> None:
        """Its files stay where they were written."""

    def system_metrics(self) -> None:
        """There is no UI that shows them."""

    def view(self) -> RunView:
        """As a stored run."""
        kept = dict(self._params), dict(self._tags), dict(self._metrics)
        return RunView(self.run_id, self.name, self.status, self.experiment_id, *kept)


class LocalStore:
    """Runs of this process, found again by their fingerprint."""

    has_history = False

    def __init__(self) -> None:
        self._runs: dict[str, LocalRun] = {}
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def start(
        self,
        name: str,
        tags: Mapping[str, Any],
        output: pathlib.Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Iterator[Run]:
        """A run that is FINISHED when the block ends well, else FAILED or KILLED."""
        run = LocalRun(name, tags)
        with self._lock:
            self._runs[run.run_id] = run
        try:
            yield run
        except BaseException as error:
            run.status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
            run.tags({"failure": str(error)})
            raise
        run.status = "FINISHED"

    @contextlib.contextmanager
    def child(self, parent: Run, name: str, tags: Mapping[str, Any]) -> Iterator[Run]:
        """A run that knows its parent."""
        with self.start(name, {**tags, PARENT: parent.run_id}) as run:
            yield run

    def _views(self) -> list[RunView]:
        with self._lock:
            return [run.view() for run in self._runs.values()]

    def find_finished(
        self, experiment_id: str, fingerprint: str, below: Collection[str] | None = None
    ) -> RunView | None:
        """The newest finished run of this process with this fingerprint."""
        found = [
            v
            for v in self._views()
            if v.status == "FINISHED"
            and v.tags.get("fingerprint") == fingerprint
            and (below is None or v.tags.get(PARENT) in below)
        ]
        return found[-1] if found else None

    def catch_up(self) -> None:
        """There were no processes before this one."""

    def look_ahead(
        self, experiment_id: str, models: Collection[str], wanted: Callable[[RunView], bool]
    ) -> None:
        """Nothing: what there is lies here."""

    def known(self, key: str) -> RunView | None:
        """The newest finished run of this process with this key."""
        found = [v for v in self._views() if v.status == "FINISHED"]
        return queries.by_key(found).get(key)

    def cut_before(self, run: Run, stage: str, settings: Mapping[str, str]) -> list[RunView]:
        """Parents of this process."""
        parents = [
            v
            for v in self._views()
            if (v.tags.get("stage"), v.tags.get("role")) == (stage, "parent")
            and v.run_id != run.run_id
        ]
        return since_finished(parents, settings)

    def under_way(self, experiment_id: str, fingerprint: str) -> RunView | None:
        """There are no other processes."""
        return None

    def close_left_running(
        self, experiment_id: str, say: Callable[[str], None] = lambda text: None
    ) -> list[str]:
        """There are none: this store ends with its process."""
        return []

    def close_gone_on_with(self, run_id: str, by: str) -> list[str]:
        """There are none."""
        return []

    def get_run(self, run_id: str) -> RunView:
        """One run of this process.

        Raises:
            TrackingError: It is none of them.
        """
        if run_id not in self._runs:
            raise TrackingError(f"no run {run_id!r} in this process, and nothing is tracked")
        return self._runs[run_id].view()

    def run_of_model(self, uri: str) -> RunView:
        """There are no models.

        Raises:
            TrackingError: In any case.
        """
        raise TrackingError(f"no model {uri} in this process, and nothing is tracked")

    def check_registry(self, name: str) -> None:
        """There is no registry; models stay where they were written."""

    def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
        """Where the run wrote the file.

        Raises:
            TrackingError: It is not there.
        """
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        run = self._runs.get(run_id)
        if run is None or path not in run.files or not run.files[path].is_file():
            raise TrackingError(f"artifact {uri} cannot be had: this process has no such file")
        return run.files[path]

    def share_view(self, experiment_id: str) -> str:
        """There is no UI."""
        return ""

    def page_of(self, run: Run) -> str:
        """There is no UI."""
        return ""
