"""Configuration of the ``attack`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.arm_tags import (
    arm_matches,
    arm_needs,
    arm_takes,
    arms_of,
    arms_that_need,
    arms_that_take,
)
from healing.config.options import AUTO, flag_name, option
from healing.config.shared import (
    LOGGING,
    OPTIMIZERS,
    BaseConfig,
    DryRunOptions,
    LoggingOptions,
    SavingOptions,
)
from healing.errors import ConfigError
from healing.registry import ARMS, DAMAGE_CONTROL, MATCHES

RANK_AND_LOSS = "rank+loss"
"""The match in rank by the arm's own strength, then in loss by noise on the readout."""
NOISE_RANK_HELP = "low_rank_noise: rank of the noise in every matrix."
_OWN = {"noise_rank": 1, "noise_draw": 0}
"""Options that only some arms take (``OPTIONS`` in their files), and their defaults."""
TRAJECTORY_HELP = (
    "Optimiser steps between the points of the attack's curve: measurements beside those of "
    "--measurement-interval, which alone decide when the attack ends; 0 = none, auto = 1 for nano "
    "and micro, else 5."
)
SUBSPACES = ("singular", "hessian")
BY_ARM, ALWAYS, NEVER = ALIGNMENT_CHOICES = ("by_arm", "always", "never")


