"""How many models a stage has in memory: a second one of 1 billion parameters takes 4 GB."""

from __future__ import annotations

import gc
import weakref

import pytest

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.sweep import SweepConfig
from healing.stages.attack import attack
from healing.stages.cells import inputs
from healing.stages.heal import heal
from healing.stages.sweep import sweep

pytestmark = pytest.mark.slow

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 1024, "batch_size": 4,
         "verbosity": "quiet"}  # fmt: skip
FAST = {"arm": "random_tokens", "attack_steps": 2, "search_steps": 1, "search_candidates": 2,
        "baseline_draws": 3, "rayleigh_draws": 0}  # fmt: skip


@pytest.fixture
def alive(monkeypatch) -> list[int]:
    """Models alive as each further one is about to be loaded."""
    known: list[weakref.ref] = []
    counts: list[int] = []
    load = inputs.load_model

    def counted(*args, **options):
        gc.collect()
        counts.append(sum(reference() is not None for reference in known))
        loaded = load(*args, **options)
        known.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(inputs, "load_model", counted)
    return counts


def test_attack_loads_one(store, alive):
    attack(AttackConfig(**SMALL, **FAST))
    assert alive == [0]


def test_healing_several_times_beside_a_sham_never_holds_two(store, alive):
    path = attack(AttackConfig(**SMALL, **FAST))[1]
    heal(
        HealConfig(**SMALL, collapsed_checkpoint=str(path), num_runs=2, healing_steps=2, sham=True)
    )
    assert alive == [0] * 5  # the attack; per replicate its sham and its healing


def test_a_sweep_of_one_worker_never_holds_two(store, alive):
    sweep(
        SweepConfig(
            models="nano", arms="random_tokens,spectral", seeds="0", workers=1, sham=True,
            attack_steps=2, healing_steps=2, basin=False, verbosity="quiet",
        )
    )  # fmt: skip
    assert alive == [0] * 5  # the sham's healing; attack and healing of each treated cell
