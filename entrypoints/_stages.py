"""The entry points: for each its configuration, the function that it calls, and its help."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.heal import HealConfig
from healing.config.import_results import ImportConfig
from healing.config.pretrain import PretrainConfig
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.config.tune import TuneConfig


@dataclass(frozen=True)
class EntryPoint:
    """One command.

    Attributes:
        config: Class of its configuration.
        function: ``module:name`` of what takes it; imported when the command runs, since it needs
            torch and ``--help`` does not.
        help: First paragraph and more, for ``--help``.
        switches: Boolean field → function that takes its place.
    """

    config: type
    function: str
    help: str
    switches: tuple[tuple[str, str], ...] = ()

    def load(self, values: dict[str, Any]) -> Callable[[Any], Any]:
        """The function for these values."""
        chosen = [function for field, function in self.switches if values.get(field)]
        module, _, name = (chosen or [self.function])[0].partition(":")
        function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
        return function


DRY_RUN = ("dry_run", "healing.stages.dry_run.stage:dry_run")

STAGES = {
    "main": EntryPoint(
        SweepConfig,
        "healing.stages.sweep:sweep",
        "Attack and heal every model x arm x seed, then summarize; finished cells are kept.",
    ),
    "attack": EntryPoint(
        AttackConfig,
        "healing.stages.attack:attack",
        "Attack a healthy model, follow rank and perplexity, and store the collapsed checkpoint.",
        (DRY_RUN,),
    ),
    "heal": EntryPoint(
        HealConfig,
        "healing.stages.heal:heal",
        "Fine-tune a collapsed model on clean text and measure how far it recovers.\n\n"
        "Give one checkpoint (--collapsed-checkpoint or --attack-run-id), a folder of checkpoints "
        "(--checkpoint-dir), or nothing: then a fresh attack (--arm, --attack-steps, "
        "--attack-optimizer, --attack-lr, --target-rank-reduction, --catalyst-length) is made and "
        "healed. Others of its options need two steps: attack, then heal --attack-run-id.",
        (DRY_RUN,),
    ),
    "summarize": EntryPoint(
        SummarizeConfig,
        "healing.stages.summarize:summarize",
        "Pool stored healing runs by model and arm: recovery with intervals, verdicts, figures.",
        (("legacy", "healing.predecessor.summarize_stage:summarize_imported"),),
    ),
    "import_results": EntryPoint(
        ImportConfig,
        "healing.predecessor.import_stage:import_results",
        "Read the predecessor's result folders into MLflow as runs of their own, marked as "
        "legacy.\n\nA recorded run that was imported before is not imported again. Summarize the "
        "imported runs with: summarize --legacy true",
    ),
    "pretrain": EntryPoint(
        PretrainConfig,
        "healing.stages.pretrain:pretrain",
        "Train an embedded model (nano or micro) and its tokenizer from nothing, tracked in "
        "MLflow.",
    ),
    "basin": EntryPoint(
        BasinConfig,
        "healing.stages.basin:basin",
        "Say whether the collapsed state of a healing run is a minimum, with the evidence.\n\n"
        "Gradient, curvature and escape in the healthy, collapsed and healed state, loss barriers "
        "between them. Give --heal-run-id, or both checkpoints.",
    ),
    "tune": EntryPoint(
        TuneConfig,
        "healing.stages.tune:tune",
        "Search the strongest healer of a model: the settings of healing with the lowest final "
        "loss.\n\n"
        "Every healer gets the same tokens on the same selection checkpoints; the default one "
        "comes first. The winner is healer.json in the run, for --healer of heal and main.",
    ),
}
