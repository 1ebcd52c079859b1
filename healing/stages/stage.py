"""What a stage is to the driver, and what a run of it leaves."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch

from healing import progress
from healing.config.fingerprint import as_params
from healing.config.options import AUTO, fields_of
from healing.config.paths import is_address, local_path
from healing.config.shared import RAW_DATA
from healing.errors import TrackingError
from healing.measurements.probe import Measurement
from healing.models.loading import LoadedModel, resolve_device
from healing.models.model_card import model_card
from healing.reporting.plots.layers import spectra_by_step
from healing.stages.cells.events import Begin, Events, Record
from healing.tracking.git_version import processor
from healing.tracking.queries import MODELS, RunView
from healing.tracking.run import Run
from healing.tracking.run_files import file_of_run
from healing.tracking.sending.logged_models import ModelFiles, write_model
from healing.tracking.snapshots import Saving
from healing.tracking.store import Store

C = TypeVar("C")
R = TypeVar("R")


def settled(config: Any) -> dict[str, Any]:
    """The fields of a resolved configuration that say what was used: those that nothing replaced,
    being another stage's or known only to the machine, still have their default ``auto``, and a
    parameter that is not there stands for its default. What the machine chose is ``used.…``.
    """
    defaults = {field.name: field.default for field, _, _ in fields_of(config)}
    values = as_params(config).items()
    return {name: v for name, v in values if v != AUTO or defaults[name] != AUTO}


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
        pictures: (name, step, picture) of series that are shown by step.
        tables: Name → column → cells, compared over runs.
        models: Written below the run's folder, to be kept as MLflow's models.
    """

    points: Sequence[tuple[int, Mapping[str, float]]]
    tags: Mapping[str, Any]
    markdown: str
    line: str
    detail: bool = False
    result: Any = None
    pictures: Sequence[tuple[str, int, Any]] = ()
    tables: Mapping[str, Mapping[str, Sequence[Any]]] = field(default_factory=dict)
    models: Sequence[ModelFiles] = ()


@dataclass(frozen=True)
class Done:
    """A cell that is over.

    Attributes:
        run_id: Of its run, or of the finished one that was found.
        folder: Its local folder; of a run that was found it may be gone, or another's.
        report: ``None`` where it was found.
        view: Of the run that was found, as it was then.
    """

    run_id: str
    folder: pathlib.Path
    report: Report | None = None
    view: RunView | None = None

    def file(self, name: str, store: Store) -> pathlib.Path:
        """Local path of one of its files: where it was written while that folder is this run's,
        else fetched. Another experiment's run of the same fingerprint has the same folder.

        Raises:
            TrackingError: The store does not have it either.
        """
        own = file_of_run(self.folder, self.run_id, name)
        return own or store.download(f"runs:/{self.run_id}/{name}")

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


def headlines(
    records: Sequence[Record], names: Sequence[str]
) -> list[tuple[int, dict[str, float]]]:
    """The numbers that matter once more, as ``headline/…``.

    MLflow sorts a run's charts by what stands before the ``/`` of their names, and puts those
    without one last.
    """
    return [
        (r.step, {f"headline/{n}": r.metrics[n] for n in names
                  if math.isfinite(r.metrics.get(n, math.nan))})
        for r in records
    ]  # fmt: skip


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
        return settled(config)

    def output_dir(self, config: Any) -> str:
        """As configured."""
        directory: str = config.output_dir
        return directory

    def saving(self, config: Any) -> Saving:
        """As configured, where it is; else only where the run is told to stop."""
        return Saving(
            getattr(config, "checkpoint_interval", 0), getattr(config, "checkpoint_minutes", 0.0)
        )


LAYERS = "layers/"
"""Beginning of the names of what single blocks measure: dozens of charts."""


def kept_back(begin: Begin) -> tuple[str, ...]:
    """Beginnings of the names that are in ``metrics.jsonl`` and no charts, unless asked for."""
    return () if begin.config.get("log_layers", True) else (LAYERS,)


