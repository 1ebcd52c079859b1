"""What a tracking store refuses, as one line each with its cause and cure."""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import os
import pathlib
import re
import sqlite3
import urllib.parse
from collections.abc import Callable, Iterator

import mlflow
from mlflow.entities import Experiment, LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from healing.errors import OutageError, TrackingError

LOGIN = re.compile(r"(?<=://)[^/\s]*@")
"""User and password of an address."""
_ANSWERED = re.compile(r"error code (\d+) != 200\. Response body: '(.*)'", re.DOTALL)


_QUERY = re.compile(r"(?<=[?&])(\w*password)=[^&\s]*", re.IGNORECASE)


def shown(address: str) -> str:
    """A store's address without the password in it."""
    address = _QUERY.sub(r"\1=***", address)
    try:
        found = make_url(address)
    except (ArgumentError, ValueError):
        return LOGIN.sub("***@", address)
    return address if found.password is None else found.render_as_string(hide_password=True)


def store_address() -> str:
    """Of the store that MLflow is set to, as it may be shown and kept."""
    return shown(mlflow.get_tracking_uri())


def one_line(error: BaseException) -> str:
    """What an error says, on one line of at most 2,000 characters, without logins."""
    text = str(error).replace(mlflow.get_tracking_uri(), store_address())
    text = _QUERY.sub(r"\1=***", LOGIN.sub("***@", text))
    text = " ".join(text.split()) or type(error).__name__
    return text[:2000]


UNREACHED = (MlflowException, OSError, ImportError, json.JSONDecodeError)
"""What MLflow's clients raise where a store, a server or a disk does not take what is sent, a
library for it is missing, or somebody else answers, as with a page to log in.
"""
LIBRARIES = ("sqlalchemy", "botocore", "boto3", "s3transfer", "google", "azure")
"""Their errors come through MLflow as they are."""


def is_of_a_store(error: BaseException) -> bool:
    """Whether MLflow's clients, or a library below them, failed, and not this program."""
    return isinstance(error, UNREACHED) or _library(error) in LIBRARIES


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


TEMPORARY = (408, 425, 429, 499)
DENIED = (401, 403)
"""HTTP statuses that may be others later."""


def is_away(error: BaseException) -> bool:
    """Whether a store does not take anything now, and may later: it cannot be reached, is
    overloaded or locked, its disk is full. What it will never take is refused.
    """
    if says_deleted(error) or isinstance(error, FileNotFoundError):
        return False
    status = http_status(error)
    return status is None or status >= 500 or status in (*TEMPORARY, *DENIED)


