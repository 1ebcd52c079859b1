"""What a run is told: parameters, metrics, tags, files, its end.

Everything goes through a :class:`~healing.tracking.sending.sender.Sender`: a store that is away
stops no computation.
"""

from __future__ import annotations

import contextlib
import pathlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import Metric

from healing.errors import OutputError, TrackingError
from healing.tracking.page_text import said
from healing.tracking.sending.logged_models import ModelFiles, requests_of
from healing.tracking.sending.outbox import Request
from healing.tracking.sending.requests import (
    ARTIFACT,
    DESCRIBE,
    END,
    IMAGE,
    INPUT,
    TABLE,
    batch,
)
from healing.tracking.sending.sender import BLOCKING_SECONDS, UNLIMITED, Sender
from healing.tracking.sending.store_errors import one_line, short
from healing.tracking.sending.system_metrics import SystemMetrics

FLUSH_SECONDS = 2.0
METRICS_PER_REQUEST = 1000
FINAL = "summary/"
"""Beginning of the names of a run's final numbers."""
SHARED_PARAMS = ("model", "arm", "seed")
"""Parameters logged under their bare name in every stage, so that runs group by them."""


def now_ms() -> int:
    """Milliseconds since the epoch."""
    return int(time.time() * 1000)


@dataclass
class Told:
    """What a run was told so far, sent or not: what is known of it while its store is away."""

    name: str = ""
    status: str = "RUNNING"
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, pathlib.Path] = field(default_factory=dict)


