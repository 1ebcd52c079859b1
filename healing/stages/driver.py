"""The one driver of all stages that compute: runs, folders, journal, progress, artifacts, reuse.

A stage says what it is (:class:`healing.stages.stage.Stage`) and computes in a cell, a generator of
events. The driver alone opens runs, makes folders, writes and logs. Two things plug in here:
``stop`` (signals) and ``snapshots`` (going on with a cell that was left).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import pathlib
import time
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, TypeVar

import torch

from healing import progress
from healing.errors import HealingError
from healing.progress import Safe, Stop, Stopped
from healing.stages.cells.events import Begin, Events, Record
from healing.stages.stage import Done, Report, Stage, Tools, announce, kept_back, show, upload
from healing.stages.terminal.console import Console
from healing.stages.terminal.heard import PREPARING, Heard
from healing.stages.terminal.keeping import Keeper
from healing.stages.terminal.memory import lack_told
from healing.stages.terminal.own_run import OwnRun
from healing.stages.terminal.phase_times import Clock, metric_name
from healing.tracking.journal import Journal
from healing.tracking.output_folder import (
    output_folder,
    require_room,
    require_writable,
    run_folder,
    writing,
)
from healing.tracking.processes import only_owner, owned_if_free
from healing.tracking.run import Run
from healing.tracking.run_files import is_put_aside, mark_finished, settle, start_folder
from healing.tracking.snapshots import Due, Kept, Snapshots
from healing.tracking.store import MlflowStore, Store

C = TypeVar("C")
R = TypeVar("R")


Alone = Callable[[str, Callable[[str], None]], AbstractContextManager[None]]
"""Has the cell of a fingerprint alone for a block; calls a function while it waits for that."""
OTHERS_SECONDS = 2.0
"""Between two looks at a run of another process that is waited for."""
DONE = "done"
"""Phase of a run that ended well."""


class Driver:
    """Runs cells.

    Args:
        console: What a person sees.
        store: Where runs go.
        stop: Set from elsewhere to end cells early.
        snapshots: Where states are kept; ``None`` = nowhere.
        again: Whether a finished run of the same fingerprint is taken for every child, as where a
            run that was cut goes on.
        clock: Tells the seconds of phases.
        alone: Keeps others off a cell who share no folder with this process; ``None`` = there are
            none.
    """

    def __init__(
        self,
        console: Console,
        store: Store | None = None,
        *,
        stop: Stop | None = None,
        snapshots: Snapshots | None = None,
        again: bool = False,
        clock: Clock = time.monotonic,
        alone: Alone | None = None,
    ) -> None:
        self.console, self.store = console, store or MlflowStore()
        self.stop, self.clock = stop or Stop(), clock
        self.snapshots, self.again, self.alone = snapshots, again, alone
        self._known: dict[Hashable, Done] = {}
        self._begun: dict[pathlib.Path, str] = {}

    def within(self, console: Console) -> Driver:
        """The same with another console; what was run is known to both."""
        other = copy.copy(self)
        other.console = console
        return other

    @contextlib.contextmanager
    def process(
        self, title: str, tags: Mapping[str, Any], output_dir: str = "", *, view: bool = False
    ) -> Iterator[Run]:
        """The outermost run of a command. Failures land in it; torch's threads are as before
        afterwards. The last line says where it is in MLflow (``view``: where all runs are).

        Args:
            title: Name of the run.
            tags: At least ``stage``.
            output_dir: Where what a store that is away could not be told is kept; empty = nowhere.
            view: Whether the link is that of all runs.

        Raises:
            OutageError: At the end: the store did not come back, and everything is on disk.
        """
        output = output_folder(output_dir) if output_dir else None
        threads = torch.get_num_threads()
        try:
            with contextlib.ExitStack() as ending:
                with self.console.waiting("opening the store"):
                    run = ending.enter_context(
                        self.store.start(title, tags, output, self.console.say)
                    )
                    say = self.console.say
                    for line in self.store.close_left_running(run.experiment_id, say):
                        say(line)
                    page = self.store.share_view(run.experiment_id)
                try:
                    yield run
                except Stopped as stopped:
                    # Of a parent, whose children were stopped, as of a run of its own.
                    run.tags({"stopped_by": stopped.name}, later=True)
                    raise
            self.console.link(page if view else self.store.page_of(run))
        finally:
            torch.set_num_threads(threads)
            for folder, run_id in self._begun.items():
                self._settle_if_free(folder, run_id)
            self._begun.clear()

    def run_cell(
        self,
        stage: Stage[C, R],
        config: C,
        *,
        run: Run | None = None,
        parent: Run | None = None,
        reuse: bool = False,
        below: Collection[str] = (),
    ) -> Done:
        """Run one cell: in a given run, or as a child of the parent.

        Args:
            stage: What to do.
            config: With what; may hold ``auto``.
            run: Of the process.
            parent: Of a child, which is opened once the cell begins: one that is found again, or
                fails to be interrupted, leaves no empty run.
            reuse: Whether a finished run with the same fingerprint is taken instead.
            below: Parents that were cut: of these alone a finished child is taken instead.
        """
        with contextlib.ExitStack() as ending:
            shown = ending.enter_context(
                contextlib.closing(self.console.progress(stage.title(config)))
            )
            heard = Heard(shown, self.stop, self.clock)
            own = OwnRun(self.store, stage, ending, run, parent, heard.tag)
            try:
                with progress.listening(heard), lack_told(heard.where):
                    progress.enter(PREPARING)
                    require_writable(stage.output_dir(config))
                    tools = Tools(self.store, functools.partial(self._first, own, config))
                    config = stage.prepare(config, tools)
                    own.prepared(config)
                    shown.rename(stage.title(config))
                    return self._drive(stage, config, own, heard, None if reuse else below)
            except HealingError:
                own.open(config)  # the failure has a run to be recorded in
                raise
            except Stopped as stopped:
                own.stopped(stopped, heard.step)
                raise
            finally:
                heard.tag.stop()
                if heard.times.now != DONE:
                    own.left_in(heard.times.now)

    def run_first(self, stage: Stage[C, R], config: C, parent: Run) -> Done:
        """A cell that others may need: run once by this driver, or found in the store.

        What is asked for again is known without loading anything.
        """
        key = (stage.name, config)
        if key not in self._known:
            done = self.run_cell(stage, config, parent=parent, reuse=True)
            self._known[key] = replace(done, report=None)  # a sweep has many
            return done
        return self._known[key]

    def _first(self, own: OwnRun, config: Any, stage: Stage[Any, Any], wanted: Any) -> Done:
        with progress.during("runs that come first"):
            return self.run_first(stage, wanted, own.parent or own.open(config))

    def _drive(
        self,
        stage: Stage[C, R],
        config: C,
        own: OwnRun,
        heard: Heard,
        below: Collection[str] | None,
    ) -> Done:
        with contextlib.closing(stage.cell(config)) as events:  # hooks and modes are undone
            begin = next(events)
            assert isinstance(begin, Begin), "a cell begins with Begin"
            folder = run_folder(stage.output_dir(config), stage.place, begin.name)
            if self.again and own.is_child:
                below = None
            if found := self._finished(own, begin, folder, below):
                return found
            with self._alone(folder, begin.fingerprint, own.experiment_id, below is None):
                # Another may have done the same meanwhile.
                if found := self._finished(own, begin, folder, below):
                    return found
                # Before a state is fetched, which takes its time: others wait for this run.
                run = own.open(config, begin.fingerprint)
                require_room(folder, begin.disk)
                kept = self.snapshots.load(folder, begin.fingerprint) if self.snapshots else None
                self._announce(stage, begin, run, folder, kept)
                lines = None if stage.keeps_folder else folder / "metrics.jsonl"
                journal = Journal(lines, run, kept_back(begin))
                heard.keeper = keeper = Keeper(
                    self.snapshots,
                    folder,
                    Kept(begin.fingerprint, None, run_id=run.run_id),
                    Due(stage.saving(config), self.clock),
                    self.console.say,
                    heard.saving,
                )
                outcome, records = self._compute(begin, events, kept, journal, heard, keeper)
                heard.computed = True
                progress.enter("files and figures")
                with writing(folder, begin.disk):
                    report = stage.store(outcome, records, folder, run.run_id)
                del outcome
                self._finish(stage, report, own, run, folder, heard)
                if not stage.keeps_folder:
                    with writing(folder):
                        mark_finished(folder, run.run_id)
                if self.snapshots:
                    self.snapshots.drop(folder)
                own.end_child()  # whoever waits for the folder finds a finished run
                if own.is_child:
                    settle(folder, run.run_id)
        return Done(run.run_id, folder, report)

    def _finished(
        self,
        own: OwnRun,
        begin: Begin,
        folder: pathlib.Path,
        below: Collection[str] | None,
    ) -> Done | None:
        """A finished run of the same fingerprint: anybody's (``None``), or of these parents."""
        if below is not None and not below:
            return None
        found = self.store.find_finished(own.experiment_id, begin.fingerprint, below)
        if found is None:
            return None
        self._settle_if_free(folder, found.run_id)  # a repetition may have been killed
        return Done(found.run_id, folder, view=found)

    @staticmethod
    def _settle_if_free(folder: pathlib.Path, run_id: str) -> None:
        """As :func:`healing.tracking.run_files.settle`, unless somebody is at it."""
        if is_put_aside(folder):
            with contextlib.suppress(OSError), owned_if_free(folder) as free:
                if free:
                    settle(folder, run_id)

    @contextlib.contextmanager
    def _alone(
        self, folder: pathlib.Path, fingerprint: str, experiment_id: str, anybodys: bool
    ) -> Iterator[None]:
        """Nobody else writes a run's folder meanwhile, or computes the same elsewhere where a
        finished run of anybody's is taken. Two that begin in the same moment and share nothing but
        the store both compute: that costs time, and no number.
        """
        told: set[str] = set()

        def waiting(text: str) -> None:
            if text not in told:
                told.add(text)
                self.console.say(text)
            progress.enter("waiting for another run")

        with contextlib.ExitStack() as ending:
            with writing(folder):
                ending.enter_context(only_owner(folder, waiting))
            if self.alone is not None:
                ending.enter_context(self.alone(fingerprint, waiting))
            while anybodys and (other := self.store.under_way(experiment_id, fingerprint)):
                waiting(f"waiting for run {other.run_id} ({other.name}), which computes the same")
                time.sleep(OTHERS_SECONDS)
            yield

    def _announce(
        self,
        stage: Stage[Any, Any],
        begin: Begin,
        run: Run,
        folder: pathlib.Path,
        kept: Kept | None,
    ) -> None:
        """What is known of a run before it computes."""
        announce(run, begin)
        if kept is not None:
            run.tags({"resumed_from": kept.run_id, "resumed_at_step": kept.step})
            where = f"from step {kept.step}" if kept.step else "with what was prepared"
            self.console.say(f"going on {where}, where run {kept.run_id} was left")
            for line in self.store.close_gone_on_with(kept.run_id, run.run_id):
                self.console.say(line)
        for warning in begin.warnings:
            self.console.say(f"warning: {warning}")
        if not stage.keeps_folder:
            with writing(folder):
                start_folder(folder, begin.config)
                if is_put_aside(folder):
                    self._begun[folder] = run.run_id  # what becomes of it is known once it ends
            run.rescue(folder / "config.json", folder / "metrics.jsonl")

    def _compute(
        self,
        begin: Begin,
        events: Events[R],
        kept: Kept | None,
        journal: Journal,
        heard: Heard,
        keeper: Keeper,
    ) -> tuple[R, list[Record]]:
        """Run a cell to its end; every record is on disk before it is logged."""
        shown = heard.shown
        records: list[Record] = []
        for record in kept.records if kept else ():
            records.append(record)
            with writing(keeper.folder):
                journal.record(record.step, record.metrics)
        shown.begin(begin.total, begin.unit)
        if kept:
            shown.step(kept.step)
        answer = kept.state if kept else None
        while True:
            try:
                event = events.send(answer)
            except StopIteration as end:
                outcome: R = end.value
                return outcome, records
            answer = None
            if isinstance(event, Record):
                records.append(event)
                with heard.times.within("logging"), writing(keeper.folder):
                    journal.record(event.step, event.metrics)
                    if event.write is not None:
                        event.write(keeper.folder)
                shown.step(event.step, event.note)
            elif isinstance(event, Safe):
                shown.step(event.done, event.note)
                heard.step = event.done
                keeper.reached(event, records)
                if self.stop.is_set():
                    keeper.save()
                    raise Stopped(self.stop.signum)

    def _finish(
        self,
        stage: Stage[Any, Any],
        report: Report,
        own: OwnRun,
        run: Run,
        folder: pathlib.Path,
        heard: Heard,
    ) -> None:
        progress.enter("uploading")
        run.history(report.points)
        run.tags(report.tags)
        upload(run, folder, stage.artifacts, report.models)
        show(run, report)
        heard.tag.stop()
        seconds = heard.times.seconds()
        heard.times.enter(DONE)
        own.left_in(DONE)
        run.history([(0, {metric_name(name): spent for name, spent in seconds.items()})])
        run.flush()  # before the state is dropped: a full disk still refuses it here
        heard.shown.close()
        self.console.over(report.line, folder, detail=report.detail, alone=not own.is_child)
