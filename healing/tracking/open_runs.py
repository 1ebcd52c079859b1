"""Runs of MLflow, opened and ended with their status and reason.

A stage asks for a run with :func:`start`, logs through the returned
:class:`~healing.tracking.run_logger.RunLogger`, and never sees an MLflow type. A run that leaves
its context by an exception is FAILED with the reason as a tag; what was logged before stays.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
from mlflow.entities import RunTag
from mlflow.tracking import MlflowClient
from mlflow.tracking.context.registry import resolve_tags

from healing.errors import OutageError, OutputError, TrackingError
from healing.tracking.git_version import code_version, environment
from healing.tracking.output_folder import require_writable
from healing.tracking.page_text import origin, said
from healing.tracking.processes import this_process
from healing.tracking.run import Run as OpenRun
from healing.tracking.run_logger import RunLogger, now_ms
from healing.tracking.sending.heartbeat import Heart, beat
from healing.tracking.sending.outbox import Outbox, Request
from healing.tracking.sending.requests import CREATE, JOIN, Messenger, create
from healing.tracking.sending.sender import BLOCKING_SECONDS, Sender
from healing.tracking.sending.store_errors import (
    UNREACHED,
    deleted,
    is_refused_by_name,
    may_be_freed,
    one_line,
    restore_experiment,
    shown,
    store_address,
)

DEFAULT_EXPERIMENT = "llm-healing"
OPENING_SECONDS = {"http": 10.0, "": 120.0}
"""Waited for a store's first answer: a server has one, a database file is made first."""
STOPPING_SECONDS = 2.0
"""That a run which was told to stop waits for a store that is away."""
PROCESS = "process"
"""Tag that says whose run it is, as long as it runs and afterwards."""


def _own_process() -> dict[str, str]:
    return {PROCESS: this_process().text(), **beat()}


_HEART = Heart()


_OPENING = threading.Lock()
_OPEN: dict[str, RunLogger] = {}
"""Runs under way in this process: a signal that cannot wait ends them."""


def abandon_open_runs(why: str) -> None:
    """End every open run of this process as KILLED; the newest first, since they are children."""
    loggers = list(reversed(_OPEN.values()))
    for logger in loggers:
        logger.abandon(why)
    for sender in {id(logger.sender): logger.sender for logger in loggers}.values():
        with contextlib.suppress(TrackingError, OutputError):
            sender.close(patience=1.0)


@contextlib.contextmanager
def _ended(logger: RunLogger, end_ms: int | None = None) -> Iterator[None]:
    """Send what is held back and end the run: FINISHED, or with the reason why the block failed,
    which a store that cannot be reached does not replace.
    """
    with _OPENING:
        _OPEN[logger.run_id] = logger
    try:
        try:
            with _HEART.beats_for(logger):
                yield
        finally:
            logger.stop_system_metrics()
        logger.flush()
    except BaseException as error:
        if not logger.abandoned:
            logger.failed(error)
            with contextlib.suppress(TrackingError, OutputError):
                logger.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    finally:
        with _OPENING:
            _OPEN.pop(logger.run_id, None)
    logger.end("FINISHED", end_ms)
    logger.sender.settle()


@contextlib.contextmanager
def _sending(
    keep: pathlib.Path | None, say: Callable[[str], None]
) -> Iterator[tuple[Messenger, Sender]]:
    """A sender for the block; at its end everything is sent, or on disk.

    Raises:
        OutageError: The store did not come back. What the block raised goes before it.
    """
    messenger = Messenger()
    if keep is not None:
        try:
            require_writable(str(keep.parent))
        except OutputError:
            keep = None  # the stage says so, in a run that can be recorded
    outbox = Outbox.of_this_process(keep, store_address()) if keep else None
    sender = Sender(messenger, outbox, say)
    try:
        yield messenger, sender
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        try:
            sender.close(STOPPING_SECONDS if stopped else None)
        except (TrackingError, OutputError) as outage:
            say(f"warning: {outage}")
        raise
    sender.close()


