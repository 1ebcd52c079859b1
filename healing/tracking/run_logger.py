"""Runs of MLflow: opened, logged to in batches, ended with their status and reason.

A stage asks for a run with :func:`start`, logs through the returned :class:`RunLogger`, and never
sees an MLflow type. A run that leaves its context by an exception is FAILED with the reason as a
tag; what was logged before stays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import filelock
import mlflow
from mlflow.entities import (
    Dataset,
    DatasetInput,
    InputTag,
    Metric,
    Param,
    Run,
    RunTag,
)
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from healing.errors import TrackingError
from healing.tracking.git_version import code_version, environment
from healing.tracking.page_text import origin, resolved, said, whole_lines
from healing.tracking.processes import this_process
from healing.tracking.run import Run as OpenRun
from healing.tracking.store_errors import (
    UNREACHED,
    deleted,
    one_line,
    require_active,
    restore_experiment,
    says_deleted,
    stored,
)

DEFAULT_EXPERIMENT = "llm-healing"
FLUSH_SECONDS = 2.0
OPENING_SECONDS = 120.0
"""Waited for other processes that open the same store."""
METRICS_PER_REQUEST = 1000
_DATASETS = threading.Lock()
"""MLflow looks a dataset up before it inserts it: two threads at once violate its uniqueness."""

SHARED_PARAMS = ("model", "arm", "seed")
"""Parameters logged under their bare name in every stage, so that runs group by them."""


PROCESS = "process"
"""Tag that says whose run it is, as long as it runs and afterwards."""


def _own_process() -> dict[str, str]:
    return {PROCESS: this_process().text()}


class RunLogger:
    """Writes to one MLflow run; every call is one batched request where MLflow has one.

    All of its methods raise :class:`TrackingError` where the store does not take what they send.
    """

    def __init__(self, run: Run) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self.origin = origin(run.data.tags)
        self._parent_id: str = run.data.tags.get("mlflow.parentRunId", "")
        self._client = MlflowClient()
        # What `mlflow run` logged itself, in its own spelling: a parameter cannot be changed.
        self._taken = set(run.data.params)
        self._buffer: list[Metric] = []
        self._later: dict[str, str] = {}
        self._flushed = time.monotonic()
        self._rescued: tuple[pathlib.Path, ...] = ()
        self.abandoned = False

    def abandon(self, why: str) -> None:
        """End the run as KILLED from another thread, with what was sent so far."""
        self.abandoned = True
        with contextlib.suppress(*UNREACHED):
            tags = {**self._later, "failure": why, "stopped_by": why.partition(",")[0]}
            self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in tags.items()])
            self._client.set_terminated(self.run_id, "KILLED")

    def storing(self, what: str) -> contextlib.AbstractContextManager[None]:
        """Turn a refusal to store something of this run into one line."""
        return stored(f"{what} of run {self.run_id}", f"runs restore --run-id {self.run_id}")

    def _send(self, what: str, **content: Any) -> None:
        with self.storing(what):
            self._client.log_batch(self.run_id, **content)

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Log parameters as ``prefix.name``, empty ones not; the shared ones under their bare name
        too.
        """
        wanted = {f"{prefix}.{name}": value for name, value in said(values).items()}
        wanted |= {name: str(values[name]) for name in SHARED_PARAMS if name in values}
        fresh = {name: value for name, value in wanted.items() if name not in self._taken}
        self._send("parameters", params=[Param(k, v) for k, v in fresh.items()])
        self._taken |= fresh.keys()

    def n_params(self, count: int, name: str = "n_params") -> None:
        """Log a number of parameters, to plot against, under its bare name."""
        if name not in self._taken:
            self._send("parameters", params=[Param(name, str(count))])
            self._taken.add(name)

    def tags(self, values: Mapping[str, Any], *, later: bool = False) -> None:
        """Set tags in one request; ``later``: in the next that sends tags or metrics."""
        tags = said(values)
        if later:
            self._later = {**self._later, **tags}
        else:
            self._send("tags", tags=self._tags_due(tags))

    def _tags_due(self, tags: Mapping[str, str]) -> list[RunTag]:
        """These tags, and those that were to go with what is sent next."""
        due, self._later = {**self._later, **tags}, {}
        return [RunTag(name, value) for name, value in due.items()]

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log the metrics of one step (NaN and infinities included).

        Points are sent together, at most :data:`FLUSH_SECONDS` late: a request costs tens of
        milliseconds however many points it carries.
        """
        now = int(time.time() * 1000)
        self._buffer += [Metric(name, float(value), now, step) for name, value in values.items()]
        if time.monotonic() - self._flushed >= FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what is still held back."""
        for start in range(0, len(self._buffer), METRICS_PER_REQUEST):
            chunk = self._buffer[start : start + METRICS_PER_REQUEST]
            self._send("metrics", metrics=chunk, tags=self._tags_due({}))
        if self._later:
            self.tags({})
        self._buffer = []
        self._flushed = time.monotonic()

    def history(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log the metrics of many steps: pairs (step, metrics)."""
        for step, values in points:
            self.metrics(values, step)

    def recorded(self, points: Sequence[tuple[int, int, Mapping[str, float]]]) -> None:
        """Log what was measured earlier: triples (step, milliseconds since the epoch, metrics)."""
        for step, moment, values in points:
            self._buffer += [Metric(k, float(v), moment, step) for k, v in values.items()]
        self.flush()

    def describe(self, markdown: str) -> None:
        """Set the run's description (shown first in the UI), as far as its lines fit in a tag."""
        text = resolved(markdown, self.experiment_id, self._parent_id, self._experiment_of)
        self.tags({"mlflow.note.content": whole_lines(text, "the artifacts")})

    def _experiment_of(self, run_id: str) -> str:
        """Where another run is; of one that cannot be had, this run's."""
        with contextlib.suppress(*UNREACHED):
            return str(self._client.get_run(run_id).info.experiment_id)
        return self.experiment_id

    def image(self, key: str, step: int, picture: Any) -> None:
        """Store one picture (PIL) of a series that the UI shows by step."""
        with self.storing(f"picture {key}"):
            self._client.log_image(self.run_id, picture, key=key, step=step, synchronous=True)

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Store a table that the UI compares over runs: column → cells."""
        with self.storing(f"table {name}"):
            self._client.log_table(self.run_id, dict(columns), f"{name}.json")

    def artifact(self, path: pathlib.Path, folder: str | None = None) -> None:
        """Store one file."""
        with self.storing(f"artifact {path.name}"):
            self._client.log_artifact(self.run_id, str(path), folder)

    def rescue(self, *paths: pathlib.Path) -> None:
        """Name local files that grow during the run: they are stored even if it fails."""
        self._rescued += paths

    def failed(self, error: BaseException) -> None:
        """Store why the run fails and what there is of it; never raises in place of the reason."""
        try:
            self.tags({"failure": one_line(error), "failure_type": type(error).__name__})
        except TrackingError:
            return  # a store that takes no tag takes nothing: do not wait for it again
        with contextlib.suppress(TrackingError):
            self.flush()
        for path in self._rescued:
            with contextlib.suppress(TrackingError):
                self.artifact(path)

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, Any]) -> None:
        """Record an input by name and content digest, without copying it."""
        source = {"tags": {key: str(value) for key, value in facts.items()}}
        data = Dataset(name, digest, "code", json.dumps(source))
        tag = InputTag("mlflow.data.context", context)
        with self.storing(f"data set {name}"), _DATASETS:
            self._client.log_inputs(self.run_id, datasets=[DatasetInput(data, [tag])])


_OPENING = threading.Lock()
_OPEN: dict[str, RunLogger] = {}
"""Runs under way in this process: a signal that cannot wait ends them."""


def abandon_open_runs(why: str) -> None:
    """End every open run of this process as KILLED; the newest first, since they are children."""
    for logger in reversed(list(_OPEN.values())):
        logger.abandon(why)


@contextlib.contextmanager
def _ended(logger: RunLogger, end: Callable[[str], object]) -> Iterator[None]:
    """Send what is held back and end the run: FINISHED, or with the reason why the block failed,
    which a store that cannot be reached does not replace.
    """
    with _OPENING:
        _OPEN[logger.run_id] = logger
    try:
        yield
        logger.flush()
    except BaseException as error:
        if not logger.abandoned:
            logger.failed(error)
            with contextlib.suppress(*UNREACHED):
                end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        with _OPENING:
            _OPEN.pop(logger.run_id, None)
    with logger.storing("the end"):
        end("FINISHED")


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Processes of this machine open the same SQLite file one after the other: two that both make
    its tables would fail, and so would two that both make the experiment.
    """
    uri = mlflow.get_tracking_uri()
    if not uri.startswith("sqlite:"):
        yield
        return
    name = f"llm-healing-{hashlib.sha256(uri.encode()).hexdigest()[:16]}.lock"
    with filelock.FileLock(pathlib.Path(tempfile.gettempdir()) / name, timeout=OPENING_SECONDS):
        yield


@contextlib.contextmanager
def start(name: str, tags: Mapping[str, Any]) -> Iterator[RunLogger]:
    """The outermost run of a process: FINISHED when the block ends well, else FAILED (KILLED by
    Ctrl-C) with the reason in the tag ``failure``.

    Under ``mlflow run`` it is the run that MLflow made; otherwise a new one in the experiment of
    ``MLFLOW_EXPERIMENT_NAME`` (default ``llm-healing``).

    Args:
        name: Shown in the UI.
        tags: At least ``stage``.

    Raises:
        TrackingError: The store cannot be reached.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID")
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
    named = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    try:
        with _one_at_a_time():
            if not run_id and not experiment:
                mlflow.set_experiment(named)
            run = mlflow.start_run(run_name=name)
    except MlflowException as error:
        if says_deleted(error) and run_id:
            why = deleted(f"runs restore --run-id {run_id}")
            raise TrackingError(f"run {run_id} {why}, and start again") from error
        if says_deleted(error):
            why = deleted(restore_experiment(named))
            raise TrackingError(
                f"experiment {named!r} {why}, or set MLFLOW_EXPERIMENT_NAME to another"
            ) from error
        raise TrackingError(
            f"MLflow store {mlflow.get_tracking_uri()} cannot be used ({one_line(error)[:200]}): "
            "check MLFLOW_TRACKING_URI"
        ) from error
    logger = RunLogger(run)
    with _ended(logger, mlflow.end_run):
        # `mlflow run` names its run at random.
        told = {**tags, **code_version(), **environment(), **_own_process()}
        logger.tags({"mlflow.runName": name, **told})
        yield logger


@contextlib.contextmanager
def child(
    parent: OpenRun,
    name: str,
    tags: Mapping[str, Any],
    *,
    start_ms: int | None = None,
    end_ms: int | None = None,
) -> Iterator[RunLogger]:
    """A run nested below another, with the same promises as :func:`start`.

    Made through the client, not the fluent API, whose notion of the active run is one per thread:
    children of one parent may run in several threads.

    Args:
        parent: The run above.
        name: Shown in the UI.
        tags: At least ``stage``.
        start_ms: When it began, milliseconds since the epoch; ``None`` = now.
        end_ms: When it ended well; ``None`` = when the block ends.
    """
    system = {"mlflow.parentRunId": parent.run_id, **getattr(parent, "origin", {})}
    with _created(parent.experiment_id, name, {**system, **tags}, start_ms, end_ms) as logger:
        yield logger


@contextlib.contextmanager
def start_in(experiment: str, name: str, tags: Mapping[str, Any]) -> Iterator[RunLogger]:
    """A run of its own in the experiment of this name, which is made where there is none.

    Unlike :func:`start` it leaves MLflow's active run, experiment and environment as they are.
    """
    client = MlflowClient()
    with stored(f"experiment {experiment!r}"):
        found = client.get_experiment_by_name(experiment)
        require_active(found)
        wanted = found.experiment_id if found else client.create_experiment(experiment)
    with _created(wanted, name, tags) as logger:
        yield logger


@contextlib.contextmanager
def _created(
    experiment_id: str,
    name: str,
    tags: Mapping[str, Any],
    start_ms: int | None = None,
    end_ms: int | None = None,
) -> Iterator[RunLogger]:
    """A run made through the client; it ends with the block."""
    client = MlflowClient()
    # What was recorded earlier is nobody's, and ran with other versions.
    own = {**environment(), **_own_process()} if end_ms is None else {}
    by_whom = {} if origin(tags) else resolve_tags()
    restore = f"experiments restore --experiment-id {experiment_id}"
    with stored(f"run {name!r}", restore):
        run = client.create_run(
            experiment_id,
            start_time=start_ms,
            run_name=name,
            tags={**by_whom, **said({**tags, **code_version()}), **own},
        )
    logger = RunLogger(run)

    def end(status: str) -> None:
        client.set_terminated(logger.run_id, status, end_ms if status == "FINISHED" else None)

    with _ended(logger, end):
        yield logger


def mark_failed(reason: str) -> None:
    """Tag the run that ``mlflow run`` made with the reason why nothing could start in it."""
    if "MLFLOW_RUN_ID" in os.environ:
        run_id = os.environ["MLFLOW_RUN_ID"]
        tags = {"failure": reason, "failure_type": "ConfigError"}
        with contextlib.suppress(*UNREACHED):  # the reason itself is shown to the user anyway
            MlflowClient().log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
