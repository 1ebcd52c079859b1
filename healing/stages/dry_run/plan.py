"""What an attack or a healing run would do and leave on disk: counts, from its configuration
alone.
"""

from __future__ import annotations

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.shared import RAW_DATA
from healing.tracking.output_folder import output_folder

FINE_TUNING = ("haep", "haep_oracle", "random_tokens", "random_text")
"""Arms whose steps are gradient steps on one short sequence."""
SEARCHING = ("haep", "haep_oracle")
"""Arms that search a catalyst."""


def attack_plan(config: AttackConfig, n_params: int) -> list[str]:
    """Lines on one attack.

    Args:
        config: Resolved; at most all steps are taken, fewer where the target is reached.
        n_params: Parameters of the model.
    """
    steps = {"none": 0, "reinitialised": 1}.get(config.arm, int(config.attack_steps))
    seen = f"; a step sees {config.catalyst_length}" if config.arm in FINE_TUNING else ""
    lines = [
        f"plan: one attack ({config.arm}) of at most {steps:,} steps, "
        f"{attack_measurements(steps, config)} measurements of "
        f"{int(config.probe_tokens):,} tokens{seen}"
    ]
    if config.arm in SEARCHING:
        lines.append(
            f"  search: {config.search_steps} rounds of {config.search_candidates} candidates, "
            f"{config.baseline_draws} random sequences, each of {config.catalyst_length} tokens"
        )
        if draws := int(config.rayleigh_draws):
            tokens = int(config.curvature_tokens)
            lines.append(
                f"  curvature ranks: {1 + draws} Hessian products on {tokens:,} "
                "tokens (about 3.5 gradients of these tokens for the first, 2.2 for each other)"
            )
    return [
        *lines,
        f"  files: {_place(config)}, with config.json, metrics.jsonl, attack_summary.json, "
        "spectra.json, figures and checkpoints/",
        f"  disk: {_gigabytes(n_params)} GB for the checkpoint",
    ]


def heal_plan(config: HealConfig, n_params: int) -> list[str]:
    """Lines on the healing of one checkpoint; a sham is another run of the same size.

    Args:
        config: Resolved.
        n_params: Parameters of the model.
    """
    steps, tokens = int(config.healing_steps), int(config.batch_size) * config.sequence_length
    runs = healing_runs(config)
    shams = " and as many of the sham" if with_shams(config) else ""
    per = " per checkpoint" if config.checkpoint_dir else ""
    disk = f"{_gigabytes(n_params)} GB for each run's healed weights"
    return [
        f"plan: {runs} healing run(s){per}{shams}, each of {steps:,} steps of {tokens:,} tokens "
        f"({steps * tokens:,}), {measurements(steps, config.measurement_interval)} measurements "
        f"of {int(config.probe_tokens):,} tokens",
        f"  files: {_place(config)} a run, with config.json, metrics.jsonl, healing_summary.json, "
        f"spectra.json, figures{' and checkpoints/' if config.save_healed else ''}",
        f"  disk: {disk if config.save_healed else 'no weights are kept'}",
    ]


def _place(config: AttackConfig | HealConfig) -> str:
    """Where the folders of runs are; their names hold a fingerprint that is not known yet."""
    return f"a folder in {output_folder(config.output_dir) / RAW_DATA}"


def healing_runs(config: HealConfig) -> int:
    """Of one checkpoint, without shams."""
    return config.runs_per_checkpoint if config.checkpoint_dir else config.num_runs


def with_shams(config: HealConfig) -> bool:
    """Whether every run has a sham beside it."""
    return config.sham and config.arm != "none"


def measurements(steps: int, interval: int) -> int:
    """Two with standard errors (of an attack's begin and end; of the healthy and the collapsed
    model before healing), and one every interval and at the last step.
    """
    return 2 + steps // interval + bool(steps % interval)


def attack_measurements(steps: int, config: AttackConfig) -> int:
    """The same of an attack, with those of its curve.

    Args:
        steps: At most taken.
        config: Resolved.
    """
    intervals = [i for i in (config.measurement_interval, int(config.trajectory_interval)) if i]
    taken = range(1, steps + 1)
    return 2 + sum(s == steps or any(s % every == 0 for every in intervals) for s in taken)


def _gigabytes(n_params: int) -> str:
    return f"{4 * n_params / 1e9:.2g}"
