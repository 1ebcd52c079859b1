"""What a command and its workers on other machines share through the store: which runs are
finished, how to reach it, and the ends of runs whose worker died.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import urllib.parse
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping

import mlflow
from mlflow.entities import RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from healing.errors import TrackingError
from healing.tracking.output_folder import writing
from healing.tracking.queries import PARENT, RunView, get_run, search
from healing.tracking.sending.store_errors import stored

TASK = "ray_task_id"
"""Tag of a run that a worker made: the task that it is of, the same wherever Ray tries it again."""
CHAIN = "chain"
"""Tag of a run that a worker made: the number of its chain in the sweep."""
RUN_ID = "MLFLOW_RUN_ID"
"""Of the command's own run: no worker's."""


def settings_of_store() -> dict[str, str]:
    """The environment variables with which a process on another machine reaches this one's store.

    They may hold a login: for the workers alone, not to be shown or logged.
    """
    found = {k: v for k, v in os.environ.items() if k.startswith("MLFLOW_") and k != RUN_ID}
    return found | {"MLFLOW_TRACKING_URI": _whole(mlflow.get_tracking_uri())}


def _whole(uri: str) -> str:
    """The address of a database file from every folder of the machine."""
    scheme, slashes, path = uri.partition(":///")
    if scheme == "sqlite" and slashes and not path.startswith("/"):
        return f"{scheme}:///{pathlib.Path(path).absolute()}"
    return uri


def use_store(settings: Mapping[str, str]) -> None:
    """Reach the store that another process named; for a worker, which has no other."""
    os.environ.update(settings)
    mlflow.set_tracking_uri(settings["MLFLOW_TRACKING_URI"])


def is_file_of_one_machine() -> bool:
    """Whether the store is a file, which other machines do not reach."""
    return mlflow.get_tracking_uri().startswith("sqlite:")


@contextlib.contextmanager
def in_folder_of_files(experiment_id: str) -> Iterator[str]:
    """A file, for the block, where MLflow's clients write an experiment's files, if that is a
    folder: other machines see it where they share that. Empty where files go to a server.

    Raises:
        OutputError: The folder cannot be written.
    """
    with stored(f"where the files of experiment {experiment_id} are"):
        place: str = MlflowClient().get_experiment(experiment_id).artifact_location
    if urllib.parse.urlsplit(place).scheme not in ("", "file"):
        yield ""
        return
    folder = pathlib.Path(local_file_uri_to_path(place)).absolute()
    proof = folder / f".llm-healing-{uuid.uuid4().hex}"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        proof.touch()
    try:
        yield str(proof)
    finally:
        with contextlib.suppress(OSError):
            proof.unlink()


def finished_views(
    experiment_id: str,
    models: Collection[str] = (),
    wanted: Callable[[RunView], bool] = lambda view: True,
) -> dict[str, RunView]:
    """Fingerprint → newest finished run with it, by one question about all runs of each model, in
    pages.

    Args:
        experiment_id: Where to look.
        models: Their names, as tags have them; none = all.
        wanted: Which are kept.
    """
    is_quoted = any("'" in model for model in models)
    of = [""] if is_quoted or not models else [f" and tags.model = '{m}'" for m in sorted(models)]
    return {
        view.tags["fingerprint"]: view
        for model in of
        for view in search(experiment_id, f"attributes.status = 'FINISHED'{model}", wanted=wanted)
        if "fingerprint" in view.tags
    }


def close_runs_of_chain(experiment_id: str, run_id: str, chain: int, why: str) -> int:
    """End as KILLED what a worker that is gone left RUNNING of a chain of the sweep with this run;
    how many runs that were.
    """
    own = f"tags.`{PARENT}` = '{run_id}' and tags.{CHAIN} = '{chain}'"
    return _close(search(experiment_id, f"{_RUNNING} and {own}"), why)


def close_runs_below(experiment_id: str, run_id: str, why: str) -> int:
    """End as KILLED what workers left RUNNING below a run, none of which is there any more."""
    return _close(search(experiment_id, f"{_RUNNING} and tags.`{PARENT}` = '{run_id}'"), why)


def close_orphans(experiment_id: str) -> int:
    """End as KILLED the workers' runs whose command is over: with it went its tasks."""
    running = [run for run in search(experiment_id, _RUNNING) if TASK in run.tags]
    over = {p: _is_over(p) for p in {run.tags.get(PARENT, "") for run in running}}
    left = [run for run in running if over[run.tags.get(PARENT, "")]]
    return _close(left, "its worker ended with the command, without ending it")


_RUNNING = "attributes.status = 'RUNNING'"


def _is_over(run_id: str) -> bool:
    try:
        return get_run(run_id).status != "RUNNING"
    except TrackingError:
        return False  # nothing is known of it


def _close(runs: list[RunView], why: str) -> int:
    return sum(end_left(run.run_id, why) for run in runs)


def end_left(run_id: str, why: str) -> bool:
    """End as KILLED a run that was left RUNNING; whether it was, since it may have come to its own
    end after it was found.
    """
    if get_run(run_id).status != "RUNNING":
        return False
    with stored(f"the end of run {run_id}"):
        MlflowClient().log_batch(run_id, tags=[RunTag("failure", why)])
        MlflowClient().set_terminated(run_id, "KILLED")
    return True
