"""One chain of a sweep: the arms of one model and seed, each attacked, healed, and its landscape
examined where that is wanted.

A chain is a function of a frozen, picklable description, of a driver and of the run that its runs
are children of; whoever calls it decides where that is.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from healing.config.arm_tags import arm_takes
from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import as_params, fingerprint, not_determining
from healing.config.heal import HealConfig
from healing.config.healer import Healer
from healing.config.options import AUTO
from healing.config.presets import preset_for
from healing.config.shared import SAVING
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError, HealingError, MemoryLackError
from healing.registry import DAMAGE_CONTROL, SHAM, TREATMENT
from healing.stages.attack import ATTACK, checkpoint_of
from healing.stages.basin import BASIN
from healing.stages.cells.basin_outcome import BasinCell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.cells.sweep_plan import SweepCell, plan
from healing.stages.driver import Driver
from healing.stages.dry_run.stage import predictions
from healing.stages.heal import HEAL
from healing.stages.terminal.console import CellProgress
from healing.tracking.queries import RunView
from healing.tracking.run import Run

OF_THE_SWEEP = frozenset(("models", "arms", "seeds", "workers", "healer"))
"""Settings of a sweep that say which chains there are, and nothing of one of them."""


def _shared(config: SweepConfig) -> dict[str, Any]:
    names = (
        "revision",
        "deduped",
        "corpus",
        "tokenizer",
        "text_column",
        "split_rule",
        "batch_size",
        "sequence_length",
        "measurement_interval",
        "device",
        "output_dir",
        "cache_dir",
        "log_layers",
        "log_images",
        "log_model",
        *SAVING,
    )
    return {name: getattr(config, name) for name in names} | {"verbosity": "quiet"}


def attack_config(
    config: SweepConfig, cell: SweepCell, reference: str, direction: str = ""
) -> AttackConfig:
    """Resolved configuration of a cell's attack.

    Args:
        config: Of the sweep.
        cell: Says which attack.
        reference: Checkpoint that a damage control is matched to; empty = none.
        direction: Checkpoint that gives the direction of a ray; empty = none.
    """
    ranked = arm_takes(cell.arm, "noise_rank")
    return resolve_from_model(
        AttackConfig(
            model=cell.model,
            arm=cell.arm,
            seed=cell.seed,
            attack_steps=config.attack_steps,
            trajectory_interval=config.trajectory_interval,
            reference_checkpoint=reference,
            direction_checkpoint=direction,
            match=config.match_of(cell.arm) if reference else "norm",
            noise_draw=cell.draw,
            noise_rank=config.noise_rank if ranked else 1,
            **_shared(config),
        )
    )


def heal_config(
    config: SweepConfig, cell: SweepCell, source: str = "", healer: Healer | None = None
) -> HealConfig:
    """Resolved configuration of a cell's healing.

    Args:
        config: Of the sweep.
        cell: What is healed.
        source: Of the healer, as it was named.
        healer: Of the cell's model; ``None`` = the default one.

    Raises:
        ConfigError: A setting that was given contradicts the healer.
    """
    steps = config.healing_steps
    if steps == AUTO and healer is None:
        steps = preset_for(cell.model).sweep_healing_steps
    wanted = HealConfig(
        model=cell.model,
        arm=cell.arm,
        seed=cell.seed,
        healing_steps=steps,
        healing_lr=config.healing_lr,
        healer=source,
        sham=config.sham and cell.role != SHAM,
        log_text=config.log_text,
        register_as=config.register_as,
        **_shared(config),
    )
    return resolve_from_model(healer.applied(wanted) if healer else wanted)


@dataclass(frozen=True)
class CellResult:
    """What became of one cell: its healing run, or why there is none, and its landscape."""

    cell: SweepCell
    view: RunView | None = None
    reused: bool = False
    failure: str = ""
    basin: RunView | None = None


@dataclass(frozen=True)
class Chain:
    """Everything that decides the runs of one model and seed.

    Attributes:
        config: Of the sweep.
        cells: In the order in which they are run: what others refer to comes first.
        source: Of the healer, as it was named; empty = none.
        healer: Of the model; ``None`` = the default one.
    """

    config: SweepConfig
    cells: tuple[SweepCell, ...]
    source: str = ""
    healer: Healer | None = None

    @property
    def title(self) -> str:
        """``nano seed 3``."""
        first = self.cells[0]
        return f"{first.label} seed {first.seed}"

    def runs(self, cell: SweepCell) -> int:
        """Runs of a cell: the sham is healed only, a landscape comes last."""
        return (cell.role != SHAM) + 1 + self.wants_landscape(cell)

    def wants_landscape(self, cell: SweepCell) -> bool:
        """Whether the landscape of a cell is examined."""
        wanted = self.config.basin and not cell.draw
        return wanted and cell.role in (TREATMENT, DAMAGE_CONTROL)

    def name(self) -> str:
        """One path component that two chains share only where they do the same work, whatever
        sweep they are of.
        """
        left_out = not_determining(self.config) | OF_THE_SWEEP
        settings = {k: v for k, v in as_params(self.config).items() if k not in left_out}
        healer = self.healer.digest if self.healer else ""
        return fingerprint("chain", settings, [asdict(cell) for cell in self.cells], healer)

    def below(self, output_dir: str, **changes: Any) -> Chain:
        """The same with its files elsewhere, and other changes of what determines no number."""
        return replace(self, config=replace(self.config, output_dir=output_dir, **changes))


def chains_of(config: SweepConfig, healers: Mapping[str, tuple[str, Healer]]) -> list[Chain]:
    """The chains of a sweep, in the order of its plan.

    Args:
        config: Of the sweep.
        healers: Label of a model → its healer as it was named, and itself.
    """
    return [
        Chain(config, tuple(cells), *healers.get(cells[0].label, ("", None)))
        for cells in plan(config)
    ]


def is_of(chains: Collection[Chain]) -> Callable[[RunView], bool]:
    """Whether a stored run may be one of these chains': it has the model and the seed of one."""
    firsts = [chain.cells[0] for chain in chains]
    known = {(cell.label, str(cell.seed)) for cell in firsts}
    # A landscape has its healing's seed in that run alone.
    labels = {cell.label for cell in firsts}

    def found(view: RunView) -> bool:
        model = view.tags.get("model", "")
        seed = view.params.get("seed")
        return (model, seed) in known if seed is not None else model in labels

    return found


