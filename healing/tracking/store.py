"""Where runs are kept: MLflow's store, or nothing beyond the local folders.

A stage asks a :class:`Store` for runs and never sees an MLflow type.
"""

from __future__ import annotations

import pathlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

from healing.errors import TrackingError
from healing.tracking import queries, run_logger
from healing.tracking.queries import RunView
from healing.tracking.run import Run
from healing.tracking.ui import experiment_page, links


class Store(Protocol):
    """Opens runs and finds them again.

    Attributes:
        has_history: Whether trajectories of many runs can be asked for at once.
    """

    has_history: bool

    def start(self, name: str, tags: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """The outermost run of a process."""

    def child(self, parent: Run, name: str, tags: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """A run nested below another."""

    def find_finished(self, experiment_id: str, fingerprint: str) -> RunView | None:
        """The newest finished run with this fingerprint, if there is one."""

    def close_left_running(self, experiment_id: str) -> list[str]:
        """End the runs whose process is gone; a line per run."""

    def get_run(self, run_id: str) -> RunView:
        """One run by id."""

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

    Args:
        experiment: Where the outermost run goes; empty = where MLflow puts it by itself.
    """

    has_history = True

    def __init__(self, experiment: str = "") -> None:
        self._experiment = experiment

    def start(self, name: str, tags: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """As :func:`healing.tracking.run_logger.start`."""
        if self._experiment:
            return run_logger.start_in(self._experiment, name, tags)
        return run_logger.start(name, tags)

    def child(self, parent: Run, name: str, tags: Mapping[str, Any]) -> AbstractContextManager[Run]:
        """As :func:`healing.tracking.run_logger.child`; the parent's id is a tag too."""
        return run_logger.child(parent, name, {**tags, "parent": parent.run_id})

    def find_finished(self, experiment_id: str, fingerprint: str) -> RunView | None:
        """As :func:`healing.tracking.queries.find_finished`."""
        return queries.find_finished(experiment_id, fingerprint)

    def close_left_running(self, experiment_id: str) -> list[str]:
        """As :func:`healing.tracking.queries.close_left_running`."""
        return queries.close_left_running(experiment_id)

    def get_run(self, run_id: str) -> RunView:
        """As :func:`healing.tracking.queries.get_run`."""
        return queries.get_run(run_id)

    def download(self, uri: str, folder: str | None = None) -> pathlib.Path:
        """As :func:`healing.tracking.queries.download`."""
        return queries.download(uri, folder)

    def share_view(self, experiment_id: str) -> str:
        """As :func:`healing.tracking.ui.experiment_page.publish`, as a whole address; of all runs,
        where the store does not take the views: they are worth no run's failure.
        """
        try:
            page = experiment_page.publish(experiment_id)
        except TrackingError:
            page = links.runs_page(experiment_id)
        return links.absolute(page)

    def page_of(self, run: Run) -> str:
        """As :func:`healing.tracking.ui.links.run_page`, as a whole address."""
        return links.absolute(links.run_page(run.experiment_id, run.run_id))
