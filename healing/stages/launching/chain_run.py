"""Runs a chain: its cells in order, each found again where it was run before."""

from __future__ import annotations

from typing import Protocol

from healing import progress
from healing.data.kept_rows import pin
from healing.errors import ConfigError, HealingError, MemoryLackError
from healing.progress import Stopped
from healing.registry import SHAM
from healing.stages.attack import ATTACK, checkpoint_of
from healing.stages.basin import BASIN
from healing.stages.cells.basin_outcome import BasinCell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.driver import Driver
from healing.stages.dry_run.stage import predictions
from healing.stages.heal import HEAL
from healing.stages.launching.cell_configs import attack_config, basin_config, heal_config
from healing.stages.launching.chain import CellResult, Chain
from healing.stages.launching.known_cells import basin_key, heal_key
from healing.stages.terminal.console import CellProgress, phase_text
from healing.stages.terminal.memory import lack_told
from healing.tracking.queries import RunView
from healing.tracking.run import Run


class Watch(Protocol):
    """Whoever follows a chain, and may end it."""

    @property
    def is_over(self) -> bool:
        """Whether no further cell is to begin."""

    def begins(self, cell: SweepCell, runs: int) -> CellProgress:
        """A cell of so many runs begins; what its runs are shown through.

        Raises:
            HealingError: It is not to be tried, which is its failure.
        """

    def ended(self, result: CellResult) -> None:
        """A cell is over."""


def run_chain(chain: Chain, driver: Driver, run: Run, watch: Watch) -> list[CellResult]:
    """The cells of a chain in order; a failing one does not stop the others.

    Args:
        chain: Which.
        driver: Of the process.
        run: Parent of all runs.
        watch: Told of every cell.
    """
    for dataset, commit in chain.commits:
        pin(dataset, commit)
    results: list[CellResult] = []
    attacks: dict[SweepCell, str] = {}
    for cell in chain.cells:
        if watch.is_over:
            break
        try:
            shown = watch.begins(cell, chain.runs(cell))
            own = driver.within(driver.console.within(shown))
            result = _run_cell(chain, cell, own, run, attacks)
        except MemoryLackError as error:
            result = CellResult(cell, failure=f"{cell.title}: {error}{_predicted(chain, cell)}")
        except HealingError as error:
            result = CellResult(cell, failure=f"{cell.title}: {error}")
        results.append(result)
        watch.ended(result)
    return results


def predicted_bytes(chain: Chain, cell: SweepCell) -> int:
    """Predicted peak of a cell's memory, in its attack or its healing; 0 where none can be
    predicted, as for plug-ins.
    """
    try:
        found = predictions(heal_config(chain.config, cell, chain.source, chain.healer))
    except HealingError:
        return 0
    return max(prediction.peak_bytes for _, prediction in found.values())


def _predicted(chain: Chain, cell: SweepCell) -> str:
    """What memory was to be expected, for a cell that did not have as much."""
    peak = predicted_bytes(chain, cell)
    return f" (predicted: {peak / 1e9:.2f} GB at its peak)" if peak else " (none is predicted)"


def _run_cell(
    chain: Chain, cell: SweepCell, driver: Driver, run: Run, attacks: dict[SweepCell, str]
) -> CellResult:
    """One cell: attack, healing, landscape; each is found again where it was run before.

    Args:
        chain: That it is of.
        cell: What to run.
        driver: Of this cell.
        run: Parent of all runs.
        attacks: As of :func:`_attacked`.
    """
    key = _key(chain, cell, driver)
    if view := driver.store.known(key):
        reused = True
    else:
        path = _attacked(chain, cell, driver, run, attacks) if cell.role != SHAM else ""
        config = heal_config(chain.config, cell, chain.source, chain.healer)
        done = driver.run_first(HEAL, HealCell(config, path, key=key), run)
        view, reused = done.view or driver.store.get_run(done.run_id), done.reused
    basin = _basin(chain, driver, run, view) if chain.wants_landscape(cell) else None
    return CellResult(cell, view, reused, basin=basin)


def _key(chain: Chain, cell: SweepCell, driver: Driver) -> str:
    """What identifies a cell's healing; reading what it is made of is shown, and can be stopped."""
    now = ""

    def told(name: str, done: int, total: int | None, note: str = "") -> None:
        nonlocal now
        now = name
        if driver.stop.is_set():
            raise Stopped(driver.stop.signum)
        driver.console.told(f"{cell.title}, {phase_text(name, done, total, note)}")

    with progress.listening(told), lack_told(lambda: now):
        return heal_key(chain, cell)


def _attacked(
    chain: Chain, cell: SweepCell, driver: Driver, run: Run, attacks: dict[SweepCell, str]
) -> str:
    """Path of the checkpoint of a cell's attack, which is run, or found, when it is first wanted.

    Args:
        chain: That it is of.
        cell: Whose attack.
        driver: Of the cell that wants it.
        run: Parent of all runs.
        attacks: Cell → path, empty where the attack failed. Gains this cell's, and those that it
            refers to.

    Raises:
        ConfigError: An attack that it refers to failed.
    """
    if attacks.get(cell):
        return attacks[cell]
    referred = {}
    for arm in filter(None, (cell.matched_to, cell.direction)):
        other = chain.first(arm)
        if attacks.get(other, "wanted") == "":
            raise ConfigError(f"the attack {arm} that it refers to failed")
        referred[arm] = _attacked(chain, other, driver, run, attacks)
    names = (referred.get(arm, "") for arm in (cell.matched_to, cell.direction))
    settings = attack_config(chain.config, cell, *names)
    attacks[cell] = ""
    done = driver.run_cell(ATTACK, settings, parent=run, reuse=True)
    attacks[cell] = str(checkpoint_of(done, driver.store))
    return attacks[cell]


def _basin(chain: Chain, driver: Driver, run: Run, healed: RunView) -> RunView:
    """The landscape of a healing run."""
    settings = basin_config(chain.config, healed.run_id)
    key = basin_key(settings)
    if view := driver.store.known(key):
        return view
    done = driver.run_cell(BASIN, BasinCell(settings, key=key), parent=run, reuse=True)
    return done.view or driver.store.get_run(done.run_id)
