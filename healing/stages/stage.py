"""What a stage is to the driver, and what a run of it leaves."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from healing import progress
from healing.config.fingerprint import as_params
from healing.config.shared import RAW_DATA
from healing.stages.cells.events import Events, Record
from healing.tracking.run import Run
from healing.tracking.snapshots import Saving
from healing.tracking.store import Store

C = TypeVar("C")
R = TypeVar("R")


@dataclass(frozen=True)
class Report:
    """What is said of a finished cell.

    Attributes:
        points: (step, metrics) to log, as they are.
        tags: Statuses and verdicts.
        markdown: The run's description.
        line: For the terminal.
        detail: Whether the line is only for those who asked for more.
        result: What a caller in Python gets; never a model, since a sweep has many.
    """

    points: Sequence[tuple[int, Mapping[str, float]]]
    tags: Mapping[str, Any]
    markdown: str
    line: str
    detail: bool = False
    result: Any = None


@dataclass(frozen=True)
class Done:
    """A cell that is over.

    Attributes:
        run_id: Of its run, or of the finished one that was found.
        folder: Its local folder; of a run that was found it may be gone.
        report: ``None`` where it was found.
    """

    run_id: str
    folder: pathlib.Path
    report: Report | None = None

    @property
    def reused(self) -> bool:
        """Whether it had been run before."""
        return self.report is None


@dataclass(frozen=True)
class Tools:
    """What a stage may use while it prepares.

    Attributes:
        store: Stored runs and their files.
        first: Runs a cell that has to come first, or finds it again; it becomes a child.
    """

    store: Store
    first: Callable[[Any, Any], Done]


def points_of(records: Sequence[Record]) -> list[tuple[int, dict[str, float]]]:
    """Records as figures take them: (step, metrics)."""
    return [(record.step, dict(record.metrics)) for record in records]


class Stage(Protocol[C, R]):
    """One stage: from a configuration to a run.

    Attributes:
        name: Value of the tag ``stage`` and prefix of the parameters.
        place: Folder below ``output_dir`` that holds a folder per run.
        keeps_folder: What is in a run's folder stays there, and nothing of the driver's goes in: it
            holds something that is used for itself (a trained model).
        artifacts: Folder of the run's artifacts that its files go to; ``None`` = the top.
    """

    name: str
    place: str
    keeps_folder: bool
    artifacts: str | None

    def title(self, config: C) -> str:
        """Name of the run; also of one that is not prepared yet."""

    def tags(self, config: C) -> Mapping[str, Any]:
        """Tags known before anything is loaded."""

    def params(self, config: C) -> Mapping[str, Any]:
        """Parameters, once prepared."""

    def output_dir(self, config: C) -> str:
        """Where local folders go."""

    def saving(self, config: C) -> Saving:
        """How often the state is kept, so that a run that is cut can go on."""

    def prepare(self, config: C, tools: Tools) -> C:
        """Everything that reads or writes before the cell: downloads, cells that come first."""

    def cell(self, config: C) -> Events[R]:
        """The computation; pure."""

    def store(
        self, outcome: R, records: Sequence[Record], folder: pathlib.Path, run_id: str
    ) -> Report:
        """Write the files of a finished cell; its model is let go afterwards."""


class StageDefaults:
    """What most stages share: one folder per run below the raw data, the configuration as it is."""

    place: str = RAW_DATA
    keeps_folder: bool = False
    artifacts: str | None = None

    def params(self, config: Any) -> Mapping[str, Any]:
        """The configuration's fields."""
        return as_params(config)

    def output_dir(self, config: Any) -> str:
        """As configured."""
        directory: str = config.output_dir
        return directory

    def saving(self, config: Any) -> Saving:
        """As configured, where it is; else only where the run is told to stop."""
        return Saving(
            getattr(config, "checkpoint_interval", 0), getattr(config, "checkpoint_minutes", 0.0)
        )


def upload(run: Run, folder: pathlib.Path, artifacts: str | None = None) -> None:
    """Store every file of a local folder as artifacts, in the same layout."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in progress.phase("uploading", files, len(files)):
        parent = path.parent.relative_to(folder).as_posix()
        parts = [part for part in (artifacts, parent) if part and part != "."]
        run.artifact(path, "/".join(parts) or None)
