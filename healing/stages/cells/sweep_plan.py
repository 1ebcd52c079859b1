"""The cells of a sweep, in chains: which attack of which model and seed, and what it refers to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from healing.config.arm_tags import SHAM_ARM, arm_needs, arm_role, arm_takes
from healing.config.attack import RANK_AND_LOSS
from healing.config.presets import MODELS, model_label
from healing.config.sweep import SweepConfig
from healing.registry import DAMAGE_CONTROL, SHAM, TREATMENT


@dataclass(frozen=True)
class SweepCell:
    """One attack and the healing of its checkpoint.

    Attributes:
        model: As given.
        arm: Of the attack.
        seed: Of attack and healing.
        revision: Of the model.
        deduped: Of the model.
        matched_to: Arm whose attack of the same seed a damage control takes as its reference.
        direction: Arm whose attack of the same seed gives the direction of a ray.
        draw: Number of a damage control's noise.
    """

    model: str
    arm: str
    seed: int
    revision: str = ""
    deduped: bool = False
    matched_to: str = ""
    direction: str = ""
    draw: int = 0

    @property
    def role(self) -> str:
        """Of the arm."""
        return arm_role(self.arm)

    @property
    def label(self) -> str:
        """The model as runs are grouped by."""
        return model_label(self.model, self.revision, self.deduped)

    @property
    def title(self) -> str:
        """For the progress bar."""
        draw = f" draw {self.draw}" if self.draw else ""
        return f"{self.label} {self.arm} seed {self.seed}{draw}"


def plan(config: SweepConfig) -> list[list[SweepCell]]:
    """Chains of cells: the arms of one model and seed, the largest model first; before all a model
    of unknown size.

    Within a chain the sham comes first, since the others refer to it, and a damage control comes
    after the attacks that it refers to: once for every treatment and draw.
    """
    wanted = config.arm_list()
    if config.sham and SHAM_ARM not in wanted:
        wanted = (SHAM_ARM, *wanted)
    arms = sorted(wanted, key=lambda arm: (arm_role(arm) != SHAM, arm_role(arm) == DAMAGE_CONTROL))
    seeds = config.seeds_by_model()
    return [
        [cell for arm in arms for cell in _cells(config, model, seed, arm, arms)]
        for model in sorted(config.model_list(), key=_size, reverse=True)
        for seed in seeds[model]
    ]


def _cells(
    config: SweepConfig, model: str, seed: int, arm: str, arms: Sequence[str]
) -> list[SweepCell]:
    """Of one arm: one, but of a damage control one for every treatment and draw."""
    plain = SweepCell(model, arm, seed, config.revision, config.deduped)
    if plain.role != DAMAGE_CONTROL:
        return [plain]
    direction = config.ray_of if "direction" in arm_needs(arm) else ""
    treatments = [other for other in arms if arm_role(other) == TREATMENT]
    draws = arm_takes(arm, "noise_draw") or (treatments and config.match_of(arm) == RANK_AND_LOSS)
    return [
        replace(plain, matched_to=matched_to, direction=direction, draw=draw)
        for matched_to in treatments or [""]
        for draw in range(config.control_draws if draws else 1)
    ]


def _size(model: str) -> int:
    return MODELS.index(model) if model in MODELS else len(MODELS)
