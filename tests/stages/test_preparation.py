"""Attacks that are cut while they are prepared, or while a strength is searched, go on to the same
bytes, and do nothing twice.
"""

from __future__ import annotations

import contextlib
import pathlib
from collections import Counter
from collections.abc import Iterator

import pytest

from healing.attacks import catalyst_search, clean_hessian
from healing.attacks.damage_matching import _Trials
from healing.curvature import stochastic_lanczos
from healing.progress import Stop, Stopped
from healing.stages.cells.state_classes import STATE_CLASSES
from healing.stages.driver import Driver
from healing.stages.terminal.console import Console
from healing.tracking.snapshots import FileSnapshots, Kept
from tests.stages.test_resume import Died, a_store, attacked, files, histories

pytestmark = pytest.mark.slow

ALWAYS = {"checkpoint_interval": 0, "checkpoint_minutes": 1e-9}
"""Every finished part is kept at once."""
HAEP = {**ALWAYS, "search_steps": 2, "rayleigh_draws": 2, "attack_steps": 1, "arm": "haep"}


class CutAtSave(FileSnapshots):
    """Snapshots of a process that ends when it has kept its so-manieth state."""

    def __init__(self, number: int = -1, *, dies: bool = False) -> None:
        super().__init__(STATE_CLASSES)
        self.number, self.dies, self.stop, self.saved = number, dies, Stop(), 0

    def save(self, folder: pathlib.Path, kept: Kept) -> None:
        super().save(folder, kept)
        self.saved += 1
        if self.saved == self.number:
            if self.dies:
                raise Died
            self.stop.set()


def driven(snapshots: CutAtSave) -> Driver:
    return Driver(Console("quiet"), stop=snapshots.stop, snapshots=snapshots)


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often the dear parts are done in the block."""
    done: Counter[str] = Counter()

    def counting(owner: object, name: str) -> None:
        inner = getattr(owner, name)

        def call(*args: object, **kwargs: object) -> object:
            result = inner(*args, **kwargs)
            done[name] += 1  # of one that was stopped amid there is no result
            return result

        patched.setattr(owner, name, call)

    with monkeypatch.context() as patched:
        counting(catalyst_search, "sequence_alignments")
        counting(stochastic_lanczos, "rayleigh_quotient")
        counting(clean_hessian, "lanczos")
        counting(_Trials, "_measured")
        yield done


def same_wherever_it_is_cut(monkeypatch, root: pathlib.Path, least: int, **changes) -> None:
    """Cut an attack after each state that it keeps, by a death and by a stop in turn."""
    arm = changes.pop("arm")
    every = CutAtSave()
    with a_store(root / "whole.db"), counted(monkeypatch) as expected:
        attacked(root / "whole", arm, driven(every), **changes)
        whole, whole_history = files(root / "whole", "_attack_"), histories()
    assert whole
    assert every.saved >= least
    for number in range(1, every.saved + 1):
        dies, place = number % 2 == 0, root / f"cut{number}"
        with a_store(root / f"cut{number}.db"), counted(monkeypatch) as done:
            # Where the last state is kept, a stop may come after everything was computed.
            with pytest.raises(Died if dies else Stopped):
                attacked(place, arm, driven(CutAtSave(number, dies=dies)), **changes)
            attacked(place, arm, driven(CutAtSave()), **changes)
            found = files(place, "_attack_")
            assert [n for n in whole if whole[n] != found.get(n)] == [], number
            assert found.keys() == whole.keys()
            assert histories() == whole_history, number
            assert done == expected, number
        assert not list(place.rglob(".*.state"))


def test_a_search_cut_after_any_round_and_a_ranking_after_any_product(store, monkeypatch):
    # The healthy measurement, the start, two rounds, three products, the step.
    same_wherever_it_is_cut(monkeypatch, store, 8, **HAEP)


def test_directions_of_the_hessian_are_found_once(store, monkeypatch):
    # The healthy measurement, the directions, the start, one round, the step.
    changes = {"subspace": "hessian", "hessian_directions": 2, "rayleigh_draws": 0}
    same_wherever_it_is_cut(monkeypatch, store, 5, **{**HAEP, **changes, "search_steps": 1})


def test_a_searched_strength_cut_after_any_that_was_tried(store, monkeypatch):
    attacked(store / "reference", "random_tokens", driven(CutAtSave()), attack_steps=3)
    (checkpoint,) = (store / "reference").rglob("checkpoint_post_treatment.pt")
    same_wherever_it_is_cut(
        monkeypatch,
        store,
        3,
        **ALWAYS,
        arm="gaussian_noise",
        reference_checkpoint=str(checkpoint),
        match="loss",
    )
