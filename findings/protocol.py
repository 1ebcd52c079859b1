"""docs/protocol.md as data: arms, seeds, budgets and healers. A change here is a change of the
protocol, and is committed before the runs that it governs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from healing.config.arm_tags import arm_label

TREATMENT = "haep"
STRONG = "strong"
"""The healer whose results answer the question: the tuner's winner, frozen before."""
SCRATCH_ARM = "reinitialised"
"""The untrained model: what learning from scratch makes of the same tokens."""
ATTACK_ALONE = "attack alone"
"""Stands where a healer would, of states that are not healed."""
PRESET = "preset"
"""The model's default rate, constant: what somebody would use without tuning."""


@dataclass(frozen=True, eq=False)
class Arm:
    """One arm of a part.

    Attributes:
        name: Of the arm.
        settings: Options of the attack beyond the part's.
        reference: Arm of the same seed that it is matched to; empty = none.
        seeds: How many of the part's seeds; 0 = all.
        healers: Which of the part's healers; empty = the strong one.
        healed: Whether its states are healed; else the attack alone is run.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    reference: str = ""
    seeds: int = 0
    healers: tuple[str, ...] = ()
    healed: bool = True


@dataclass(frozen=True)
class Part:
    """One model's share of the experiment.

    Attributes:
        model: Preset; another model is named on the command line.
        arms: The sham first, references before what is matched to them.
        seeds: Of the checkpoints: none of the tuner's selection.
        healers: Name → healing settings.
        steps: Healing steps of the whole budget.
        interval: Healing steps between measurements.
        attack: Options of every attack.
        shared: Options of attack and healing.
        commit: Of the code and the protocol that its table was made by; empty = not run.
    """

    model: str
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    healers: Mapping[str, Mapping[str, Any]]
    steps: int
    interval: int
    attack: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    commit: str = ""

    @property
    def budgets(self) -> tuple[int, ...]:
        """Steps at which a verdict is read: the whole budget and its halves down to a sixteenth."""
        halves = [self.steps // 2**i for i in range(4, -1, -1)]
        return tuple(step for step in halves if step and step % self.interval == 0)

    def arm_name(self, arm: str) -> str:
        """What an arm is called in the findings."""
        rank = next(a.settings.get("noise_rank", 0) for a in self.arms if a.name == arm)
        return arm_label(arm) + (f" (rank {rank})" if rank else "")

    def chains(self, seed: int) -> list[tuple[Arm, ...]]:
        """Arms of a seed that must run in one process: each that needs no other, and those that are
        matched to it.
        """
        position = self.seeds.index(seed)
        arms = [arm for arm in self.arms if not arm.seeds or position < arm.seeds]
        return [
            (first, *(arm for arm in arms if arm.reference == first.name))
            for first in arms
            if not first.reference
        ]
