"""One chain of a sweep: the arms of one model and seed, each attacked, healed, and its landscape
examined where that is wanted.

A chain is a function of a frozen, picklable description, of a driver and of the run that its runs
are children of; whoever calls it decides where that is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from healing.config.fingerprint import as_params, fingerprint, not_determining
from healing.config.healer import Healer
from healing.config.options import AUTO
from healing.config.presets import preset_for
from healing.config.sweep import SweepConfig
from healing.data.corpora import dataset_of
from healing.data.hub import CONNECTION_ERRORS
from healing.data.kept_rows import commit_of
from healing.errors import CorpusError
from healing.registry import DAMAGE_CONTROL, SHAM, TREATMENT
from healing.stages.cells.sweep_plan import SweepCell, plan
from healing.tracking.queries import RunView

OF_THE_SWEEP = frozenset(("models", "arms", "seeds", "workers", "healer"))
"""Settings of a sweep that say which chains there are, and nothing of one of them."""


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
        commits: The Hub's data sets that are read, each with the commit that all processes read.
    """

    config: SweepConfig
    cells: tuple[SweepCell, ...]
    source: str = ""
    healer: Healer | None = None
    commits: tuple[tuple[str, str], ...] = ()

    @property
    def title(self) -> str:
        """``nano seed 3``."""
        first = self.cells[0]
        return f"{first.label} seed {first.seed}"

    def first(self, arm: str) -> SweepCell:
        """The first cell of an arm: the one whose attack others refer to."""
        return next(cell for cell in self.cells if cell.arm == arm)

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


def at_one_commit(chains: Sequence[Chain]) -> list[Chain]:
    """The same chains, which read the Hub's data sets as they are now, whenever and wherever each
    of them runs. What the Hub does not answer for is left to each process.
    """
    commits: dict[str, tuple[tuple[str, str], ...]] = {}
    for corpus in sorted({_corpus_of(chain) for chain in chains}):
        commits[corpus] = ()
        # What is wrong with a name, or with the Hub, the cells say.
        with contextlib.suppress(*CONNECTION_ERRORS, ValueError, CorpusError):
            if dataset := dataset_of(corpus):
                commits[corpus] = ((dataset, commit_of(dataset)),)
    return [replace(chain, commits=commits[_corpus_of(chain)]) for chain in chains]


def _corpus_of(chain: Chain) -> str:
    named = chain.config.corpus
    return preset_for(chain.cells[0].model).corpus if named == AUTO else named


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
