"""``--launcher local``: the chains of a sweep in threads of this process."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Sequence

from healing.config.sweep import SweepConfig
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.driver import Driver
from healing.stages.launching.chain import CellResult, Chain, is_of
from healing.stages.launching.chain_run import run_chain
from healing.stages.launching.launcher import tell, worker_count
from healing.stages.terminal.console import CellProgress, Cells
from healing.tracking.run import Run


class _Watch:
    """Shows the cells of one chain in the bar of all."""

    def __init__(self, cells: Cells, driver: Driver, stopped: threading.Event) -> None:
        self._cells, self._driver, self._stopped = cells, driver, stopped
        self._shown: CellProgress | None = None

    @property
    def is_over(self) -> bool:
        """Whether the sweep ends."""
        return self._stopped.is_set()

    def begins(self, cell: SweepCell, runs: int) -> CellProgress:
        """A cell has a part of the bar."""
        self._shown = self._cells.cell(runs)
        return self._shown

    def ended(self, result: CellResult) -> None:
        """The bar goes on, and what came of the cell is said."""
        assert self._shown is not None, "a cell that ended had begun"
        self._cells.over(self._shown, result.cell.title, failed=bool(result.failure))
        tell(self._driver, result)


class ThreadLauncher:
    """Runs chains in threads.

    Threads, not processes: torch releases the interpreter lock in its kernels, each cell computes
    on one thread, and imports and corpora are shared.

    Args:
        config: Of the sweep.
    """

    def __init__(self, config: SweepConfig) -> None:
        self._config = config

    def run(self, chains: Sequence[Chain], driver: Driver, run: Run) -> list[CellResult]:
        """Every chain; results in the order of the plan."""
        models = {chain.cells[0].label for chain in chains}
        driver.store.look_ahead(run.experiment_id, models, is_of(chains))
        stopped = threading.Event()
        with (
            driver.console.cells(sum(len(c.cells) for c in chains), "sweep", "cell") as cells,
            concurrent.futures.ThreadPoolExecutor(worker_count(self._config)) as pool,
        ):
            futures = [
                pool.submit(run_chain, chain, driver, run, _Watch(cells, driver, stopped))
                for chain in chains
            ]
            try:
                return [result for future in futures for result in future.result()]
            except BaseException:
                # Ctrl-C reaches this thread alone: cells under way end at their next safe point,
                # no other begins.
                stopped.set()
                driver.stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
