"""What a tracking store refuses, as one line each with its cause and cure."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import mlflow
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from healing.errors import OutageError, TrackingError


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 2,000 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:2000]


UNREACHED = (MlflowException, OSError)
"""What MLflow's clients raise where a store, a server or a disk does not take what is sent."""


TEMPORARY = (408, 425, 429, 499)
DENIED = (401, 403)
"""HTTP statuses that may be others later."""


def is_away(error: Exception) -> bool:
    """Whether a store does not take anything now, and may later: it cannot be reached, is
    overloaded or locked, its disk is full. What it will never take is refused.
    """
    if says_deleted(error) or isinstance(error, FileNotFoundError):
        return False
    status = http_status(error)
    return status is None or status >= 500 or status in (*TEMPORARY, *DENIED)


def http_status(error: Exception) -> int | None:
    """What a server answered, or would have; ``None`` where there was no answer."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    answer = getattr(error, "response", None)  # of a file's upload
    return None if answer is None else int(answer.status_code)


def outage(text: str, error: Exception) -> TrackingError:
    """The error of a store that does not take something: of an outage, or a refusal."""
    if not is_away(error):
        return TrackingError(text)
    away = OutageError(text)
    away.denied = http_status(error) in DENIED
    return away


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
        TrackingError: What could not be stored, where, why, and what to do; an
            :class:`OutageError` where the store may take it later.
    """
    try:
        yield
    except UNREACHED as error:
        if restore and says_deleted(error):
            raise TrackingError(
                f"{what} could not be stored, since what it belongs to {deleted(restore)}, and "
                "start again; the files written so far stay in the run's local folder"
            ) from error
        raise outage(
            f"{what} could not be stored in {mlflow.get_tracking_uri()} "
            f"({one_line(error)[:300]}): make that store reachable and writable, or set "
            "MLFLOW_TRACKING_URI to another, and start again; the files written so far stay in "
            "the run's local folder",
            error,
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
