"""Configuration of the ``attack`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.arm_tags import arm_role, arms_of
from healing.config.options import AUTO, option
from healing.config.shared import OPTIMIZERS, BaseConfig, DryRunOptions
from healing.errors import ConfigError
from healing.registry import ARMS, DAMAGE_CONTROL

NOISE_MATCHES = ("norm", "loss", "rank")
SUBSPACES = ("singular", "hessian")
BY_ARM, ALWAYS, NEVER = ALIGNMENT_CHOICES = ("by_arm", "always", "never")


@dataclass(frozen=True, kw_only=True)
class AttackConfig(BaseConfig, DryRunOptions):
    """One attack: a healthy model, an arm, a budget."""

    order = (..., "dry_run")

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
        "healthy model (for 135 million weights 10 s on two cores, kept in --cache-dir), and at "
        "every measurement about what one to two steps take.",
        choices=ALIGNMENT_CHOICES,
        separates=False,
        later=True,
    )
    baseline_interval: int = option(
        0,
        "Measurements between those of the alignment's baselines (random tokens, clean text); 0 = "
        "at the first and the last one.",
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
        "gaussian_noise: attack checkpoint that the noise is matched to; empty = noise_scale is "
        "used.",
        determines=False,
    )
    reference_run_id: str = option(
        "", "gaussian_noise: the same, given as an MLflow attack run.", determines=False
    )
    match: str = option(
        "norm",
        "gaussian_noise with a reference: equal weight change per tensor (norm), or one scale for "
        "all tensors at which the probe's loss or rank is the reference's within 2 %.",
        choices=NOISE_MATCHES,
    )
    noise_scale: float = option(
        1.0,
        "gaussian_noise without a reference: standard deviation of the noise over that of "
        "each tensor.",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        ARMS.check(self.arm)
        self._check_reference()
        if self.warmup_steps and self.attack_optimizer != "adamw":
            raise ConfigError(
                "--warmup-steps prepares AdamW's second moment: leave it out with "
                f"--attack-optimizer {self.attack_optimizer}"
            )

    def _check_reference(self) -> None:
        given = [n for n in ("reference_checkpoint", "reference_run_id") if getattr(self, n)]
        flags = ["--" + name.replace("_", "-") for name in given]
        matched = " or ".join(arms_of(DAMAGE_CONTROL))
        if given and arm_role(self.arm) != DAMAGE_CONTROL:
            raise ConfigError(f"{flags[0]} belongs to --arm {matched}, not to {self.arm}")
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(flags)} exclude each other: give one of them")
        if self.match != "norm" and not given:
            raise ConfigError(
                f"--match {self.match} needs the attack to match: give --reference-run-id or "
                f"--reference-checkpoint with --arm {matched}"
            )
