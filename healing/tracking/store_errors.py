"""What a tracking store refuses, as one line each with its cause and cure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import mlflow
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from healing.errors import TrackingError


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 2,000 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:2000]


UNREACHED = (MlflowException, OSError)
"""What MLflow's clients raise where a store, a server or a disk does not take what is sent."""


def says_deleted(error: Exception) -> bool:
    """Whether a store refuses because an experiment or run is deleted there."""
    return isinstance(error, MlflowException) and bool(re.search(r"\bdeleted\b", str(error)))


def deleted(restore: str) -> str:
    """What to do about something that is deleted."""
    return f"is deleted in {mlflow.get_tracking_uri()}: restore it with `mlflow {restore}`"


def restore_experiment(name_or_id: str) -> str:
    """The command, with the id where the store still knows the name."""
    found = None
    with contextlib.suppress(MlflowException):
        found = MlflowClient().get_experiment_by_name(name_or_id)
    return f"experiments restore --experiment-id {found.experiment_id if found else name_or_id}"


@contextlib.contextmanager
def stored(what: str, restore: str = "") -> Iterator[None]:
    """Turn a store's refusal into one line.

    Args:
        what: Is stored.
        restore: MLflow's command that brings back what it belongs to.

    Raises:
        TrackingError: What could not be stored, where, why, and what to do.
    """
    try:
        yield
    except UNREACHED as error:
        if restore and says_deleted(error):
            raise TrackingError(
                f"{what} could not be stored, since what it belongs to {deleted(restore)}, and "
                "start again; the files written so far stay in the run's local folder"
            ) from error
        raise TrackingError(
            f"{what} could not be stored in {mlflow.get_tracking_uri()} "
            f"({one_line(error)[:300]}): make that store reachable and writable, or set "
            "MLFLOW_TRACKING_URI to another, and start again; the files written so far stay in "
            "the run's local folder"
        ) from error


def require_active(experiment: Experiment | None) -> None:
    """Refuse an experiment that is deleted: a store still finds it by its name.

    Raises:
        TrackingError: With the command that restores it.
    """
    if experiment is not None and experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise TrackingError(
            f"experiment {experiment.name!r} is deleted in {mlflow.get_tracking_uri()}: restore it "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`, or "
            "name another"
        )