@contextlib.contextmanager
def start(
    name: str,
    tags: Mapping[str, Any],
    *,
    experiment: str = "",
    keep: pathlib.Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Iterator[RunLogger]:
    """The outermost run of a process: FINISHED when the block ends well, else FAILED (KILLED by
    Ctrl-C) with the reason in the tag ``failure``.

    Under ``mlflow run`` it is the run that MLflow made; otherwise a new one in the experiment of
    ``MLFLOW_EXPERIMENT_NAME`` (default ``llm-healing``). MLflow's active run and experiment, and
    the environment but for ``MLFLOW_RUN_ID``, are left as they are.

    Args:
        name: Shown in the UI.
        tags: At least ``stage``.
        experiment: Where the run goes, whatever the environment says; made where there is none.
        keep: Folder of what a store that is away could not be told; ``None`` = nowhere: it has to
            be there at the start.
        say: Told when the store goes and comes back.

    Raises:
        TrackingError: The store refuses the run, or cannot be reached and nothing is kept.
        OutageError: At the end: the store did not come back.
    """
    given = "" if experiment else os.environ.pop("MLFLOW_RUN_ID", "")
    by_id = "" if experiment else os.environ.get("MLFLOW_EXPERIMENT_ID", "")
    named = experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME", DEFAULT_EXPERIMENT)
    place = {"id": by_id} if by_id else {"name": named}
    own = said({**tags, **environment(), **_own_process()})
    with _sending(keep, say) as (messenger, sender):
        if given:
            logger = _opened(messenger, sender, Request(given, JOIN), place, name, own)
        else:
            local, all_tags = uuid.uuid4().hex, resolve_tags(own)
            all_tags |= code_version(all_tags)
            request = create(local, place, name, all_tags, now_ms())
            logger = _opened(messenger, sender, request, place, name, all_tags)
        with _ended(logger):
            if given:
                own |= code_version(logger.told.tags)
                logger.tags({"mlflow.runName": name, **own})  # `mlflow run` names it at random
            yield logger


def _opened(
    messenger: Messenger,
    sender: Sender,
    request: Request,
    place: Mapping[str, str],
    name: str,
    tags: Mapping[str, str],
) -> RunLogger:
    """Open the process' own run; without a store that answers if what it is told is kept.

    Raises:
        TrackingError: The store refuses, or is away for a reason that time does not mend.
    """
    uri = mlflow.get_tracking_uri()
    kind = "http" if uri.startswith("http") else ""
    try:
        sender.put(request, patience=OPENING_SECONDS[kind], outlasts=kind == "http")
        away = sender.away
        if away and not (sender.keeps and _may_come_back(uri, away)):
            raise away
    except TrackingError as error:
        sender.forget()
        if "is deleted in" in str(error):
            raise _deleted(request, place) from error
        if "id" in place and f"No Experiment with id={place['id']} exists" in str(error):
            raise TrackingError(
                f"MLFLOW_EXPERIMENT_ID is {place['id']}, which {shown(uri)} does not have (another "
                "store's?): unset it, or set it to one of `mlflow experiments search`"
            ) from error
        if is_refused_by_name(error):
            raise TrackingError(
                f"{_asked_for(request, place)} cannot be used with {shown(uri)} ({error.reason}): "
                "unset it, or set it to what is there (`mlflow experiments search`, `mlflow runs "
                "list`)"
            ) from error
        said = error.reason if error.cure else one_line(error)[:300]
        todo = error.cure or "check MLFLOW_TRACKING_URI"
        raise type(error)(
            f"MLflow store {' '.join(shown(uri).split())} cannot be used ({said}): {todo}",
            said,
            error.cure,
        ) from error
    known = messenger.experiment_id(request.run)
    experiment = {"id": known} if known else place
    run_id = messenger.run_id(request.run)
    is_local = request.kind == CREATE and run_id == request.run
    params, given = messenger.joined.get(request.run, ({}, {}))
    logger = RunLogger(run_id, experiment, sender, name, {**given, **tags}, is_local=is_local)
    logger.told.params |= params
    return logger


def _asked_for(request: Request, place: Mapping[str, str]) -> str:
    """The variable that says where a run goes, as it is set."""
    if request.kind == JOIN:
        return f"MLFLOW_RUN_ID={request.run[:40]!r}"
    key = "id" if "id" in place else "name"
    return f"MLFLOW_EXPERIMENT_{key.upper()}={place[key][:40]!r}"


def _deleted(request: Request, place: Mapping[str, str]) -> TrackingError:
    """Of the run that ``mlflow run`` made, or of the experiment that a new one goes to."""
    if request.kind == JOIN:
        restore = f"runs restore --run-id {request.run}"
        return TrackingError(f"run {request.run} {deleted(restore)}, and start again")
    named = place.get("name") or place["id"]
    return TrackingError(
        f"experiment {named!r} {deleted(restore_experiment(named))}, or set "
        "MLFLOW_EXPERIMENT_NAME to another"
    )


def _may_come_back(uri: str, error: OutageError) -> bool:
    """A server may; a file is there or not, unless another program has it or its disk is full."""
    return not uri.startswith(("sqlite:", "file:", "/", ".")) or may_be_freed(error)


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

    Children of one parent may run in several threads.

    Args:
        parent: The run above; of :func:`start` or this function.
        name: Shown in the UI.
        tags: At least ``stage``.
        start_ms: When it began, milliseconds since the epoch; ``None`` = now.
        end_ms: When it ended well; ``None`` = when the block ends.
    """
    assert isinstance(parent, RunLogger), "a child has a parent of the same store"
    # What was recorded earlier is nobody's, and ran with other versions.
    own = {**environment(), **_own_process()} if end_ms is None else {}
    by_whom = origin(parent.told.tags) or resolve_tags()
    system = {"mlflow.parentRunId": parent.run_id, **by_whom}
    texts = said({**system, **tags, **own})
    texts |= code_version(texts)
    local, sender = uuid.uuid4().hex, parent.sender
    request = create(
        local, parent.experiment, name, texts, now_ms() if start_ms is None else start_ms
    )
    sender.put(request, patience=BLOCKING_SECONDS)
    run_id = sender.run_id(local)
    logger = RunLogger(run_id, parent.experiment, sender, name, texts, is_local=run_id == local)
    with _ended(logger, end_ms):
        yield logger


@dataclass(frozen=True)
class Above:
    """A run that another process has: what is needed to make children of it.

    Attributes:
        run_id: MLflow's id.
        experiment_id: MLflow's id.
        name: Shown in the UI.
        tags: That its children share: who ran what.
    """

    run_id: str
    experiment_id: str
    name: str
    tags: Mapping[str, str]

    @classmethod
    def of(cls, run: OpenRun) -> Above | None:
        """A run of this process; ``None`` where the store does not have it."""
        if not isinstance(run, RunLogger) or run.is_local or not run.experiment_id:
            return None
        return cls(run.run_id, run.experiment_id, run.told.name, origin(run.told.tags))


@contextlib.contextmanager
def below(
    above: Above, *, keep: pathlib.Path, say: Callable[[str], None] = lambda text: None
) -> Iterator[RunLogger]:
    """A run that another process has open, to make children of it here: it is neither begun nor
    ended.

    Args:
        above: The run.
        keep: As of :func:`start`.
        say: As of :func:`start`.

    Raises:
        OutageError: At the end: the store did not come back.
    """
    with _sending(keep, say) as (_, sender):
        yield RunLogger(above.run_id, {"id": above.experiment_id}, sender, above.name, above.tags)


def mark_failed(reason: str) -> None:
    """Tag the run that ``mlflow run`` made with the reason why nothing could start in it."""
    if "MLFLOW_RUN_ID" in os.environ:
        run_id = os.environ["MLFLOW_RUN_ID"]
        tags = {"failure": reason, "failure_type": "ConfigError"}
        with contextlib.suppress(*UNREACHED):  # the reason itself is shown to the user anyway
            MlflowClient().log_batch(run_id, tags=[RunTag(k, v) for k, v in tags.items()])
