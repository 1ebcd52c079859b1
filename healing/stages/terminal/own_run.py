"""The run that one cell has."""

from __future__ import annotations

import contextlib
from typing import Any

from healing.config.arm_tags import chart_tags
from healing.progress import Stopped
from healing.stages.stage import Stage
from healing.stages.terminal.phase_times import TAG, PhaseTag
from healing.tracking.run import Run
from healing.tracking.store import Store


class OwnRun:
    """The run of one cell: the process' own, or a child that is opened when it is needed."""

    def __init__(
        self,
        store: Store,
        stage: Stage[Any, Any],
        ending: contextlib.ExitStack,
        run: Run | None,
        parent: Run | None,
        tag: PhaseTag,
    ) -> None:
        self._store, self._stage, self._tag = store, stage, tag
        self._ending = ending.enter_context(contextlib.ExitStack())
        self._run, self.parent = run, parent
        self._is_prepared = False
        if run is not None:
            tag.start(run)

    @property
    def is_child(self) -> bool:
        """Whether it is not the process' own."""
        return self.parent is not None

    @property
    def experiment_id(self) -> str:
        """Where finished runs are looked for."""
        run = self._run or self.parent
        assert run is not None, "a cell has a run or a parent"
        return run.experiment_id

    def prepared(self, config: Any) -> None:
        """The configuration is resolved: an open run gets its name and parameters now."""
        self._is_prepared = True
        if self._run is not None:
            self._label(self._run, config)

    def open(self, config: Any, fingerprint: str = "") -> Run:
        """The run, opened now if it is not yet, with its fingerprint where that is known."""
        known = {"fingerprint": fingerprint} if fingerprint else {}
        if self._run is not None and known:
            self._run.tags(known)
        if self._run is None:
            assert self.parent is not None, "a child has a parent"
            tags = self._tags(config) | known
            child = self._store.child(self.parent, self._stage.title(config), tags)
            self._run = self._ending.enter_context(child)
            self._tag.start(self._run)
            if self._is_prepared:
                self._run.params(self._stage.name, self._stage.params(config))
        return self._run

    def end_child(self) -> None:
        """A child that has said everything is over now, not when its cell is left."""
        self._ending.close()

    def stopped(self, why: Stopped, step: int) -> None:
        """The run is ended early: by what, and where, goes with what is sent next."""
        if self._run is not None:
            self._run.tags({"stopped_by": why.name, "stopped_at_step": step}, later=True)

    def left_in(self, phase: str) -> None:
        """The run ends here, well or not: its phase goes with what is sent next."""
        if self._run is not None:
            self._run.tags({TAG: phase}, later=True)

    def _tags(self, config: Any) -> dict[str, Any]:
        tags = self._stage.tags(config)
        return {"stage": self._stage.name, **tags, **chart_tags(tags)}

    def _label(self, run: Run, config: Any) -> None:
        run.tags({**self._tags(config), "mlflow.runName": self._stage.title(config)})
        run.params(self._stage.name, self._stage.params(config))
