"""Stored runs: looked up, searched, their files and histories."""

from __future__ import annotations

import itertools
import os
import pathlib
import posixpath
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import mlflow
from mlflow.entities import LifecycleStage, Run
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from healing.errors import TrackingError
from healing.tracking.metric_history import collection_paused, finite
from healing.tracking.open_runs import DEFAULT_EXPERIMENT
from healing.tracking.output_folder import downloads_folder
from healing.tracking.page_text import has_tag, plain_tags
from healing.tracking.run_logger import RunLogger
from healing.tracking.sending.logged_models import MADE_BY, model_of_version
from healing.tracking.sending.requests import LOCAL_ID
from healing.tracking.sending.store_errors import (
    asked,
    cure,
    http_status,
    one_line,
    require_active,
    shown,
    store_address,
)


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
        plain_tags(run.data.tags),
        {key: finite(value) for key, value in run.data.metrics.items()},
    )


def find_experiment(name_or_id: str) -> str:
    """Id of an experiment given by name or id; empty = where new runs would go.

    Raises:
        TrackingError: There is none.
    """
    wanted = (
        name_or_id
        or os.environ.get("MLFLOW_EXPERIMENT_ID")
        or os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    )
    with asked(lambda why: f"experiment {wanted!r}: {why}"):
        client = MlflowClient()
        found = client.get_experiment_by_name(wanted)
        if found is None and wanted.isdecimal():
            found = client.get_experiment(wanted)
    if found is None:
        known = ", ".join(repr(e.name) for e in client.search_experiments(max_results=10))
        raise TrackingError(
            f"no experiment {wanted!r} in {store_address()} (there are: {known}): "
            "name one with --experiment, or set MLFLOW_TRACKING_URI"
        )
    require_active(found)
    return str(found.experiment_id)


