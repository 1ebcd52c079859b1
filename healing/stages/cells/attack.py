"""One attack as a pure function: what it is, what it leaves, what identifies it."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from healing.attacks.arms import NoiseArm, Preparation, make_arm, warmup_batches
from healing.attacks.base import AttackRecord
from healing.attacks.catalyst_search import Catalyst
from healing.attacks.damage_matching import DamageTarget, match_damage, measure_state
from healing.attacks.loop import run_attack
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.fingerprint import fingerprint
from healing.config.presets import model_slug
from healing.measurements.probe import Measurement
from healing.measurements.recovery import Damage, State
from healing.models.checkpoints import read_checkpoint
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.inputs import device_kind, load_inputs, resolve_from_model


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
        """Result of the search (``haep`` and ``haep_oracle``)."""
        return self.preparation.catalyst

    @property
    def damage(self) -> Damage:
        """Healthy and collapsed state."""
        return Damage(state_of(self.healthy), state_of(self.collapsed))

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
            **self.preparation.numbers,
        }


def state_of(measurement: Measurement) -> State:
    """The part of a measurement that recovery needs."""
    return State(
        measurement.effective_rank,
        measurement.loss,
        measurement.perplexity,
        measurement.rank_standard_error,
    )


def attack_code() -> str:
    """Digest of the code that makes an attack's numbers."""
    return code_digest("healing.stages.cells.attack")


def attack_fingerprint(config: AttackConfig, identity: str, digests: dict[str, str]) -> str:
    """Fingerprint of an attack: configuration, healthy model, texts, code, and the referenced
    attack's weights instead of its path.
    """
    reference = ""
    if config.reference_checkpoint:
        reference = read_checkpoint(pathlib.Path(config.reference_checkpoint)).digest
    return fingerprint(
        "attack", config, reference, identity, digests, attack_code(), device_kind(config)
    )


def attack_cell(
    config: AttackConfig,
    on_record: Callable[[AttackRecord], None] = lambda _: None,
    on_start: Callable[[str, LoadedModel, dict[str, str]], None] = lambda *_: None,
) -> AttackOutcome:
    """One attack as a function of its configuration; neither files nor MLflow are touched.

    Args:
        config: May hold ``auto``.
        on_record: Called with every record as it is made.
        on_start: Called before the first record with the fingerprint, the healthy model and the
            digests of the corpus.
    """
    config = resolve_from_model(config)
    corpus, loaded, probe = load_inputs(config)
    mark = attack_fingerprint(config, loaded.identity, corpus.digests)
    on_start(mark, loaded, corpus.digests)
    healthy = probe.measure(loaded.model, named_generator(config.seed, "bootstrap"))
    change = WeightChange(loaded.model)
    made = make_arm(config, loaded, corpus, change)
    if noise_match(config) in ("loss", "rank") and isinstance(made.arm, NoiseArm):
        reference = read_checkpoint(pathlib.Path(config.reference_checkpoint)).state
        damaged = measure_state(loaded, reference, change, probe)
        target = DamageTarget.of(config.match, damaged, healthy)
        records = match_damage(loaded, made.arm, probe, healthy, target)
    else:
        warmup = warmup_batches(config, loaded, corpus)
        records = run_attack(loaded, made.arm, config, probe, healthy, change, warmup)
    for record in records:
        on_record(record)
    collapsed = probe.measure(loaded.model, named_generator(config.seed, "bootstrap"))
    return AttackOutcome(config, mark, loaded, healthy, collapsed, record, made, corpus.digests)


def noise_match(config: AttackConfig) -> str:
    """What ``gaussian_noise`` shares with its reference: ``norm``, ``loss`` or ``rank``; without a
    reference ``scale``; empty for other arms.
    """
    if config.arm != "gaussian_noise":
        return ""
    return config.match if config.reference_checkpoint else "scale"


def attack_name(config: AttackConfig, mark: str) -> str:
    """Folder and run name of an attack."""
    slug = model_slug(config.label)
    return f"{slug}_{config.arm}_seed{config.seed}_attack_{mark[:8]}"
