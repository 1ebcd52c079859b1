"""The kinds of request, and how each is carried out so that doing it twice changes nothing."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import filelock
import mlflow
import PIL.Image
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import (
    INVALID_PARAMETER_VALUE,
    RESOURCE_ALREADY_EXISTS,
    ErrorCode,
)
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES

from healing.errors import OutageError, TrackingError
from healing.tracking.page_text import has_tag, plain_tags, resolved, stored_name, whole_lines
from healing.tracking.sending.logged_models import MODEL, MODEL_FILE, MODELS, LoggedModels
from healing.tracking.sending.outbox import Request
from healing.tracking.sending.repeats import once
from healing.tracking.sending.shapes import unusable
from healing.tracking.sending.store_errors import (
    asked,
    is_away,
    require_active,
    says_deleted,
    short,
    store_address,
    stored,
)

CREATE, JOIN, BATCH, DESCRIBE, INPUT, END = "create", "join", "batch", "describe", "input", "end"
ARTIFACT, IMAGE, TABLE = "artifact", "image", "table"
WITH_FILE = (ARTIFACT, IMAGE, MODEL_FILE)
NAMING = (CREATE, MODEL)
"""Kinds after which the store has an id that later requests need."""
LOCAL_ID = "local_run_id"
"""Tag: what the process called a run before the store named it; a run is made once for each."""
OPENING_SECONDS = 100.0
"""Waited for other processes that open the same store."""
_DATASETS = threading.Lock()
"""MLflow looks a dataset up before it inserts it: two threads at once violate its uniqueness."""


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
    lock = filelock.FileLock(pathlib.Path(tempfile.gettempdir()) / name, timeout=OPENING_SECONDS)
    held: AbstractContextManager[Any] = contextlib.nullcontext()
    with contextlib.suppress(PermissionError):  # another user's, who opened the same database
        held = lock.acquire()
    with held:
        yield


def create(
    local_id: str,
    experiment: Mapping[str, str],
    name: str,
    tags: Mapping[str, str],
    start_ms: int,
) -> Request:
    """Make a run. ``experiment``: ``{"id": …}`` or ``{"name": …}``, made where there is none."""
    content = {"experiment": dict(experiment), "name": name, "tags": dict(tags), "start": start_ms}
    return Request(local_id, CREATE, content)


def batch(
    run: str,
    what: str,
    metrics: Sequence[Metric] = (),
    params: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
) -> Request:
    """Log metrics, parameters and tags of a run."""
    points = [[m.key, m.value, m.timestamp, m.step] for m in metrics]
    content = {"what": what, "metrics": points, "params": params or {}, "tags": tags or {}}
    return Request(run, BATCH, content)


class Messenger:
    """Carries requests out on the store that MLflow is set to.

    Attributes:
        known: What a process calls a run → the store's id of it.
        joined: Run that was there before → its parameters and tags then.
        unmade: What a process calls a run that the store refused → why. Nothing of it can be
            stored.
    """

    def __init__(self) -> None:
        self.known: dict[str, str] = {}
        self.joined: dict[str, tuple[dict[str, str], dict[str, str]]] = {}
        self._not_before: set[str] = set()
        self.unmade: dict[str, str] = {}
        self._experiments: dict[str, str] = {}
        self._of: dict[str, str] = {}
        self._made: MlflowClient | None = None
        self._models: LoggedModels | None = None

    def __call__(self, request: Request, file: pathlib.Path | None, *, again: bool) -> None:
        """Carry one out.

        Args:
            request: Which.
            file: Of an artifact.
            again: Whether it was tried before, and may have arrived.

        Raises:
            TrackingError: The store refuses it.
            OutageError: The store is away.
        """
        if problem := unusable(request, file):
            raise TrackingError(
                f"{request.kind[:40]} of run {request.run[:64]} cannot be stored: {problem}"
            )
        with once():
            self._carry_out(request, file, again=again)

    def _carry_out(self, request: Request, file: pathlib.Path | None, *, again: bool) -> None:
        with stored("the first request"):
            self._open()
        run, content = self.run_id(request.run), request.content
        restore = f"runs restore --run-id {run}"
        if file is not None and not file.is_file():
            with stored(f"artifact {file.name} of run {run}", restore):
                raise FileNotFoundError(f"there is no {file}")
        if request.kind == CREATE:
            with self._noting(request):
                self._create(request, again=again)
        elif run in self.unmade:
            raise TrackingError(f"{request.kind} of a run that is not there: {self.unmade[run]}")
        elif request.kind == JOIN:
            with stored(f"run {run}", restore):
                found = self._client.get_run(run)
                self._client.update_run(run, status="RUNNING")
            self._experiments[run] = found.info.experiment_id
            self.joined[run] = dict(found.data.params), plain_tags(found.data.tags)
        elif request.kind == BATCH:
            with stored(f"{content['what']} of run {run}", restore):
                self._batch(run, content)
        elif request.kind == ARTIFACT:
            assert file is not None, "an artifact has a file"
            with stored(f"artifact {file.name} of run {run}", restore):
                self._client.log_artifact(run, str(file), content["folder"])
        elif request.kind == IMAGE:
            assert file is not None, "a picture has a file"
            with stored(f"picture {content['key']} of run {run}", restore):
                self._image(run, content, file)
        elif request.kind == TABLE:
            with stored(f"table {content['name']} of run {run}", restore):
                self._table(run, content, again=again)
        elif request.kind == DESCRIBE:
            with stored(f"tags of run {run}", restore):
                self._describe(run, content)
        elif request.kind == INPUT:
            with stored(f"data set {content['name']} of run {run}", restore), _DATASETS:
                self._input(run, content)
        elif request.kind in MODELS:
            with stored(f"model {content['name']} of run {run}", restore):
                self._models = self._models or LoggedModels(self._client)
                experiment = self._experiment_of(run)
                self._models(request.kind, run, experiment, content, file, again=again)
        elif request.kind == END:
            with stored(f"the end of run {run}", restore):
                self._client.set_terminated(run, content["status"], content["time"])

    def require_answers(self) -> None:
        """Ask the store what every store of MLflow's can say.

        Raises:
            TrackingError: It cannot: another server, perhaps, which would refuse everything.
            OutageError: It is away.
        """
        with asked(lambda why: f"{store_address()} does not answer as MLflow's stores do ({why})"):
            self._open()
            self._client.search_experiments(max_results=1)

    def _open(self) -> None:
        """Reach the store, which makes the tables of a new database."""
        if self._made is None:
            with _one_at_a_time():
                self._made = MlflowClient()

    @contextlib.contextmanager
    def _noting(self, request: Request) -> Iterator[None]:
        """Note whether the store refuses the run."""
        self.unmade.pop(request.run, None)
        try:
            yield
        except OutageError:
            raise
        except TrackingError as error:
            self.unmade[request.run] = short(error)
            raise

    @property
    def _client(self) -> MlflowClient:
        assert self._made is not None, "made before the first request"
        return self._made

    def run_id(self, run: str) -> str:
        """The store's id of a run."""
        return self.known.get(run, run)

    def experiment_id(self, run: str) -> str:
        """Of a run; empty where it is not known."""
        return self._experiments.get(run, "")

    def _named(self, text: str) -> str:
        """A text with the store's ids in the place of the process' own."""
        for own, known in self.known.items():
            text = text.replace(own, known)
        return text

    def _create(self, request: Request, *, again: bool) -> None:
        content = request.content
        with stored(f"run {content['name']!r}"), _one_at_a_time():
            experiment = self._experiment(content["experiment"])
        restore = f"experiments restore --experiment-id {experiment}"
        tags = {stored_name(k): self._named(v) for k, v in content["tags"].items()}
        with stored(f"run {content['name']!r}", restore):
            run_id = self._made_before(experiment, request.run) if again else ""
            if not run_id:
                made = self._client.create_run(
                    experiment,
                    start_time=content["start"],
                    run_name=content["name"],
                    tags={**tags, stored_name(LOCAL_ID): request.run},
                )
                run_id = made.info.run_id
        self.known[request.run] = run_id
        self._experiments[request.run] = experiment

    def _made_before(self, experiment: str, local_id: str) -> str:
        """The run that a request made whose answer was lost; empty where there is none."""
        # A deleted one too: it is not to be made again beside it.
        every = ViewType.ALL
        today, *before = has_tag(LOCAL_ID, local_id)
        # A name of before is asked for once: two questions a try never both get an answer where
        # every other one is lost.
        for wanted in [*(before if local_id not in self._not_before else []), today]:
            if found := self._client.search_runs([experiment], wanted, every, max_results=1):
                return str(found[0].info.run_id)
            if wanted != today:
                self._not_before.add(local_id)
        return ""

    def _experiment(self, named: Mapping[str, str]) -> str:
        """The id of an experiment, which is made where there is none of the name."""
        if "id" in named:
            return named["id"]
        name = named["name"]
        found = self._client.get_experiment_by_name(name)
        require_active(found)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:  # another process made it meanwhile
                if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                    raise
                found = self._client.get_experiment_by_name(name)
                assert found is not None, "the store says that it exists"
        return str(found.experiment_id)

    def _batch(self, run: str, content: Mapping[str, Any]) -> None:
        metrics = [Metric(*point) for point in content["metrics"]]
        params = {k: self._named(v) for k, v in content["params"].items()}
        tags = [RunTag(stored_name(k), self._named(v)) for k, v in content["tags"].items()]
        self._log(run, metrics, [Param(k, v) for k, v in params.items()], tags)

    def _log(
        self, run: str, metrics: list[Metric], params: list[Param], tags: list[RunTag]
    ) -> None:
        """Log what a store takes of a batch, of which it takes all or nothing.

        Raises:
            MlflowException: It refuses some of it, or is away.
        """
        kinds: dict[str, Any] = {"metrics": metrics, "params": params, "tags": tags}
        try:
            self._client.log_batch(run, **{kind: found for kind, found in kinds.items() if found})
        except MlflowException as error:
            if is_away(error) or says_deleted(error):
                raise
            if params and error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE):
                # `mlflow run` logs its own spelling of a parameter, which cannot be changed.
                taken = self._client.get_run(run).data.params
                fresh = [param for param in params if param.key not in taken]
                if len(fresh) < len(params):
                    return self._log(run, metrics, fresh, tags)
            self._log_apart(run, kinds, error)

    def _log_apart(
        self, run: str, kinds: Mapping[str, Sequence[Any]], error: MlflowException
    ) -> None:
        """Log each name of a batch that was refused, so that one bad name costs no other."""
        parts: dict[tuple[str, str], list[Any]] = {}
        for kind, found in kinds.items():
            for entry in found:
                parts.setdefault((kind, entry.key), []).append(entry)
        if len(parts) < 2:
            raise error
        refused: MlflowException | None = None
        for (kind, _), found in parts.items():
            part: dict[str, Any] = {kind: found}
            try:
                self._client.log_batch(run, **part)
            except MlflowException as one:
                if is_away(one):
                    raise
                refused = refused or one
        if refused is not None:
            raise refused

    def _files(self, run: str, folder: str) -> list[str]:
        """Files of a run, some from an earlier try whose answer was lost."""
        return [found.path for found in self._client.list_artifacts(run, folder or None)]

    def _image(self, run: str, content: Mapping[str, Any], file: pathlib.Path) -> None:
        """As ``MlflowClient.log_image``, but for a name that is not drawn anew at every try, so
        that a picture is stored once.
        """
        key = content["key"].replace("/", "~")
        name = f"{key}+step+{content['step']}+timestamp+{content['time']}+{content['id']}"
        with tempfile.TemporaryDirectory() as place, PIL.Image.open(file) as picture:
            whole, small = (
                pathlib.Path(place) / f"{name}{kind}" for kind in (".png", "+compressed.webp")
            )
            shutil.copy(file, whole)
            compress_image_size(picture).save(small)
            for path in (whole, small):
                self._client.log_artifact(run, str(path), "images")
        self._client.set_tag(run, MLFLOW_LOGGED_IMAGES, "True")

    def _table(self, run: str, content: Mapping[str, Any], *, again: bool) -> None:
        name = f"{content['name']}.json"
        if again and name in self._files(run, ""):  # MLflow would append the rows
            return
        self._client.log_table(run, dict(content["columns"]), name)

    def _describe(self, run: str, content: Mapping[str, Any]) -> None:
        own = self._experiment_of(run)
        text = resolved(
            self._named(content["markdown"]), own, self.run_id(content["parent"]),
            functools.partial(self._experiment_of, otherwise=own),
        )  # fmt: skip
        tag = RunTag("mlflow.note.content", whole_lines(text, "the artifacts"))
        self._client.log_batch(run, tags=[tag])

    def _experiment_of(self, run: str, otherwise: str = "") -> str:
        """Experiment of any run; of one that cannot be had, the other one."""
        if run not in self._of:
            try:
                self._of[run] = str(self._client.get_run(run).info.experiment_id)
            except MlflowException:
                if not otherwise:
                    raise
                return otherwise
        return self._of[run]

    def _input(self, run: str, content: Mapping[str, Any]) -> None:
        source = json.dumps({"tags": content["facts"]})
        data = Dataset(content["name"], content["digest"], "code", source)
        tag = InputTag("mlflow.data.context", content["context"])
        try:
            self._client.log_inputs(run, datasets=[DatasetInput(data, [tag])])
        except MlflowException as error:
            # A database whose other user entered the same text between MLflow's look and its entry
            # (3.17.2) has it now.
            if not ("datasets" in str(error) and "unique constraint" in str(error).lower()):
                raise
            self._client.log_inputs(run, datasets=[DatasetInput(data, [tag])])
