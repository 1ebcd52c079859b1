"""One attack as a pure function: what it is, what it leaves, what identifies it."""

from __future__ import annotations

import pathlib
from dataclasses import dataclass
from typing import Any

from healing.attacks.base import AttackRecord, Preparation
from healing.attacks.catalyst_search import Catalyst
from healing.attacks.context import prepare_arm, warmup_batches
from healing.attacks.weight_change import WeightChange
from healing.config.arm_tags import arm_role
from healing.config.attack import AttackConfig
from healing.config.fingerprint import as_params, fingerprint
from healing.config.presets import model_slug
from healing.measurements.kept_measurements import measured
from healing.measurements.probe import Measurement
from healing.measurements.recovery import Damage
from healing.models.checkpoints import read_checkpoint
from healing.models.loading import LoadedModel
from healing.progress import Safe, enter
from healing.registry import ARMS, DAMAGE_CONTROL, HEALTHY
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.events import Begin, Events, Record
from healing.stages.cells.inputs import (
    device_kind,
    few_rows_warnings,
    inputs_read,
    load_inputs,
    measurement_modules,
    rank_and_perplexity,
)


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack cell leaves.

    Attributes:
        config: Resolved configuration.
        fingerprint: Hash of what determined the result.
        loaded: The model, now collapsed.
        healthy: Measurement before.
        collapsed: Measurement after.
        last: Last record of the trajectory.
        preparation: The arm as it was made: catalyst and curvature.
        digests: Corpus digests by split.
    """

    config: AttackConfig
    fingerprint: str
    loaded: LoadedModel
    healthy: Measurement
    collapsed: Measurement
    last: AttackRecord
    preparation: Preparation
    digests: dict[str, str]

    @property
    def catalyst(self) -> Catalyst | None:
        """The search of the tokens that the arm trains on, if there was one."""
        return self.preparation.catalyst

    @property
    def damage(self) -> Damage:
        """Healthy and collapsed state."""
        return Damage(self.healthy.state, self.collapsed.state)

    @property
    def status(self) -> str:
        """``ok``, or ``nonfinite`` where the attack ended on a step that could not be taken."""
        return "ok" if self.last.outcome.finite else "nonfinite"

    @property
    def reached_target(self) -> bool:
        """Whether the rank fell by the target share."""
        return self.damage.rank_reduction_pct >= 100.0 * self.config.target_rank_reduction

    def summary(self) -> dict[str, Any]:
        """Final numbers, as stored in ``attack_summary.json`` and logged as metrics."""
        damage = self.damage
        return {
            "healthy_effective_rank": damage.healthy.effective_rank,
            "healthy_perplexity": damage.healthy.perplexity,
            "healthy_loss": damage.healthy.loss,
            "collapsed_effective_rank": damage.collapsed.effective_rank,
            "collapsed_perplexity": damage.collapsed.perplexity,
            "collapsed_loss": damage.collapsed.loss,
            "rank_reduction_pct": damage.rank_reduction_pct,
            "perplexity_ratio": damage.collapsed.perplexity / damage.healthy.perplexity,
            "rank_standard_error": self.healthy.rank_standard_error,
            "attack_steps_done": self.last.step,
            **(self.catalyst.metrics() if self.catalyst else {}),
            **self.preparation.curvature_metrics,
        }


def attack_code(config: AttackConfig) -> str:
    """Digest of the code that makes an attack's numbers: the cell's, and that of its arm and extra
    measurements, which are loaded by name.

    Raises:
        ConfigError: The arm or a measurement cannot be loaded.
    """
    ARMS.load(config.arm)
    return code_digest(
        "healing.stages.cells.attack", ARMS.module(config.arm), *measurement_modules(config)
    )


def attack_fingerprint(config: AttackConfig, identity: str, digests: dict[str, str]) -> str:
    """Fingerprint of an attack: configuration, healthy model, texts, code, and the weights of the
    attacks it refers to instead of their paths.
    """
    reference = _digest(config.reference_checkpoint)
    if config.direction_checkpoint:
        reference += f" along {_digest(config.direction_checkpoint)}"
    return fingerprint(
        "attack", config, reference, identity, digests, attack_code(config), device_kind(config)
    )


def _digest(checkpoint: str) -> str:
    return read_checkpoint(pathlib.Path(checkpoint)).digest if checkpoint else ""


def attack_cell(config: AttackConfig) -> Events[AttackOutcome]:
    """One attack as a function of its resolved configuration; files and MLflow are not touched."""
    corpus, loaded, probe = load_inputs(config)
    run_fingerprint = attack_fingerprint(config, loaded.identity, corpus.digests)
    yield Begin(
        run_fingerprint,
        attack_name(config, run_fingerprint),
        as_params(config),
        int(config.attack_steps),
        tags={**loaded.tags, **_reference_tags(config)},
        counts={"n_params": loaded.n_params},
        inputs=inputs_read(config, corpus.digests, {"attack": "attack", "probe": "probe"}),
        warnings=few_rows_warnings(config, loaded),
    )
    enter("healthy measurement")
    probe = probe.remembering(HEALTHY, loaded.model)
    healthy = measured(probe, loaded, config.seed, loaded.digest)
    enter("preparing the attack")
    change = WeightChange(loaded.model)
    prepared = prepare_arm(config, loaded, corpus, change)
    warmup = warmup_batches(config, loaded, corpus)
    for event in prepared.arm.run(loaded, config, probe, healthy, change, warmup):
        if isinstance(event, Safe):
            yield event
            continue
        record, metrics = event, event.metrics()
        yield Record(record.step, metrics, rank_and_perplexity(metrics))
    enter("collapsed measurement")
    collapsed = measured(probe, loaded, config.seed)
    return AttackOutcome(
        config, run_fingerprint, loaded, healthy, collapsed, record, prepared, corpus.digests
    )


def _reference_tags(config: AttackConfig) -> dict[str, str]:
    """The attack runs that a control is matched to and whose direction it takes, if any."""
    named = {
        "reference_run_id": config.reference_checkpoint,
        "direction_run_id": config.direction_checkpoint,
    }
    return {
        tag: read_checkpoint(pathlib.Path(path)).config.get("attack_run_id", "")
        for tag, path in named.items()
        if path
    }


def noise_match(config: AttackConfig) -> str:
    """What a damage control shares with its reference (of :data:`healing.registry.MATCHES`);
    without a reference ``scale``; empty for other arms.
    """
    if arm_role(config.arm) != DAMAGE_CONTROL:
        return ""
    return config.match if config.reference_checkpoint else "scale"


def attack_name(config: AttackConfig, run_fingerprint: str) -> str:
    """Folder and run name of an attack."""
    slug = model_slug(config.label)
    return f"{slug}_{config.arm}_seed{config.seed}_attack_{run_fingerprint[:8]}"
