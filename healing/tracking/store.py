"""Where runs are kept: MLflow's store, or nothing beyond the local folders.

A stage asks a :class:`Store` for runs and never sees an MLflow type.
"""

from __future__ import annotations

import contextlib
import pathlib
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar

from healing.errors import OutageError
from healing.tracking import open_runs, queries
from healing.tracking.open_runs import Above
from healing.tracking.queries import RunView
from healing.tracking.run import Run
from healing.tracking.run_logger import RunLogger
from healing.tracking.sending.left_behind import Background
from healing.tracking.sending.left_running import LeftRunning, Listener, close_gone_on_with
from healing.tracking.sending.outbox import PLACE
from healing.tracking.sending.sender import BLOCKING_SECONDS, Sender
from healing.tracking.sending.waiting import answer
from healing.tracking.sending.workers import finished_views
from healing.tracking.ui import experiment_page, links

T = TypeVar("T")
READING_SECONDS = 30.0
"""That a lookup between two computations waits for an answer: doing a cell again takes longer."""


class Store(Protocol):
    """Opens runs and finds them again."""

    @property
    def has_history(self) -> bool:
        """Whether trajectories of many runs can be asked for at once."""

    def start(
        self,
        name: str,
        tags: Mapping[str, Any],
        output: pathlib.Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> AbstractContextManager[Run]:
        """The outermost run of a process.

        Args:
            name: Shown to people.
            tags: At least ``stage``.
            output: Folder in which is kept what a store that is away could not be told.
            say: Told when the store goes and comes back.
        """

    def child(self, parent: Run, name: str, tags: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """A run nested below another."""

    def find_finished(
        self, experiment_id: str, fingerprint: str, below: Collection[str] | None = None
    ) -> RunView | None:
        """The newest finished run with this fingerprint, if there is one: of these parents, or
        (``None``) anywhere.
        """

    def look_ahead(
        self, experiment_id: str, models: Collection[str], wanted: Callable[[RunView], bool]
    ) -> None:
        """Find all finished runs of some models that are wanted, by one question for each model:
        none of them is asked for again, by its fingerprint or its id.
        """

    def known(self, key: str) -> RunView | None:
        """The newest finished run with this :data:`healing.tracking.queries.CELL_KEY` among those
        that :meth:`look_ahead` found, if there is one.
        """

    def cut_before(self, run: Run, stage: str, settings: Mapping[str, str]) -> list[RunView]:
        """Parents of the same command (stage and these parameters) that did not finish, since one
        that did; newest first.
        """

    def catch_up(self) -> None:
        """Wait until what earlier processes could not send is in the store, or stays here."""

    def under_way(self, experiment_id: str, fingerprint: str) -> RunView | None:
        """A run of another process with this fingerprint that is computed now, if there is one."""

    def close_left_running(
        self, experiment_id: str, say: Callable[[str], None] = lambda text: None
    ) -> list[str]:
        """End the runs whose process is gone; a line per run. Where that is not known yet, they are
        ended beside what follows, once it is: ``say`` has those lines.
        """

    def close_gone_on_with(self, run_id: str, by: str) -> list[str]:
        """End a run that another (``by``) goes on with, where its process could not; a line per
        run.
        """

    def get_run(self, run_id: str) -> RunView:
        """One run by id."""

    def run_of_model(self, uri: str) -> RunView:
        """The run that made a model: ``models:/m-…``, ``models:/NAME/VERSION`` or ``@ALIAS``."""

    def check_registry(self, name: str) -> None:
        """Refuse what the registry would not take as the name of a model; empty = none is meant."""

    def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
        """Local path of an artifact, below ``folder`` if one is given and it has to be fetched."""

    def share_view(self, experiment_id: str) -> str:
        """Store the experiment's views and description; the first view's address, empty where
        there is no UI.
        """

    def page_of(self, run: Run) -> str:
        """Address of a run's page, empty where there is no UI."""


class MlflowStore:
    """The tracking store that MLflow is set to.

    What this process told it is known here too: while the store is away, that is what there is.

    Args:
        experiment: Where the outermost run goes; empty = where MLflow puts it by itself.
        tags: Of every child, beside its own.
        finished: Fingerprint → finished run, as another process found them by
            :meth:`look_ahead`; what is not among them is looked for.
    """

    def __init__(
        self,
        experiment: str = "",
        *,
        tags: Mapping[str, Any] | None = None,
        finished: Mapping[str, RunView] | None = None,
    ) -> None:
        self._experiment = experiment
        self.tags, self._ahead = dict(tags or {}), dict(finished or {})
        self._by_key = queries.by_key(self._ahead.values())
        self._sender: Sender | None = None
        self._left: Background | None = None
        self._running: LeftRunning | None = None
        self.listener = Listener()
        self._own: dict[str, RunLogger] = {}
        self._going: list[RunLogger] = []
        self._ended: dict[str, list[RunLogger]] = {}
        self._lock = threading.Lock()

    @property
    def _is_away(self) -> bool:
        return self._sender is not None and self._sender.is_away

    @property
    def has_history(self) -> bool:
        """Whether the store can be asked for trajectories now."""
        return not self._is_away

    @contextlib.contextmanager
    def start(
        self,
        name: str,
        tags: Mapping[str, Any],
        output: pathlib.Path | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> Iterator[Run]:
        """As :func:`healing.tracking.open_runs.start`. What earlier processes left in the output
        folder is sent beside it; a lookup of something in it waits, as long as that goes on.
        """
        keep = output / PLACE if output else None
        opened = open_runs.start(name, tags, experiment=self._experiment, keep=keep, say=say)
        with opened as run, self._beside(run, output, say):
            yield run

    @contextlib.contextmanager
    def below(
        self, above: Above, output: pathlib.Path, say: Callable[[str], None]
    ) -> Iterator[Run]:
        """As :func:`healing.tracking.open_runs.below`, in an output folder of its own; otherwise as
        :meth:`start`.
        """
        with (
            open_runs.below(above, keep=output / PLACE, say=say) as run,
            self._beside(run, output, say),
        ):
            yield run

    @contextlib.contextmanager
    def _beside(
        self, run: RunLogger, output: pathlib.Path | None, say: Callable[[str], None]
    ) -> Iterator[None]:
        """What was left in the output folder is sent beside the block."""
        self._sender = run.sender
        self._remember(run)
        try:
            if output is not None and not run.sender.is_away:
                self._left = Background(output, say)
                self._left.wait(BLOCKING_SECONDS)
            yield
        finally:
            for beside in (self._left, self._running):
                if beside is not None:
                    beside.end()

    def catch_up(self) -> None:
        """Wait until what earlier processes left is in the store, as long as that goes on."""
        self._is_caught_up('"')  # any request

    def _is_caught_up(self, text: str) -> bool:
        """Whether nothing that was left speaks of something, after waiting for what does."""
        return self._left is None or self._left.is_over(text)

    def _remember(self, run: RunLogger) -> None:
        with self._lock:
            self._own[run.run_id] = run
            self._going.append(run)

    @contextlib.contextmanager
    def child(self, parent: Run, name: str, tags: Mapping[str, Any]) -> Iterator[Run]:
        """As :func:`healing.tracking.open_runs.child`."""
        with open_runs.child(parent, name, {**tags, **self.tags}) as run:
            self._remember(run)
            yield run

    def _ask(self, question: Callable[[], T], otherwise: Callable[[OutageError], T]) -> T:
        """Ask the store, or answer from what this process told it while it is away, or gives no
        answer for :data:`READING_SECONDS`.
        """
        gone = self._sender.away if self._sender is not None else None
        if not self._is_away:
            keeps = self._sender is not None and self._sender.keeps
            try:
                return answer(question, READING_SECONDS if keeps else None)
            except OutageError as error:
                gone = error
        return otherwise(gone or OutageError("the tracking store gives no answer"))

    def _over(self, fingerprint: str) -> list[RunLogger]:
        """The finished runs of this process with a fingerprint. What is over is put where it is
        found by it, so that only runs under way are gone through.
        """
        with self._lock:
            going = []
            for run in self._going:
                if run.told.status == "FINISHED":
                    self._ended.setdefault(run.told.tags.get("fingerprint", ""), []).append(run)
                elif run.told.status == "RUNNING":
                    going.append(run)
            self._going = going
            return list(self._ended.get(fingerprint, ()))

    def find_finished(
        self, experiment_id: str, fingerprint: str, below: Collection[str] | None = None
    ) -> RunView | None:
        """As :func:`healing.tracking.queries.find_finished`; of this process' runs while the store
        is away.
        """
        own = [_view(run) for run in self._over(fingerprint)]
        own = [run for run in own if below is None or run.tags.get(queries.PARENT) in below]
        if own or not experiment_id:
            return own[-1] if own else None
        if below is None and fingerprint in self._ahead:
            return self._ahead[fingerprint]
        self._is_caught_up(fingerprint)
        return self._ask(
            lambda: queries.find_finished(experiment_id, fingerprint, below), lambda error: None
        )

    def look_ahead(
        self, experiment_id: str, models: Collection[str], wanted: Callable[[RunView], bool]
    ) -> None:
        """As :func:`healing.tracking.sending.workers.finished_views`; none while the store is away,
        or is still told of earlier runs: these are looked for one by one.
        """
        is_told = self._left is not None and not self._left.wait(0.0)
        if not experiment_id or is_told or self._is_away:
            return
        # However long it takes: many runs are many pages, and one by one they take longer.
        with contextlib.suppress(OutageError):
            self._ahead = finished_views(experiment_id, models, wanted)
        self._by_key = queries.by_key(self._ahead.values())

    def known(self, key: str) -> RunView | None:
        """By its key, without a question."""
        return self._by_key.get(key)

    def cut_before(self, run: Run, stage: str, settings: Mapping[str, str]) -> list[RunView]:
        """As :func:`healing.tracking.queries.cut_before`; none while the store is away."""
        if not run.experiment_id:
            return []
        return self._ask(
            lambda: queries.cut_before(run.experiment_id, run.run_id, stage, settings),
            lambda error: [],
        )

    def under_way(self, experiment_id: str, fingerprint: str) -> RunView | None:
        """As :meth:`healing.tracking.sending.left_running.Listener.find`; while the store is away,
        the one that was there before.
        """
        if not experiment_id:
            return None
        return self._ask(
            lambda: self.listener.find(experiment_id, fingerprint),
            lambda error: self.listener.last(fingerprint),
        )

    def stored_id(self, run_id: str) -> str:
        """The store's id of a run of this process that began while it was away; its own until the
        store has it.
        """
        return self._sender.run_id(run_id) if self._sender is not None else run_id

    def close_left_running(
        self, experiment_id: str, say: Callable[[str], None] = lambda text: None
    ) -> list[str]:
        """As :class:`healing.tracking.sending.left_running.LeftRunning` does, until the end of the
        process' run; none while the store is away, or is still told how earlier runs ended.
        """
        if not experiment_id or (self._left is not None and not self._left.wait(0.0)):
            return []
        self._running = LeftRunning(experiment_id, self.listener, say)
        return self._ask(self._running.close, lambda error: [])

    def close_gone_on_with(self, run_id: str, by: str) -> list[str]:
        """As :func:`healing.tracking.sending.left_running.close_gone_on_with`; none while the store
        is away.
        """
        if run_id in self._own:
            return []
        return self._ask(lambda: close_gone_on_with(run_id, by), lambda error: [])

    def get_run(self, run_id: str) -> RunView:
        """As :func:`healing.tracking.queries.get_run`."""

        def told(error: OutageError) -> RunView:
            if run_id not in self._own:
                raise error
            return _view(self._own[run_id])

        if run_id in self._own and self._own[run_id].is_local:
            return _view(self._own[run_id])
        if run_id not in self._own:
            self._is_caught_up(run_id)
        return self._ask(lambda: queries.get_run(run_id), told)

    def run_of_model(self, uri: str) -> RunView:
        """As :func:`healing.tracking.queries.run_of_model`."""

        def unanswered(error: OutageError) -> RunView:
            raise error

        return self._ask(lambda: queries.run_of_model(uri), unanswered)

    def check_registry(self, name: str) -> None:
        """As :func:`healing.tracking.queries.check_registry`; nothing while the store is away."""
        if name:
            self._ask(lambda: queries.check_registry(name), lambda error: None)

    def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
        """As :func:`healing.tracking.queries.download`; a file of this process' own runs is taken
        where it was written while the store is away.
        """
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        own = self._own.get(run_id)
        if own is not None and (self._is_away or own.is_local):
            found = own.told.files.get(path)
            if found is not None and found.is_file():
                return found
        if own is None and uri.startswith("runs:/"):
            self._is_caught_up(run_id)
        return queries.download(uri, folder)

    def share_view(self, experiment_id: str) -> str:
        """As :func:`healing.tracking.ui.experiment_page.page`, as a whole address; empty while it
        is away.
        """
        if self._is_away or not experiment_id:
            return ""
        return links.absolute(experiment_page.page(experiment_id))

    def page_of(self, run: Run) -> str:
        """As :func:`healing.tracking.ui.links.run_page`, as a whole address; empty while the store
        has no page of it.
        """
        if self._is_away or not run.experiment_id:
            return ""
        return links.absolute(links.run_page(run.experiment_id, run.run_id))


def _view(run: RunLogger) -> RunView:
    told = run.told
    return RunView(
        run.run_id, told.name, told.status, run.experiment_id, dict(told.params), dict(told.tags),
        dict(told.metrics),
    )  # fmt: skip
