"""What a run under way can be told."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from healing.tracking.sending.logged_models import ModelFiles


class Run(Protocol):
    """A run that is under way. Every method may raise ``TrackingError``."""

    run_id: str

    @property
    def experiment_id(self) -> str:
        """Of the experiment it is in; empty where the store did not say it yet."""

    def params(self, prefix: str, values: Mapping[str, Any]) -> None:
        """Log parameters as ``prefix.name``; the shared ones under their bare name too."""

    def n_params(self, count: int, name: str = "n_params") -> None:
        """Log a number of parameters under its bare name."""

    def tags(self, values: Mapping[str, Any], *, later: bool = False) -> None:
        """Set tags; ``later``: with what is sent next."""

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """Log the metrics of one step."""

    def history(self, points: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Log the metrics of many steps."""

    def flush(self) -> None:
        """Send what is still held back."""

    def describe(self, markdown: str) -> None:
        """Set the description."""

    def artifact(self, path: pathlib.Path, folder: str | None = None) -> None:
        """Store one file."""

    def rescue(self, *paths: pathlib.Path) -> None:
        """Name files that are stored even if the run fails."""

    def dataset(self, name: str, digest: str, context: str, facts: Mapping[str, Any]) -> None:
        """Record an input by name and content digest."""

    def image(self, key: str, step: int, picture: Any) -> None:
        """Store one picture (PIL) of a series that is shown by step."""

    def table(self, name: str, columns: Mapping[str, Sequence[Any]]) -> None:
        """Store a table that is compared over runs: column → cells, all of one length."""

    def model(self, model: ModelFiles) -> None:
        """Keep a model with the run's final numbers."""

    def system_metrics(self) -> None:
        """Log the load of the machine until the run ends."""
