"""Configuration of the ``tune`` stage: which healers are tried, on what, within which budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from healing.config.arm_tags import arm_needs, arm_role
from healing.config.options import AUTO, MAX_SEED, listed, option, seed_number
from healing.config.presets import MODELS_HELP, preset_for
from healing.config.shared import BaseConfig, SystemOptions
from healing.errors import ConfigError
from healing.registry import ARMS, DAMAGE_CONTROL, SHAM

RATE, OPTIMIZER, WARMUP, DECAY, CLIP, BATCH, NORMS, METHOD = AXES = (
    "rate",
    "optimizer",
    "warmup",
    "decay",
    "clip",
    "batch",
    "norms",
    "method",
)
"""What healers can differ in."""
TPE, GRID = SAMPLERS = ("tpe", "grid")
MEDIAN, HALVING, NO_PRUNER = PRUNERS = ("median", "halving", "none")
BUDGETS_OF_MAIN = 4
"""Default tokens of a healer over those of a cell of ``main``: at main's own budget every healer is
cut off while it still gains."""


@dataclass(frozen=True, kw_only=True)
class TuneConfig(BaseConfig, SystemOptions):
    """The search for the strongest healer of one model."""

    model: str = option("nano", f"Model: {MODELS_HELP}.")
    seed: int = option(0, "Seed of the search: which healers are tried.", minimum=0)
    arms: str = option(
        "haep", "Comma-separated arms of the selection checkpoints; no damage control, no sham."
    )
    seeds: str = option(
        "100,101",
        "Comma-separated seeds of the selection checkpoints, one per arm and seed; no verdict may "
        "use them later.",
    )
    attack_steps: int | str = option(AUTO, "Attack budget; auto = by model.", minimum=0)
    trials: int = option(
        24, "Healers tried, the default one and those ended early included.", minimum=1
    )
    token_budget: int | str = option(
        AUTO,
        "Training tokens of each healer per checkpoint, whatever its batch size; auto = "
        f"{BUDGETS_OF_MAIN} times those of a cell of main.",
        minimum=1,
        maximum=10**13,
    )
    rungs: int = option(
        5,
        "Measurements per checkpoint, evenly over its budget; at those of the first checkpoint and "
        "at the end of each other a healer may be ended early.",
        minimum=1,
    )
    sampler: str = option(
        TPE,
        "How healers are proposed: by a tree-structured Parzen estimator, or from the grid of all "
        "combinations in a drawn order.",
        choices=SAMPLERS,
    )
    pruner: str = option(
        MEDIAN,
        "What ends a healer early: worse than the median of the finished ones at the same tokens, "
        "successive halving, or nothing.",
        choices=PRUNERS,
    )
    startup_trials: int = option(
        8, "Healers drawn at random before tpe learns, and finished before median ends one.",
        minimum=1,
    )  # fmt: skip
    axes: str = option(
        ",".join(axis for axis in AXES if axis != METHOD),
        f"Comma-separated, what healers differ in: {', '.join(AXES)} (which needs peft); in the "
        "rest they are the default one.",
    )
    rate_lowest: float = option(
        0.1, "Lowest rate over the default one of the model, method and optimiser.",
        minimum=0, exclusive_minimum=True,
    )  # fmt: skip
    rate_highest: float = option(
        30.0, "Highest rate over that default.", minimum=0, exclusive_minimum=True
    )
    grid_rates: int = option(5, "grid: rates, evenly on a log scale.", minimum=2)
    sgd_rate_ratio: float = option(
        30.0, "Default rate of SGD over AdamW's.", minimum=0, exclusive_minimum=True
    )
    sgd_momentum: float = option(0.9, "Momentum of SGD.", minimum=0, maximum=0.999)
    warmups: str = option("0,0.05,0.1,0.2", "Shares of the steps that the warm-up may take.")
    clips: str = option("0,1", "Gradient norms that may be clipped to; 0 = no clipping.")
    batch_sizes: str = option("4,8,16,32", "Windows per step that there may be.")
    study: str = option(
        "",
        "Name of the study; one that exists is gone on with. Empty = a name made of the settings, "
        "so that the same command goes on.",
        determines=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.arm_list(), self.seed_list(), self.axis_list()
        if not self.rate_lowest < self.rate_highest:
            raise ConfigError("--rate-lowest must be below --rate-highest")
        if set(self.study) & set("/\\\0") or self.study in (".", ".."):
            raise ConfigError(f"--study {self.study!r} is the name of a folder: no path")
        self._check_default()
        self._check_tokens()

    def arm_list(self) -> tuple[str, ...]:
        """Arms in the order given."""
        arms = listed(self.arms, "--arms", ARMS.names())
        for arm in arms:
            ARMS.check(arm)
            if arm_role(arm) in (DAMAGE_CONTROL, SHAM) or arm_needs(arm):
                raise ConfigError(
                    f"--arms {arm}: a healer is selected on states of attacks that need no other, "
                    "which a damage control, a ray and the sham are not"
                )
        return arms

    def seed_list(self) -> tuple[int, ...]:
        """Selection seeds in the order given."""
        items = listed(self.seeds, "--seeds")
        seeds = tuple(seed_number(item) for item in items)
        found = tuple(seed for seed in seeds if seed is not None)
        if len(found) < len(seeds):
            raise ConfigError(
                f"--seeds must be whole numbers from 0, as in 100,101; got {self.seeds!r} (at most "
                f"{MAX_SEED})"
            )
        if len(set(found)) < len(found):
            raise ConfigError(f"--seeds names one seed twice: {self.seeds}")
        return found

    def axis_list(self) -> tuple[str, ...]:
        """Axes in the order given."""
        return listed(self.axes, "--axes", AXES)

    def choices(self, axis: str) -> tuple[Any, ...]:
        """Values of one of the axes that are given as a list.

        Raises:
            ConfigError: An entry is not a number of its kind.
        """
        text, flag, kind, low, high = {
            WARMUP: (self.warmups, "--warmups", float, 0.0, 1.0),
            CLIP: (self.clips, "--clips", float, 0.0, 1e9),
            BATCH: (self.batch_sizes, "--batch-sizes", int, 1, 1e9),
        }[axis]
        try:
            values = tuple(kind(item) for item in listed(text, flag))
        except ValueError:
            values = ()
        if not values or not all(low <= value <= high for value in values):
            what = "whole numbers from 1" if kind is int else f"numbers from {low:g} to {high:g}"
            raise ConfigError(f"{flag} must be {what}, separated by commas; got {text!r}")
        return values

    @property
    def default_batch(self) -> int:
        """Windows per step of the default healer."""
        given = self.batch_size
        return preset_for(self.model).batch_size if given == AUTO else int(given)

    def batches(self) -> tuple[int, ...]:
        """Every batch size that a healer may have."""
        return self.choices(BATCH) if BATCH in self.axis_list() else (self.default_batch,)

    @property
    def tokens(self) -> int:
        """Training tokens of a healer per checkpoint."""
        if self.token_budget != AUTO:
            return int(self.token_budget)
        preset = preset_for(self.model)
        steps = BUDGETS_OF_MAIN * preset.sweep_healing_steps
        return steps * preset.batch_size * self.sequence_length

    def _check_default(self) -> None:
        """The default healer has to be among those that can be tried: it is what others beat."""
        plain = {WARMUP: 0.0, CLIP: 0.0, BATCH: self.default_batch}
        flags = {WARMUP: "--warmups", CLIP: "--clips", BATCH: "--batch-sizes"}
        for axis, value in plain.items():
            if axis in self.axis_list() and value not in self.choices(axis):
                raise ConfigError(
                    f"{flags[axis]} must hold {value:g}, the default healer's: the others are "
                    "compared with it"
                )
        if RATE in self.axis_list() and not self.rate_lowest <= 1 <= self.rate_highest:
            raise ConfigError(
                "--rate-lowest and --rate-highest must have 1 between them, the default healer's "
                "rate: the others are compared with it"
            )

    def _check_tokens(self) -> None:
        """Every batch size takes whole steps between two measurements."""
        unit = math.lcm(*self.batches()) * self.sequence_length * self.rungs
        if self.tokens % unit:
            below = self.tokens // unit * unit
            near = f"{below} or {below + unit}" if below else f"{unit}"
            sizes = ", ".join(map(str, self.batches()))
            raise ConfigError(
                f"--token-budget {self.tokens} does not make {self.rungs} rungs of whole steps for "
                f"batches of {sizes} x {self.sequence_length} tokens: {near} does"
            )
