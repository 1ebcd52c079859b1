"""Where the chains of a sweep are run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Protocol

from healing.config.options import AUTO
from healing.config.presets import preset_for
from healing.config.sweep import SweepConfig
from healing.models.loading import resolve_device
from healing.stages.driver import Driver
from healing.stages.launching.chain import CellResult, Chain
from healing.tracking.run import Run


class Launcher(Protocol):
    """Runs the chains of one sweep, several at a time."""

    def run(self, chains: Sequence[Chain], driver: Driver, run: Run) -> list[CellResult]:
        """What became of every cell, in the order of the chains.

        Args:
            chains: Independent of each other.
            driver: Of the command.
            run: Of the command: parent of all runs.

        Raises:
            Stopped: The command was told to stop; every run is ended, or ends now.
        """


def worker_count(config: SweepConfig) -> int:
    """Cells at a time in one process: more than one only where a cell uses one thread and no
    accelerator.
    """
    if config.workers != AUTO:
        return int(config.workers)
    on_cpu = resolve_device(config.device).type == "cpu"
    single = all(preset_for(model).threads == 1 for model in config.model_list())
    return min(4, os.cpu_count() or 1) if on_cpu and single else 1


def tell(driver: Driver, result: CellResult) -> None:
    """Say what became of a cell."""
    if result.failure:
        driver.console.say(f"failed: {result.failure}")
    elif result.view is not None:
        driver.console.detail(f"{result.cell.title}: {result.view.tags['verdict']}")