def shared_out(chains: Sequence[Chain], found: Mapping[str, RunView]) -> list[dict[str, RunView]]:
    """What each chain may find again, of what all of them may.

    Args:
        chains: Of a sweep.
        found: Fingerprint → stored run, as :func:`is_of` lets through.
    """
    firsts = [chain.cells[0] for chain in chains]
    places = {(cell.label, str(cell.seed)): n for n, cell in enumerate(firsts)}
    seeds = {view.run_id: view.params["seed"] for view in found.values() if "seed" in view.params}
    shares: list[dict[str, RunView]] = [{} for _ in chains]
    for name, view in found.items():
        seed = view.params.get("seed") or seeds.get(view.tags.get("heal_run_id", ""), "")
        place = places.get((view.tags.get("model", ""), seed))
        if place is not None:
            shares[place][name] = view
    return shares


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
    results: list[CellResult] = []
    attacks: dict[str, str] = {}
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
    chain: Chain, cell: SweepCell, driver: Driver, run: Run, attacks: dict[str, str]
) -> CellResult:
    """One cell: attack, healing, landscape; each is found again where it was run before.

    Args:
        chain: That it is of.
        cell: What to run.
        driver: Of this cell.
        run: Parent of all runs.
        attacks: Arm → checkpoint, of the same model and seed; gains this cell's.
    """
    path = ""
    if cell.role != SHAM:
        path = str(_attack(chain.config, cell, driver, run, attacks))
        attacks[cell.arm] = path
    heal_cell = HealCell(heal_config(chain.config, cell, chain.source, chain.healer), path)
    done = driver.run_first(HEAL, heal_cell, run)
    view = done.view or driver.store.get_run(done.run_id)
    basin = _basin(chain.config, driver, run, view) if chain.wants_landscape(cell) else None
    return CellResult(cell, view, done.reused, basin=basin)


def _attack(
    config: SweepConfig, cell: SweepCell, driver: Driver, run: Run, attacks: Mapping[str, str]
) -> pathlib.Path:
    for arm in filter(None, (cell.matched_to, cell.direction)):
        if arm not in attacks:
            raise ConfigError(f"the attack {arm} that it refers to failed")
    reference, direction = (attacks.get(a, "") for a in (cell.matched_to, cell.direction))
    settings = attack_config(config, cell, reference, direction)
    done = driver.run_cell(ATTACK, settings, parent=run, reuse=True)
    return checkpoint_of(done, driver.store)


def _basin(config: SweepConfig, driver: Driver, run: Run, healed: RunView) -> RunView:
    """The landscape of a healing run."""
    shared = _shared(config)
    settings = BasinConfig(
        heal_run_id=healed.run_id,
        device=shared["device"],
        output_dir=shared["output_dir"],
        verbosity=shared["verbosity"],
    )
    done = driver.run_cell(BASIN, BasinCell(settings), parent=run, reuse=True)
    return done.view or driver.store.get_run(done.run_id)