def used(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a run computes with, beside its configuration: the device that ``auto`` stands for, its
    name, torch's CPU threads, and the attack whose checkpoint is healed.
    """
    found: dict[str, Any] = {}
    if "device" in config:
        device = resolve_device(config["device"])
        on_gpu = device.type == "cuda"
        name = torch.cuda.get_device_name(device) if on_gpu else processor()
        found |= {"device": device, "hardware": name, "threads": torch.get_num_threads()}
    attack = config.get("attack")
    if isinstance(attack, Mapping):
        found["attack_run_id"] = attack.get("attack_run_id", "")
    return found


class Measured(Protocol):
    """A record that has the whole measurement."""

    @property
    def step(self) -> int:
        """Steps done."""

    @property
    def measurement(self) -> Measurement:
        """On the probe."""


def pictures_of(
    records: Sequence[Measured], healthy: Measurement, *, wanted: bool
) -> list[tuple[str, int, Any]]:
    """Spectra of all blocks at up to ten steps as pictures that MLflow shows by step.

    Args:
        records: Of the run.
        healthy: Drawn behind them.
        wanted: Whether there are to be any.
    """
    if not wanted:
        return []
    spectra = [record.measurement.block_spectra() for record in records]
    drawn = spectra_by_step([r.step for r in records], spectra, healthy.block_spectra())
    return [("headline/spectrum", step, picture) for step, picture in drawn]


def announce(run: Run, begin: Begin) -> None:
    """Log what is known of a run once its inputs are loaded."""
    for name, count in begin.counts.items():
        run.n_params(count, name)
    using = used(begin.config)
    run.params("used", using)
    hardware = {"hardware": using.get("hardware", "")}
    run.tags({"fingerprint": begin.fingerprint, **begin.tags, **hardware})
    for i in begin.inputs:
        name = f"{pathlib.Path(i.corpus).name}-{i.split}"
        run.dataset(name, i.digest, i.context, {"corpus": i.corpus, "split": i.split})


def show(run: Run, report: Report) -> None:
    """Log what a person sees of a finished run: its description, pictures and tables."""
    for name, step, picture in report.pictures:
        run.image(name, step, picture)
    for name, columns in report.tables.items():
        run.table(name, columns)
    run.describe(report.markdown)
    for model in report.models:
        run.model(model)


def upload(
    run: Run,
    folder: pathlib.Path,
    artifacts: str | None = None,
    models: Sequence[ModelFiles] = (),
) -> None:
    """Store every file of a local folder as artifacts, in the same layout; those of models not."""
    own = [model.folder for model in models]
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(path.is_relative_to(place) for place in own)
    )
    for path in progress.phase("uploading", files, len(files)):
        parent = path.parent.relative_to(folder).as_posix()
        parts = [part for part in (artifacts, parent) if part and part != "."]
        run.artifact(path, "/".join(parts) or None)


MODEL_FOLDER = "model"
"""Folder of a run's files that holds its MLflow model, where one is wanted."""


def model_of(
    stage: str,
    config: Any,
    loaded: LoadedModel,
    folder: pathlib.Path,
    title: str,
    **facts: Any,
) -> tuple[ModelFiles, ...]:
    """The weights of a finished run, written as an MLflow model where that is wanted.

    Args:
        stage: That made them.
        config: Says whether, and under which name of the registry.
        loaded: Weights and tokenizer.
        folder: Of the run's files.
        title: What they are, for people and as their name.
        **facts: What else is to be known of them.
    """
    if not config.log_model:
        return ()
    progress.enter("writing the model")
    source = "" if pathlib.Path(loaded.source).is_absolute() else loaded.source
    text = f"Made from {config.label} by llm-healing: weights for research, not for use."
    place = folder / MODEL_FOLDER
    write_model(place, loaded.model, loaded.tokenizer, model_card(title, text))
    known = {"model": config.label, "seed": config.seed, "n_params": loaded.n_params, **facts}
    return (ModelFiles(title, place, {**known, "source": source}, stage, config.register_as),)


def run_of(given: str, stage: str, flag: str, store: Store) -> RunView:
    """The run that an option names, by its id or by a model that it made.

    Args:
        given: Id of a run, ``models:/m-…``, ``models:/NAME/VERSION`` or ``models:/NAME@ALIAS``.
        stage: That has to have made the model.
        flag: Option that it was given as, for the message.
        store: Has it.

    Raises:
        TrackingError: There is no such run or model, or the model is another stage's or program's.
    """
    if not given.startswith(MODELS):
        return store.get_run(given)
    run = store.run_of_model(given)
    if (made := run.tags.get("stage", "")) != stage:
        raise TrackingError(
            f"{flag} {given} was made by run {run.run_id} of stage {made or 'unknown'}: name a "
            f"model of stage {stage}"
        )
    return run


def checkpoint_file(given: str, stage: str, name: str, flag: str, store: Store) -> pathlib.Path:
    """Local path of the checkpoint that an option names: a path, an MLflow URI of the file, or a
    model, which stands for the checkpoint of the run that made it.

    Args:
        given: As given.
        stage: That has to have made the model.
        name: Of the checkpoint's file.
        flag: Option that it was given as, for the message.
        store: Has it.

    Raises:
        ConfigError: No path can be like this.
        TrackingError: The store does not have it.
    """
    if given.startswith(MODELS):
        run = run_of(given, stage, flag, store)
        return store.download(f"runs:/{run.run_id}/checkpoints/{name}")
    return store.download(given) if is_address(given) else local_path(given, flag)