@dataclass(frozen=True, kw_only=True)
class AttackConfig(BaseConfig, SavingOptions, LoggingOptions, DryRunOptions):
    """One attack: a healthy model, an arm, a budget."""

    order = (
        ...,
        "checkpoint_interval",
        "checkpoint_minutes",
        "resume_run_id",
        *(name for name in LOGGING if name != "log_text"),
        "dry_run",
        "time_steps",
    )

    arm: str = option("haep", lambda: f"Attack method. {ARMS.describe()}.", choices=ARMS.names)
    attack_steps: int | str = option(AUTO, "Budget in optimiser steps; auto = by model.", minimum=0)
    attack_optimizer: str = option(
        "adamw", "Optimiser of the arms that descend an objective.", choices=OPTIMIZERS
    )
    attack_lr: float | str = option(
        AUTO,
        "Learning rate of the attack; auto = by model and optimiser.",
        minimum=0,
        exclusive_minimum=True,
    )
    warmup_steps: int = option(
        0,
        "Clean batches that AdamW's second moment sees before the attack; the weights stay.",
        minimum=0,
    )
    target_rank_reduction: float = option(
        0.35,
        "Stop once the effective rank on the clean probe fell by this share (0 to 1); "
        "1 = use the whole budget.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    trajectory_interval: int | str = option(AUTO, TRAJECTORY_HELP, minimum=0, determines=False)
    catalyst_length: int = option(
        16, "Tokens of the sequence the attack trains on.", minimum=8, maximum=2048
    )
    search_steps: int = option(
        12, "Rounds of the catalyst search (haep); 0 = keep the random start.", minimum=0
    )
    search_candidates: int = option(
        12, "Token swaps re-evaluated per round of the catalyst search.", minimum=1
    )
    baseline_draws: int = option(
        24, "Random sequences that the catalyst's alignment is compared with.", minimum=3
    )
    subspace: str = option(
        "singular",
        "Low-curvature subspace: the complement of each weight matrix's leading singular "
        "directions, or of the leading eigenvectors of the clean loss's Hessian.",
        choices=SUBSPACES,
    )
    subspace_energy: float = option(
        0.99,
        "singular: share of each weight matrix's energy in its leading directions.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    hessian_directions: int = option(
        16, "hessian: leading eigenvectors left out of the subspace.", minimum=1
    )
    alignment: str = option(
        BY_ARM,
        "Whether the alignment of gradients and weight change with the low-curvature subspace is "
        "measured along the attack: by_arm = for the arms that train on one sequence (haep, "
        "haep_oracle, random_tokens, random_text), always, never. It takes the subspace, once per "
        "healthy model (for 135 million weights 10 s on two cores, kept in --cache-dir), and makes "
        "every measurement of the attack take about a quarter longer.",
        choices=ALIGNMENT_CHOICES,
        separates=False,
        later=True,
    )
    baseline_interval: int = option(
        0,
        "Measurements of --measurement-interval between those of the alignment's baselines (random "
        "tokens, clean text); 0 = at the first and the last one.",
        minimum=0,
        separates=False,
        later=True,
    )
    curvature_tokens: int | str = option(
        AUTO,
        "Tokens of the attack split that the Hessian is taken on; auto = 1024 for nano and micro, "
        "else 256.",
        minimum=8,
    )
    rayleigh_draws: int | str = option(
        AUTO,
        "haep, haep_oracle: random directions that the curvature along the gradient is ranked "
        "among, a Hessian product each; 0 = not measured, auto = 16 for nano and micro, else 8.",
        minimum=0,
    )
    reference_checkpoint: str = option(
        "",
        "Damage controls: attack checkpoint that the damage is matched to; empty = noise_scale is "
        "used.",
        determines=False,
    )
    reference_run_id: str = option(
        "", "Damage controls: the same, given as an MLflow attack run.", determines=False
    )
    match: str = option(
        "norm",
        "Damage controls with a reference: equal weight change per tensor (norm), or the strength "
        "at which the probe's loss or rank is the reference's within 2 %; rank+loss: its rank by "
        "the strength, then its loss by noise on the readout, which no hidden state sees.",
        choices=MATCHES,
    )
    noise_scale: float = option(
        1.0,
        "Damage controls without a reference: standard deviation of the noise over that of each "
        "tensor; of sharpened_spectrum and ray the strength.",
        minimum=0,
    )
    noise_rank: int = option(1, NOISE_RANK_HELP, minimum=1, maximum=2**16, later=True)
    noise_draw: int = option(
        0,
        "Arms that draw noise, and any with match rank+loss: number of the draw; each gives a "
        "checkpoint of its own for the same reference.",
        minimum=0,
        separates=False,
        later=True,
    )
    direction_checkpoint: str = option(
        "", "ray: attack checkpoint whose weight change is the direction.", determines=False
    )
    direction_run_id: str = option(
        "", "ray: the same, given as an MLflow attack run.", determines=False
    )

    start_checkpoint: str = option(
        "",
        "Healed checkpoint (a path or an MLflow URI) that is attacked instead of the healthy "
        "weights, exactly as it was the first time: how many steps to the same rank?",
        determines=False,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ARMS.check(self.arm)
        self._check_reference()
        self._check_own_options()
        if self.warmup_steps and self.attack_optimizer != "adamw":
            raise ConfigError(
                "--warmup-steps prepares AdamW's second moment: leave it out with "
                f"--attack-optimizer {self.attack_optimizer}"
            )

    def _check_reference(self) -> None:
        controls = arms_of(DAMAGE_CONTROL)
        reference = self._checkpoint("reference", controls)
        self._checkpoint("direction", arms_that_need("direction"))
        if self.match != "norm" and not reference:
            raise ConfigError(
                f"--match {self.match} needs the attack to match: give --reference-run-id or "
                f"--reference-checkpoint with --arm {_one_of(controls)}"
            )
        if reference and self.match not in arm_matches(self.arm):
            raise ConfigError(
                f"--arm {self.arm} cannot be matched in {self.match}: give --match "
                f"{_one_of(arm_matches(self.arm))}"
            )

    def _checkpoint(self, what: str, arms: tuple[str, ...]) -> bool:
        """Whether the checkpoint of another attack is given, to one of the arms that take it."""
        given = [n for n in (f"{what}_checkpoint", f"{what}_run_id") if getattr(self, n)]
        flags = [flag_name(name) for name in given]
        if given and self.arm not in arms:
            raise ConfigError(f"{flags[0]} belongs to --arm {_one_of(arms)}, not to {self.arm}")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(flags)} exclude each other: give one of them")
        if not given and what in arm_needs(self.arm):
            raise ConfigError(
                f"--arm {self.arm} needs the weight change of another attack: give --{what}-run-id "
                f"or --{what}-checkpoint"
            )
        return bool(given)

    def _check_own_options(self) -> None:
        for name, default in _OWN.items():
            if getattr(self, name) == default or arm_takes(self.arm, name):
                continue
            if name == "noise_draw" and self.match == RANK_AND_LOSS:
                continue
            arms = _one_of(arms_that_take(name))
            raise ConfigError(f"{flag_name(name)} belongs to --arm {arms}, not to {self.arm}")


def _one_of(names: tuple[str, ...]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
