"""MLflow: the only module that imports it. Runs, lineage, batched logging, queries.

A stage asks for a run with :func:`start`, logs through the returned :class:`RunLogger`, and never
sees an MLflow type. A run that leaves its context by an exception is FAILED with the reason as a
tag; what was logged before stays.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# One bar per downloaded file would bury the summary's table.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
# One unreachable server must not hang a run for minutes (default: 7 retries, about 4 minutes).
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.rest_utils import http_request, verify_rest_response

from healing import ui_view
from healing.checkout import code_version
from healing.histories import POINTS_PER_PAGE, Point

DEFAULT_EXPERIMENT = "llm-healing"
FLUSH_SECONDS = 2.0
METRICS_PER_REQUEST = 1000
MAX_TAG = 8000
"""Characters; MLflow cuts longer tags anywhere."""
_DATASETS = threading.Lock()
"""MLflow looks a dataset up before it inserts it: two threads at once violate its uniqueness."""

SHARED_PARAMS = ("model", "arm", "seed")
"""Parameters logged under their bare name in every stage, so that runs group by them."""


class TrackingError(RuntimeError):
    """The tracking store cannot be reached, or a run or artifact is not in it."""


def _text(value: Any) -> str:
    return str(value)


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:2000]


UNREACHED = (MlflowException, OSError)
"""What MLflow's clients raise where a store, a server or a disk does not take what is sent."""


@contextlib.contextmanager
def _stored(what: str) -> Iterator[None]:
    """Turn a store's refusal into one line.

    Raises:
        TrackingError: What could not be stored, where, why, and what to do.
    """
    try:
        yield
    except UNREACHED as error:
        raise TrackingError(
            f"{what} could not be stored in {mlflow.get_tracking_uri()} "
            f"({_one_line(error)[:300]}): make that store reachable and writable, or set "
            "MLFLOW_TRACKING_URI to another, and start again; the files written so far stay in "
            "the run's local folder"
        ) from error


def whole_lines(text: str, elsewhere: str) -> str:
    """As many whole lines of a text as a tag holds, and where the rest is."""
    if len(text) <= MAX_TAG:
        return text
    more = f"\n\nThe rest is in {elsewhere}."
    return text[: MAX_TAG - len(more)].rpartition("\n")[0] + more