class RunLogger:
    """Writes to one MLflow run; every call is one batched request where MLflow has one.

    All of its methods raise :class:`TrackingError` where the store refuses what they send.

    Args:
        run_id: The store's id of it, or the process' own while the store is away.
        experiment: Of the run: ``{"id": …}`` or ``{"name": …}``.
        sender: Sends everything.
        name: Shown in the UI.
        tags: That it was made with.
        is_local: Whether the id is the process' own, which the store has as a tag at most.
    """

    def __init__(
        self,
        run_id: str,
        experiment: Mapping[str, str],
        sender: Sender,
        name: str,
        tags: Mapping[str, str],
        *,
        is_local: bool = False,
    ) -> None:
        self.run_id, self.experiment, self.sender = run_id, experiment, sender
        self.is_local = is_local
        self.told = Told(name, tags=dict(tags))
        self._buffer: list[Metric] = []
        self._last: dict[str, Metric] = {}
        self._load: SystemMetrics | None = None
        self._later: dict[str, str] = {}
        self._flushed = time.monotonic()
        self._rescued: tuple[pathlib.Path, ...] = ()
        self.abandoned = False

    @property
    def experiment_id(self) -> str:
        """Empty while the store is away and only its name is known."""
        return self.experiment.get("id") or self.sender.experiment_id(self.run_id)

    def abandon(self, why: str) -> None:
        """End the run as KILLED from another thread, with what was sent so far."""
        self.abandoned = True
        tags = {**self._later, "failure": why, "stopped_by": why.partition(",")[0]}
        with contextlib.suppress(TrackingError, OutputError):
            self.sender.put(batch(self.run_id, "tags", tags=tags), patience=0.2)
            self.end("KILLED")

    def end(self, status: str, end_ms: int | None = None) -> None:
        """The last word on it."""
        self.told.status = status
        content = {"status": status, "time": now_ms() if end_ms is None else end_ms}
        self.sender.put(Request(self.run_id, END, content), patience=BLOCKING_SECONDS)

    def _batch(self, what: str, **content: Any) -> None:
        self.sender.put(batch(self.run_id, what, **content))

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Log parameters as ``prefix.name``, empty ones not; the shared ones under their bare name
        too.
        """
        wanted = {f"{prefix}.{name}": value for name, value in said(values).items()}
        wanted |= {name: str(values[name]) for name in SHARED_PARAMS if name in values}
        self._params(wanted)

    def n_params(self, count: int, name: str = "n_params") -> None:
        """Log a number of parameters, to plot against, under its bare name."""
        self._params({name: str(count)})

    def _params(self, wanted: Mapping[str, str]) -> None:
        """What is there already cannot be changed and stays."""
        fresh = {name: value for name, value in wanted.items() if name not in self.told.params}
        self.told.params |= fresh
        if fresh:
            self._batch("parameters", params=fresh)

    def tags(self, values: Mapping[str, Any], *, later: bool = False) -> None:
        """Set tags in one request; ``later``: in the next that sends tags or metrics."""
        tags = said(values)
        self.told.tags |= tags
        self.told.name = tags.get("mlflow.runName", self.told.name)
        if later:
            self._later = {**self._later, **tags}
        else:
            self._batch("tags", tags=self._tags_due(tags))

    def _tags_due(self, tags: Mapping[str, str]) -> dict[str, str]:
        """These tags, and those that were to go with what is sent next."""
        due, self._later = {**self._later, **tags}, {}
        return due

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log the metrics of one step (NaN and infinities included).

        Points are sent together, at most :data:`FLUSH_SECONDS` late: a request costs tens of
        milliseconds however many points it carries.
        """
        self._add(values, step, now_ms())
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def _add(self, values: Mapping[str, float], step: int, moment: int) -> None:
        numbers = {name: float(value) for name, value in values.items()}
        self.told.metrics |= numbers
        points = {name: Metric(name, value, moment, step) for name, value in numbers.items()}
        self._buffer += points.values()
        self._last |= points

    def flush(self) -> None:
        """Send what is still held back; all of it, also where some is refused."""
        points, self._buffer = self._buffer, []
        refused: TrackingError | OutputError | None = None
        for start in range(0, len(points), METRICS_PER_REQUEST):
            chunk = points[start : start + METRICS_PER_REQUEST]
            try:
                self._batch("metrics", metrics=chunk, tags=self._tags_due({}))
            except (TrackingError, OutputError) as error:
                refused = refused or error
        if self._later:
            self.tags({})
        self._flushed = time.monotonic()
        if refused is not None:
            raise refused

    def history(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log the metrics of many steps: pairs (step, metrics)."""
        for step, values in points:
            self.metrics(values, step)

    def recorded(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log what was measured earlier: triples (step, milliseconds since the epoch, metrics)."""
        for step, moment, values in points:
            self._add(values, step, moment)
        self.flush()

    def describe(self, markdown: str) -> None:
        """Set the run's description (shown first in the UI), as far as its lines fit in a tag; its
        ``runs:`` addresses become the UI's (:mod:`healing.tracking.page_text`).
        """
        parent = self.told.tags.get("mlflow.parentRunId", "")
        content = {"markdown": markdown, "parent": parent}
        self.sender.put(Request(self.run_id, DESCRIBE, content))

    def image(self, key: str, step: int, picture: Any) -> None:
        """Store one picture (PIL) of a series that the UI shows by step."""
        name = str(uuid.uuid4())
        path = self.sender.scratch() / f"{name}.png"
        picture.save(path)
        place = self.sender.place_of(path)
        content = {"path": place, "key": key, "step": step, "time": now_ms(), "id": name}
        self.sender.put(Request(self.run_id, IMAGE, content), path)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Store a table that the UI compares over runs: column → cells."""
        content = {"name": name, "columns": {k: list(v) for k, v in columns.items()}}
        self.sender.put(Request(self.run_id, TABLE, content))

    def artifact(self, path: pathlib.Path, folder: str | None = None) -> None:
        """Store one file."""
        self.told.files[f"{folder}/{path.name}" if folder else path.name] = path
        content = {"path": self.sender.place_of(path), "folder": folder}
        # A large file takes its time, and nothing is computed meanwhile.
        self.sender.put(Request(self.run_id, ARTIFACT, content), path, patience=UNLIMITED)

    def rescue(self, *paths: pathlib.Path) -> None:
        """Name local files that grow during the run: they are stored even if it fails."""
        self._rescued += paths

    def failed(self, error: BaseException) -> None:
        """Store why the run fails and what there is of it; never raises in place of the reason."""
        try:
            self.tags({"failure": one_line(error), "failure_type": type(error).__name__})
        except OutputError:
            pass  # on no disk, but on its way
        except TrackingError:
            return  # a store that refuses a tag takes nothing of the run
        with self._refusal_said():
            self.flush()
        for path in self._rescued:
            if path.is_file():
                with self._refusal_said():
                    self.artifact(path)

    @contextlib.contextmanager
    def _refusal_said(self) -> Iterator[None]:
        """A refusal is no more than said: the run fails for another reason."""
        try:
            yield
        except OutputError:
            pass  # on no disk, but on its way
        except TrackingError as error:
            self.sender.say(f"warning: {short(error)}")

    def model(self, model: ModelFiles) -> None:
        """Keep a model, with the run's final numbers. A store that refuses it fails no run: its
        files stay where they are, and a warning says so.
        """
        key = uuid.uuid4().hex
        final = [m for name, m in self._last.items() if name.startswith(FINAL)]
        try:
            self.flush()
            for kind, content, file in requests_of(model, key, final):
                place = {"path": self.sender.place_of(file)} if file else {}
                request = Request(self.run_id, kind, {**content, **place})
                self.sender.put(request, file, patience=UNLIMITED if file else BLOCKING_SECONDS)
        except TrackingError as error:
            self.sender.say(
                f"warning: {one_line(error)} The model is in {model.folder}, which "
                "mlflow.transformers.load_model takes; with --log-model the same command stores it "
                "again"
            )

    def system_metrics(self) -> None:
        """Log the load of the machine until the run ends.

        Raises:
            TrackingError: psutil is missing.
        """

        def send(points: list[Metric]) -> None:
            self.sender.offer(batch(self.run_id, "system metrics", metrics=points))

        self._load = self._load or SystemMetrics(self.run_id, send)

    def stop_system_metrics(self) -> None:
        """The last sample, where there are any."""
        if self._load is not None:
            self._load.stop()

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, Any]) -> None:
        """Record an input by name and content digest, without copying it."""
        texts = {key: str(value) for key, value in facts.items()}
        content = {"name": name, "digest": digest, "context": context, "facts": texts}
        self.sender.put(Request(self.run_id, INPUT, content))
