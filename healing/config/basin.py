"""Configuration of the ``basin`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import AUTO, option
from healing.config.presets import MODELS_HELP
from healing.config.shared import (
    DEDUPED_HELP,
    REVISION_HELP,
    SPLIT_RULE_HELP,
    SPLIT_RULES,
    TEXT_COLUMN_HELP,
    TOKENIZER_HELP,
    DeviceOptions,
    ModelOptions,
    OutputOptions,
    ResumeOptions,
    SystemOptions,
    ThreadOptions,
)
from healing.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BasinConfig(
    ModelOptions, ThreadOptions, DeviceOptions, OutputOptions, ResumeOptions, SystemOptions
):
    """The loss landscape around and between the three states of one healing run."""

    order = (
        "heal_run_id",
        "collapsed_checkpoint",
        "healed_checkpoint",
        ...,
        "threads",
        "device",
        "output_dir",
        "verbosity",
        "resume_run_id",
        "system_metrics",
    )

    heal_run_id: str = option(
        "",
        "MLflow healing run whose three states are examined, or its logged model (models:/…).",
    )
    collapsed_checkpoint: str = option(
        "", "Collapsed checkpoint (a path or an MLflow URI), where no healing run is named."
    )
    healed_checkpoint: str = option(
        "", "Healed checkpoint that belongs to --collapsed-checkpoint (a path or an MLflow URI)."
    )
    model: str = option(AUTO, f"Model: {MODELS_HELP}; auto = the one the healed checkpoint names.")
    revision: str = option("", f"{REVISION_HELP} The healed checkpoint brings its own.")
    deduped: bool = option(False, f"{DEDUPED_HELP} The healed checkpoint brings its own.")
    corpus: str = option(
        AUTO, "Clean text (see attack --corpus); auto = as in the healing run.", required=True
    )
    max_documents: int | str = option(
        AUTO, "Documents read from the corpus at most; auto = as in the healing run.", minimum=1
    )
    seed: int | str = option(
        AUTO,
        "Seed of the start vectors and perturbations; auto = the healing run's.",
        minimum=0,
        maximum=2**31 - 1,
        separates=False,
    )
    sequence_length: int | str = option(
        AUTO, "Tokens per window; auto = as in the healing run.", minimum=8, maximum=2048
    )
    probe_tokens: int | str = option(
        AUTO,
        "Tokens of the probe on which paths are measured; auto = as in the healing run.",
        minimum=64,
    )
    curvature_tokens: int = option(
        1024,
        "Tokens of the fixed batch of the Hessian and of each gradient batch (split `attack`).",
        minimum=8,
    )
    gradient_batches: int = option(
        12, "Batches over which the gradient's mean and its error are taken.", minimum=8
    )
    eigenvalues: int = option(
        2, "Eigenvalues wanted at each end of the spectrum.", minimum=1, maximum=1000
    )
    lanczos_iterations: int = option(
        18, "Hessian products of the search for extreme eigenvalues at most.", minimum=2
    )
    curvature_tolerance: float = option(
        1e-3,
        "Share of the largest |eigenvalue| below which a residual counts as converged.",
        minimum=0,
        maximum=0.1,
        exclusive_minimum=True,
    )
    density_probes: int = option(
        1, "Random probes of the spectral density beside the eigenvalue search's own.", minimum=1
    )
    density_iterations: int = option(8, "Lanczos steps per probe of the density.", minimum=2)
    path_points: int = option(
        21,
        "Points on each straight path, ends included; 100 is a multiple of one less.",
        minimum=21,
    )
    perturbations: int = option(
        2,
        "Random perturbations of each state that are followed downhill, beside the descents from "
        "the state itself and along its lowest curvature.",
        minimum=1,
    )
    perturbation_radius: float = option(
        1e-3,
        "Norm of a perturbation over that of the weights.",
        minimum=0,
        maximum=1,
        exclusive_minimum=True,
    )
    escape_steps: int = option(
        10, "Gradient-descent steps (size 1/largest eigenvalue) after a perturbation.", minimum=1
    )
    tokenizer: str = option(AUTO, f"{TOKENIZER_HELP[:-1]}; auto = as in the healing run.")
    text_column: str = option(AUTO, f"{TEXT_COLUMN_HELP} auto = as in the healing run.")
    split_rule: str = option(
        AUTO, f"{SPLIT_RULE_HELP} auto = as in the healing run.", choices=(AUTO, *SPLIT_RULES)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if 100 % (self.path_points - 1):
            raise ConfigError(
                f"--path-points must be 21, 26, 51 or 101 (whole percents apart), got "
                f"{self.path_points}"
            )
        if self.lanczos_iterations < 2 * self.eigenvalues:
            raise ConfigError(
                f"--lanczos-iterations must be at least twice --eigenvalues "
                f"({2 * self.eigenvalues}), got {self.lanczos_iterations}"
            )

    def require_source(self) -> None:
        """Check that the states to examine are named, and named once.

        Raises:
            ConfigError: Neither a healing run nor both checkpoints, or both ways at once.
        """
        files = (self.collapsed_checkpoint, self.healed_checkpoint)
        if self.heal_run_id and any(files):
            raise ConfigError("--heal-run-id excludes --collapsed-checkpoint/--healed-checkpoint")
        if not self.heal_run_id and not all(files):
            raise ConfigError(
                "name a healing run (--heal-run-id), or --collapsed-checkpoint and "
                "--healed-checkpoint"
            )