def http_status(error: BaseException) -> int | None:
    """What a server answered, or would have; ``None`` where there was no answer."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code()
    answer = getattr(error, "response", None)  # of a file's upload
    if isinstance(answer, dict):  # as botocore has it
        return answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    cause = error.__cause__ or error.__context__
    if answer is None and cause is not None and _library(error) in LIBRARIES:
        return http_status(cause)  # boto3 says that an upload failed, and botocore why
    status = getattr(answer, "status_code", None)
    return None if status is None else int(status)


def reason(error: BaseException) -> str:
    """What a store said: of a server's answer only status and text, of a database's only that."""
    if own := _database_error(error):
        return one_line(own)[:300]
    answered = _ANSWERED.search(str(error))
    said = f"{answered[1]}: {' '.join(answered[2].split())}" if answered else one_line(error)
    return said[:300]


def _database_error(error: BaseException) -> BaseException | None:
    """What the database itself raised: around it stand the statement and its values."""
    for known in (error, error.__cause__):
        own = getattr(known, "orig", None)
        if known is not None and _library(known) == "sqlalchemy" and own is not None:
            return own if isinstance(own, BaseException) else None
    return None


PACKAGES = {
    "psycopg2": "psycopg2-binary", "psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient",
    "azure": "azure-storage-blob", "google": "google-cloud-storage",
}  # fmt: skip
"""Module that MLflow needs for a store → what is installed for it, where the names differ."""


def cure(error: BaseException) -> str:
    """What the user has to do, where the error says it: a login, a library; else empty."""
    causes = [error, *filter(None, (error.__cause__, error.__context__))]
    if isinstance(error, ImportError):
        name = (error.name or "").partition(".")[0]
        return f"install what this store needs: `pip install {PACKAGES.get(name, name)}`"
    names = {type(e).__name__ for e in causes if _library(e) == "botocore"}
    if names and (http_status(error) in DENIED or names & NO_CREDENTIALS):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to those of a user "
            "who may write there, and MLFLOW_S3_ENDPOINT_URL where the store is not Amazon's"
        )
    if "mlflow migrate-filestore" in str(error):
        return (
            "set MLFLOW_TRACKING_URI to a database, as sqlite:///mlflow.db; `mlflow "
            "migrate-filestore` moves the runs of a folder there"
        )
    if http_status(error) not in DENIED:
        return ""
    if "Host header" in str(error):
        return "have the server started with this host and port in --allowed-hosts"
    who = "whom it knows" if http_status(error) == 401 else "who may do that"
    return (
        "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (or MLFLOW_TRACKING_TOKEN) to "
        f"those of a user {who}"
    )


NO_CREDENTIALS = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}
"""Of botocore: it has nobody to ask as."""


def is_refused_by_name(error: TrackingError) -> bool:
    """Whether a store is there and has no experiment or run of a name or id, or takes none such."""
    cause = error.__cause__
    codes = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST")
    return isinstance(cause, MlflowException) and cause.error_code in codes


FREED = ("is locked", "disk is full", "No space left", "quota exceeded")
"""What is said of a database, or of files, that take nothing now and may later."""


def may_be_freed(error: BaseException) -> bool:
    """Whether a store that is a file is there, and another program has it or its disk is full."""
    return any(said in str(error) for said in FREED)


def _todo(error: BaseException) -> str:
    """What is to be done where :func:`cure` knows nothing better."""
    if may_be_freed(error) and "is locked" not in str(error):
        return "make that store writable: free some of the disk that it lies on"
    return "make that store reachable and writable, or set MLFLOW_TRACKING_URI to another"


_IN_MEMORY = (None, "", ":memory:")
_HOST = re.compile(r"[\w.:%-]+")


def _unusable(uri: str) -> tuple[str, str]:
    """Why no store can be at an address, and what to do; empty where there may be one. MLflow goes
    on trying for minutes to open a file that is none.
    """
    if not uri.isprintable():
        return "it holds characters that no address has", "set MLFLOW_TRACKING_URI to another"
    if uri.startswith("sqlite:"):
        try:
            database = make_url(uri).database
        except (ArgumentError, ValueError):
            return "", ""
        if database in _IN_MEMORY or database is None:
            problem = "it is in memory alone, and gone with this process"
            return problem, "set MLFLOW_TRACKING_URI to a file, as sqlite:///mlflow.db"
        return _no_database(database), "set MLFLOW_TRACKING_URI to another file"
    if not uri.startswith(("http:", "https:")):
        return "", ""
    todo = "set MLFLOW_TRACKING_URI to http://HOST:PORT"
    try:
        parts = urllib.parse.urlsplit(uri)
        port, host = parts.port, parts.hostname or ""
        host.encode("idna")
    except ValueError as error:
        return " ".join(str(error).split())[:100], todo
    return ("", "") if _HOST.fullmatch(host) and port != 0 else ("it names no host or port", todo)


def _no_database(path: str) -> str:
    """Why a file can be no database of SQLite; empty where it is one, or can become one."""
    try:
        if not os.path.lexists(path):
            above = next(p for p in pathlib.Path(path).absolute().parents if p.exists())
            is_open = above.is_dir() and os.access(above, os.W_OK)
            return "" if is_open else f"{above} is no folder that can be written"
        with contextlib.closing(sqlite3.connect(path, timeout=0.0)) as database:
            database.execute("pragma schema_version")
    except sqlite3.OperationalError as error:
        return "" if "unable to open" not in str(error) else "it cannot be opened as a file"
    except (sqlite3.Error, OSError, ValueError) as error:
        return " ".join(str(error).split())[:100]
    return ""


_FOUND_GOOD: set[str] = set()


def require_address() -> None:
    """Refuse an address that MLflow would fail at in its own way, or keep nothing at.

    Raises:
        TrackingError: The store's is one.
    """
    uri = mlflow.get_tracking_uri()
    if uri in _FOUND_GOOD:
        return
    problem, todo = _unusable(uri)
    if problem:
        place = " ".join(shown(uri)[:200].split())
        text = f"MLflow store {place} cannot be used ({problem}): {todo}"
        raise TrackingError(text, problem, todo)
    _FOUND_GOOD.add(uri)


_TOLD = contextvars.ContextVar("_TOLD", default=False)


def _not_told(record: logging.LogRecord) -> bool:
    """Whether MLflow has something to say that this program does not say in one line."""
    return not (_TOLD.get() and record.exc_info)


# It prints the traceback of every statement that a database does not take, before it raises it.
logging.getLogger("mlflow.store.db.utils").addFilter(_not_told)


@contextlib.contextmanager
def _told_in_one_line() -> Iterator[None]:
    """What fails in the block is raised here; MLflow need not print it beside.

    Raises:
        TrackingError: The store's address cannot be one.
    """
    require_address()
    token = _TOLD.set(True)
    try:
        yield
    finally:
        _TOLD.reset(token)


def outage(text: str, error: BaseException) -> TrackingError:
    """The error of a store that does not take something: of an outage, or a refusal.

    Args:
        text: What a person reads.
        error: As MLflow raised it.
    """
    said = reason(error), cure(error)
    if not is_away(error):
        return TrackingError(text, *said)
    away = OutageError(text, *said)
    away.denied = bool(away.cure)
    return away


@contextlib.contextmanager
def asked(what: Callable[[str], str]) -> Iterator[None]:
    """Turn a failed question to a store into one line.

    Args:
        what: Makes the line of what the store said.

    Raises:
        TrackingError: The line; where the user has to do something first, that.
    """
    try:
        with _told_in_one_line():
            yield
    except Exception as error:
        if not is_of_a_store(error):
            raise
        text = what(reason(error))
        if todo := cure(error):
            text = f"MLflow store {store_address()} cannot be asked ({reason(error)}): {todo}"
        raise outage(text, error) from error


AGAIN = ", and start again"
"""After it an error says what only a run that has ended needs."""


def short(error: Exception) -> str:
    """What could not be stored and why; what to do about it where that is for the user."""
    what, _, _ = one_line(error).partition(": make that store")
    return what.partition(AGAIN)[0][:600]


def says_deleted(error: BaseException) -> bool:
    """Whether a store refuses because an experiment or run is deleted there."""
    return isinstance(error, MlflowException) and bool(re.search(r"\bdeleted\b", str(error)))


def deleted(restore: str) -> str:
    """What to do about something that is deleted."""
    return f"is deleted in {store_address()}: restore it with `mlflow {restore}`"


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
        with _told_in_one_line():
            yield
    except Exception as error:
        if not is_of_a_store(error):
            raise
        if restore and says_deleted(error):
            raise TrackingError(
                f"{what} could not be stored, since what it belongs to {deleted(restore)}, and "
                "start again; the files written so far stay in the run's local folder"
            ) from error
        todo = cure(error) or _todo(error)
        raise outage(
            f"{what} could not be stored in {store_address()} ({reason(error)}): {todo}, and "
            "start again; the files written so far stay in the run's local folder",
            error,
        ) from error


def require_active(experiment: Experiment | None) -> None:
    """Refuse an experiment that is deleted: a store still finds it by its name.

    Raises:
        TrackingError: With the command that restores it.
    """
    if experiment is not None and experiment.lifecycle_stage == LifecycleStage.DELETED:
        raise TrackingError(
            f"experiment {experiment.name!r} is deleted in {store_address()}: restore it "
            f"with `mlflow experiments restore --experiment-id {experiment.experiment_id}`, or "
            "name another"
        )