class RunLogger:
    """Writes to one MLflow run; every call is one batched request where MLflow has one.

    All of its methods raise :class:`TrackingError` where the store does not take what they send.
    """

    def __init__(self, run: Run) -> None:
        self.run_id: str = run.info.run_id
        self.experiment_id: str = run.info.experiment_id
        self._client = MlflowClient()
        # What `mlflow run` logged itself, in its own spelling: a parameter cannot be changed.
        self._taken = set(run.data.params)
        self._buffer: list[Metric] = []
        self._flushed = time.monotonic()
        self._rescued: tuple[pathlib.Path, ...] = ()

    def _send(self, what: str, **content: Any) -> None:
        with _stored(f"{what} of run {self.run_id}"):
            self._client.log_batch(self.run_id, **content)

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Log parameters as ``prefix.name``; the shared ones under their bare name too."""
        wanted = {f"{prefix}.{name}": _text(value) for name, value in values.items()}
        wanted |= {name: _text(values[name]) for name in SHARED_PARAMS if name in values}
        fresh = {name: value for name, value in wanted.items() if name not in self._taken}
        self._send("parameters", params=[Param(k, v) for k, v in fresh.items()])
        self._taken |= fresh.keys()

    def n_params(self, count: int, name: str = "n_params") -> None:
        """Log a number of parameters, to plot against, under its bare name."""
        if name not in self._taken:
            self._send("parameters", params=[Param(name, str(count))])
            self._taken.add(name)

    def tags(self, values: Mapping[str, Any]) -> None:
        """Set tags in one request."""
        tags = [RunTag(name, _text(value)) for name, value in values.items()]
        self._send("tags", tags=tags)

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
            self._send("metrics", metrics=chunk)
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
        self.tags({"mlflow.note.content": whole_lines(markdown, "the artifacts")})

    def artifact(self, path: pathlib.Path, folder: str | None = None) -> None:
        """Store one file."""
        with _stored(f"artifact {path.name} of run {self.run_id}"):
            self._client.log_artifact(self.run_id, str(path), folder)

    def rescue(self, *paths: pathlib.Path) -> None:
        """Name local files that grow during the run: they are stored even if it fails."""
        self._rescued += paths

    def failed(self, error: BaseException) -> None:
        """Store why the run fails and what there is of it; never raises in place of the reason."""
        try:
            self.tags({"failure": _one_line(error), "failure_type": type(error).__name__})
        except TrackingError:
            return  # a store that takes no tag takes nothing: do not wait for it again
        with contextlib.suppress(TrackingError):
            self.flush()
        for path in self._rescued:
            with contextlib.suppress(TrackingError):
                self.artifact(path)

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, Any]) -> None:
        """Record an input by name and content digest, without copying it."""
        source = {"tags": {key: _text(value) for key, value in facts.items()}}
        data = Dataset(name, digest, "code", json.dumps(source))
        tag = InputTag("mlflow.data.context", context)
        with _stored(f"data set {name} of run {self.run_id}"), _DATASETS:
            self._client.log_inputs(self.run_id, datasets=[DatasetInput(data, [tag])])


@contextlib.contextmanager
def _ended(logger: RunLogger, end: Callable[[str], object]) -> Iterator[None]:
    """Send what is held back and end the run: FINISHED, or with the reason why the block failed,
    which a store that cannot be reached does not replace.
    """
    try:
        yield
        logger.flush()
    except BaseException as error:
        logger.failed(error)
        with contextlib.suppress(*UNREACHED):
            end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    with _stored(f"the end of run {logger.run_id}"):
        end("FINISHED")


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
    joined = "MLFLOW_RUN_ID" in os.environ
    try:
        if not joined and "MLFLOW_EXPERIMENT_ID" not in os.environ:
            mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT))
        run = mlflow.start_run(run_name=name)
    except MlflowException as error:
        raise TrackingError(
            f"MLflow store {mlflow.get_tracking_uri()} cannot be used ({_one_line(error)[:200]}): "
            "check MLFLOW_TRACKING_URI"
        ) from error
    logger = RunLogger(run)
    with _ended(logger, mlflow.end_run):
        # `mlflow run` names its run at random.
        logger.tags({"mlflow.runName": name, **tags, **code_version()})
        yield logger


@contextlib.contextmanager
def child(
    parent: RunLogger,
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
    client = MlflowClient()
    system = {"mlflow.parentRunId": parent.run_id, "mlflow.source.type": "LOCAL"}
    with _stored(f"run {name!r}"):
        run = client.create_run(
            parent.experiment_id,
            start_time=start_ms,
            run_name=name,
            tags={**system, **{k: _text(v) for k, v in {**tags, **code_version()}.items()}},
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


@dataclass(frozen=True)
class RunView:
    """One stored run, as far as the other modules need it.

    Attributes:
        run_id: MLflow's id.
        name: Shown in the UI.
        status: FINISHED, FAILED, RUNNING or KILLED.
        experiment_id: MLflow's id.
        params: As strings.
        tags: As strings.
        metrics: Last value of each.
    """

    run_id: str
    name: str
    status: str
    experiment_id: str
    params: Mapping[str, str]
    tags: Mapping[str, str]
    metrics: Mapping[str, float]


def _view(run: Run) -> RunView:
    return RunView(
        run.info.run_id,
        run.info.run_name,
        run.info.status,
        run.info.experiment_id,
        dict(run.data.params),
        dict(run.data.tags),
        {key: finite(value) for key, value in run.data.metrics.items()},
    )


def find_experiment(name_or_id: str) -> str:
    """Id of an experiment given by name or id; empty = where new runs would go.

    Raises:
        TrackingError: There is none.
    """
    client = MlflowClient()
    wanted = (
        name_or_id
        or os.environ.get("MLFLOW_EXPERIMENT_ID")
        or os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    )
    try:
        found = client.get_experiment_by_name(wanted)
        if found is None and wanted.isdecimal():
            found = client.get_experiment(wanted)
    except MlflowException as error:
        raise TrackingError(f"experiment {wanted!r}: {_one_line(error)[:200]}") from error
    if found is None:
        known = ", ".join(repr(e.name) for e in client.search_experiments(max_results=10))
        raise TrackingError(
            f"no experiment {wanted!r} in {mlflow.get_tracking_uri()} (there are: {known}): "
            "name one with --experiment, or set MLFLOW_TRACKING_URI"
        )
    return str(found.experiment_id)


def search(experiment_id: str, filter_string: str) -> list[RunView]:
    """All runs of an experiment that match, oldest first.

    Raises:
        TrackingError: The filter string is not valid.
    """
    runs: list[RunView] = []
    token: str | None = None
    while True:
        try:
            page = MlflowClient().search_runs(
                [experiment_id],
                filter_string,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
        except MlflowException as error:
            raise TrackingError(f"--filter {filter_string!r}: {_one_line(error)[:300]}") from error
        runs += [_view(run) for run in page]
        token = page.token
        if not token:
            return runs


def get_run(run_id: str) -> RunView:
    """One run by id.

    Raises:
        TrackingError: There is none.
    """
    try:
        return _view(MlflowClient().get_run(run_id))
    except MlflowException as error:
        raise TrackingError(
            f"no run {run_id!r} in {mlflow.get_tracking_uri()}: "
            "check the id and MLFLOW_TRACKING_URI"
        ) from error


def find_finished(experiment_id: str, fingerprint: str) -> RunView | None:
    """The newest finished run with this fingerprint, if there is one."""
    runs = search(
        experiment_id, f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
    )
    return runs[-1] if runs else None


def children(parent: RunLogger) -> list[RunView]:
    """The runs nested directly below a run."""
    return search(parent.experiment_id, f"tags.`mlflow.parentRunId` = '{parent.run_id}'")


def download(uri: str, folder: str | None = None) -> pathlib.Path:
    """Local path (below ``folder`` if given) of an artifact: ``runs:/…`` or another MLflow URI.

    Raises:
        TrackingError: It is not there.
    """
    try:
        return pathlib.Path(mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder))
    except (MlflowException, OSError) as error:
        raise TrackingError(f"artifact {uri} cannot be had: {_one_line(error)[:200]}") from error


BULK_HISTORY = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"


def metric_page(run_ids: Sequence[str], metric: str) -> list[Point]:
    """One metric of up to 100 runs in one query or request, at most 25,000 points.

    The client has no public call for it; this is the one that MLflow's own charts use (3.17.2).

    Raises:
        TrackingError: The store has no bulk history.
    """
    store = MlflowClient()._tracking_client.store
    wanted = {"run_id": list(run_ids), "metric_key": metric, "max_results": POINTS_PER_PAGE}
    try:
        if hasattr(store, "get_metric_history_bulk"):
            found = store.get_metric_history_bulk(run_ids, metric, POINTS_PER_PAGE)
            rows = [m.to_dict() for m in found]
        elif hasattr(store, "get_host_creds"):
            answer = http_request(store.get_host_creds(), BULK_HISTORY, "GET", params=wanted)
            rows = verify_rest_response(answer, BULK_HISTORY).json()["metrics"]
        else:
            raise TrackingError(f"{type(store).__name__} has no bulk history")
        return [
            Point(r["run_id"], int(r["step"]), int(r["timestamp"]), finite(r["value"]))
            for r in rows
        ]
    except (MlflowException, KeyError, ValueError) as error:
        raise TrackingError(f"no bulk history of {metric}: {_one_line(error)[:200]}") from error


def share_view(experiment_id: str) -> str:
    """Store the saved view of healing runs with the experiment; returns its path in the UI."""
    value = ui_view.encoded(int(time.time() * 1000))
    key = f"mlflow.sharedViewState.{ui_view.KEY}"
    with _stored(f"the saved view of experiment {experiment_id}"):
        MlflowClient().set_experiment_tag(experiment_id, key, value)
    return ui_view.link(experiment_id)


def finite(value: float) -> float:
    """Undo the store's spelling of infinity (±1.797e308)."""
    return math.copysign(math.inf, value) if abs(value) > 1.79e308 else value