def search(
    experiment_id: str,
    filter_string: str,
    asked_by: str = "",
    wanted: Callable[[RunView], bool] = lambda view: True,
) -> list[RunView]:
    """All runs of an experiment that match, oldest first.

    Args:
        experiment_id: MLflow's id.
        filter_string: In MLflow's language.
        asked_by: The option that the user gave it in; empty = it is this program's own.
        wanted: Which of them are kept.

    Raises:
        TrackingError: The filter string is not valid, or the store does not answer.
    """
    named = f"{asked_by} {filter_string!r}" if asked_by else "runs could not be looked up"
    runs: list[RunView] = []
    token: str | None = None
    while True:
        with asked(lambda why: f"{named}: {why}"), collection_paused():
            page = MlflowClient().search_runs(
                [experiment_id],
                filter_string,
                max_results=1000,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            runs += filter(wanted, map(_view, page))
        token = page.token
        if not token:
            return runs


def get_run(run_id: str) -> RunView:
    """One run by id.

    Raises:
        TrackingError: There is none.
    """
    with asked(
        lambda why: (
            f"no run {run_id!r} in {store_address()}: check the id and MLFLOW_TRACKING_URI ({why})"
        )
    ):
        found = _found(run_id)
    if found.info.lifecycle_stage == LifecycleStage.DELETED:
        raise TrackingError(
            f"run {run_id} is deleted in {store_address()}: restore it with `mlflow runs "
            f"restore --run-id {run_id}`"
        )
    return _view(found)


def _found(run_id: str) -> Run:
    """By the store's id, or by what its process called it while the store was away."""
    client = MlflowClient()
    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if http_status(error) != NOT_FOUND or not re.fullmatch(r"[0-9a-f]{32}", run_id):
            raise
        everywhere = [e.experiment_id for e in client.search_experiments()]
        for wanted in has_tag(LOCAL_ID, run_id):
            if named := client.search_runs(everywhere, wanted, max_results=1):
                return named[0]
        raise


MODELS = "models:/"
_MODEL_URI = re.compile(
    r"models:/(?:(?P<id>m-[^/@]+)|(?P<name>[^/@]+)(?:/(?P<version>\d+)|@(?P<alias>[^/@]+)))"
)


def run_of_model(uri: str) -> RunView:
    """The run of this program that made a model.

    Args:
        uri: ``models:/m-…`` (a logged model), ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.

    Raises:
        TrackingError: There is no such model, no run made it, or another program did.
    """
    named = _MODEL_URI.fullmatch(uri)
    if named is None:
        raise TrackingError(
            f"{uri} names no model: write models:/m-…, models:/NAME/VERSION or models:/NAME@ALIAS"
        )
    with asked(
        lambda why: (
            f"no model {uri} in {store_address()}: check its name and MLFLOW_TRACKING_URI ({why})"
        )
    ):
        client = MlflowClient()
        model_id = named["id"] or model_of_version(_version(client, named))
        model = client.get_logged_model(model_id) if model_id else None
    if model is None or MADE_BY not in model.tags:
        raise TrackingError(
            f"{uri} was made by another program: name a model that --log-model stored"
        )
    if not model.source_run_id:
        raise TrackingError(f"{uri} has no source run, which would have its checkpoint")
    return get_run(model.source_run_id)


def _version(client: MlflowClient, named: re.Match[str]) -> ModelVersion:
    if named["alias"]:
        return client.get_model_version_by_alias(named["name"], named["alias"])
    return client.get_model_version(named["name"], named["version"])


def check_registry(name: str) -> None:
    """Refuse a name that the registry would not take for a model.

    Raises:
        TrackingError: It is a prompt's, or the registry refuses it.
    """
    with asked(
        lambda why: (
            f"--register-as {name!r} is refused by the registry "
            f"{shown(mlflow.get_registry_uri())} ({why}): name another"
        )
    ):
        client = MlflowClient()
        try:
            client.get_registered_model(name)
            return
        except MlflowException as error:
            if http_status(error) != NOT_FOUND:
                raise
        taken = client.get_prompt(name) is not None  # prompts share the names of models
    if taken:
        raise TrackingError(f"--register-as {name!r} is the name of a prompt there: name another")


PARENT = MLFLOW_PARENT_RUN_ID
"""Tag of a child: the id of the run above."""
CELL_KEY = "cell_key"
"""Tag of a sweep's run: by which a later sweep finds it without loading anything."""


def by_key(found: Iterable[RunView]) -> dict[str, RunView]:
    """Key of a sweep's cell → run, of those that have one; of several the last."""
    return {view.tags[CELL_KEY]: view for view in found if view.tags.get(CELL_KEY)}


def find_finished(
    experiment_id: str, fingerprint: str, below: Collection[str] | None = None
) -> RunView | None:
    """The newest finished run with this fingerprint, if there is one.

    Args:
        experiment_id: Where to look.
        fingerprint: Of the run.
        below: Parents that it has to be a child of; ``None`` = it may be anywhere.
    """
    runs = search(
        experiment_id, f"tags.fingerprint = '{fingerprint}' and attributes.status = 'FINISHED'"
    )
    found = [run for run in runs if below is None or run.tags.get(PARENT) in below]
    return found[-1] if found else None


def cut_before(
    experiment_id: str, run_id: str, stage: str, settings: Mapping[str, str]
) -> list[RunView]:
    """Parents of the same command that did not finish, since one that did; newest first.

    Args:
        experiment_id: Where to look.
        run_id: Of the parent that asks.
        stage: Of the parents.
        settings: Parameters that make the command the same; an empty one is one that is not there.
    """
    parents = search(experiment_id, f"tags.stage = '{stage}' and tags.role = 'parent'")
    return since_finished([run for run in parents if run.run_id != run_id], settings)


def since_finished(parents: Sequence[RunView], settings: Mapping[str, str]) -> list[RunView]:
    """Of parents, oldest first, the unfinished ones with these parameters after the last finished
    one with them, newest first.
    """
    same = [
        run
        for run in reversed(parents)
        if all(run.params.get(name, "") == value for name, value in settings.items())
    ]
    return list(itertools.takewhile(lambda run: run.status != "FINISHED", same))


def children(parent: RunLogger) -> list[RunView]:
    """The runs nested directly below a run."""
    return search(parent.experiment_id, f"tags.`{PARENT}` = '{parent.run_id}'")


def download(uri: str, folder: str | None = None) -> pathlib.Path:
    """Local path (below ``folder`` if given) of an artifact: ``runs:/…`` or another MLflow URI.

    Without a folder the copy is gone when the process ends.

    Raises:
        TrackingError: It is not there.
    """
    try:
        # A file of this machine is taken where it is.
        own = None if uri.startswith("file:") else tempfile.mkdtemp(dir=downloads_folder())
        place = folder or own
        return pathlib.Path(_fetched(uri, place))
    except Exception as error:
        todo = cure(error)
        text = f"artifact {shown(uri)} cannot be had: {one_line(error)[:200]}"
        raise TrackingError(f"{text}: {todo}" if todo else text) from error


def _fetched(uri: str, place: str | None) -> str:
    """Of a run's file that cannot be had MLflow says only that its path may be wrong (3.17.2); the
    store that the file is in says why.
    """
    try:
        return mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=place)
    except MlflowException:
        if not uri.startswith("runs:/"):
            raise
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        root = MlflowClient().get_run(run_id).info.artifact_uri
        return get_artifact_repository(root).download_artifacts(path, place)


NOT_FOUND = 404
MAX_KEY, MAX_VALUE = 250, 6000
"""Characters of a name, and of a parameter's value, that MLflow takes."""
_KEY = re.compile(r"[/\w.\- :]+")


def refused_by_stores(metrics: Iterable[str], params: Mapping[str, object]) -> str:
    """Which name or value of a run no MLflow store would take; empty where all are taken."""
    for name in (*metrics, *params):
        is_path = posixpath.normpath(name) == name != "." and not name.startswith(("..", "/"))
        if not (_KEY.fullmatch(name) and is_path and len(name) <= MAX_KEY):
            return f"name {name[:80]!r}"
    long = [name for name, value in params.items() if len(str(value)) > MAX_VALUE]
    return f"value of {long[0]}, of more than {MAX_VALUE} characters" if long else ""
