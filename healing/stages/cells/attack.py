"""One attack as a pure function: what it is, what it leaves, what identifies it."""

from __future__ import annotations

import functools
import pathlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from healing.attacks.base import AttackRecord, Preparation
from healing.attacks.catalyst_search import Catalyst
from healing.attacks.context import prepare_arm, warmup_batches
from healing.attacks.finished import Finished
from healing.attacks.weight_change import WeightChange
from healing.config.arm_tags import arm_role
from healing.config.attack import AttackConfig
from healing.config.fingerprint import as_params, fingerprint
from healing.config.presets import model_slug
from healing.errors import ConfigError
from healing.measurements.kept_measurements import measured
from healing.measurements.probe import Measurement, Probe
from healing.measurements.recovery import Damage
from healing.models.checkpoints import (
    Checkpoint,
    load_state,
    read_checkpoint,
    require_made_from,
)
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
from healing.stages.cells.recollapse import Start, read_healed, repeated, target_rank


@dataclass(frozen=True)
class AttackOutcome:
    """What an attack cell leaves.

    Attributes:
        config: Resolved configuration.
        fingerprint: Hash of what determined the result.
        loaded: The model, now collapsed.
        healthy: Measurement before.
        collapsed: Measurement after.
        records: Of the trajectory, from step 0.
        preparation: The arm as it was made: catalyst and curvature.
        digests: Corpus digests by split.
        start: Of an attack repeated on healed weights.
    """

    config: AttackConfig
    fingerprint: str
    loaded: LoadedModel
    healthy: Measurement
    collapsed: Measurement
    records: tuple[AttackRecord, ...]
    preparation: Preparation
    digests: dict[str, str]
    start: Start | None = None

    @property
    def last(self) -> AttackRecord:
        """The last record."""
        return self.records[-1]

    def rank_shares(self) -> NDArray[np.float64]:
        """Effective rank of every block over that of the healthy block: (records, blocks)."""
        ranks = [[s.effective_rank for s in r.measurement.spectra] for r in self.records]
        return np.array(ranks) / np.array([s.effective_rank for s in self.healthy.spectra])

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
        damage, rank = self.damage, self.collapsed.effective_rank
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
            **(self.start.summary(self.last.step, rank) if self.start else {}),
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
    if config.start_checkpoint:
        reference += f" from {_digest(config.start_checkpoint)}"
    return fingerprint(
        "attack", config, reference, identity, digests, attack_code(config), device_kind(config)
    )


def _digest(checkpoint: str) -> str:
    return read_checkpoint(pathlib.Path(checkpoint)).digest if checkpoint else ""


def attack_cell(config: AttackConfig) -> Events[AttackOutcome]:
    """One attack as a function of its resolved configuration; files and MLflow are not touched.

    Where healed weights are attacked again, the arm is made at the healthy ones, so that its tokens
    and its subspace are those of the first time.
    """
    healed = read_healed(config.start_checkpoint) if config.start_checkpoint else None
    corpus, loaded, probe = load_inputs(config)
    if healed:
        require_made_from(healed, loaded, config.start_checkpoint)
    run_fingerprint = attack_fingerprint(config, loaded.identity, corpus.digests)
    kept = yield Begin(
        run_fingerprint,
        attack_name(config, run_fingerprint),
        as_params(config),
        int(config.attack_steps),
        tags={**loaded.tags, **reference_tags(config)},
        counts={"n_params": loaded.n_params},
        inputs=inputs_read(config, corpus.digests, {"attack": "attack", "probe": "probe"}),
        warnings=few_rows_warnings(config, loaded),
        disk=4 * loaded.n_params,
    )
    finished = Finished(kept["finished"] if kept else None)
    # True from here to the first step's end: whenever the attack is left, what is finished is kept.
    yield Safe(
        kept.get("step", 0) if kept else 0,
        state=lambda: {**(kept or {}), "finished": finished.parts()},
        parts=finished.count,
    )
    enter("healthy measurement")
    probe = probe.remembering(HEALTHY, loaded.model)
    healthy = finished.once(
        "healthy measurement", lambda: measured(probe, loaded, config.seed, loaded.digest)
    )
    enter("preparing the attack")
    change = WeightChange(loaded.model)
    prepared = prepare_arm(config, loaded, corpus, change, finished)
    warmup = warmup_batches(config, loaded, corpus)
    begin, running, start = healthy, config, None
    if healed:
        enter("healed measurement")
        start = _start(config, loaded, healed, prepared, healthy, probe, finished)
        begin, running = start.measurement, repeated(config, start)
    begun = kept if kept and "loop" in kept else None
    # Arms of others may not know of it; theirs have no state that could be kept.
    going_on = {"kept": begun["loop"]} if begun else {}
    records: tuple[AttackRecord, ...] = begun["records"] if begun else ()
    for event in prepared.arm.run(loaded, running, probe, begin, change, warmup, **going_on):
        if isinstance(event, Safe):
            if event.has_state:
                event = replace(event, state=functools.partial(_state, event, records, finished))
            yield event
            continue
        records, metrics = (*records, event), event.metrics()
        yield Record(event.step, metrics, rank_and_perplexity(metrics))
    assert records, "an attack has a record at step 0"
    enter("collapsed measurement")
    collapsed = measured(probe, loaded, config.seed)
    return AttackOutcome(
        config,
        run_fingerprint,
        loaded,
        healthy,
        collapsed,
        records,
        prepared,
        corpus.digests,
        start,
    )


def _state(safe: Safe, records: tuple[AttackRecord, ...], finished: Finished) -> dict[str, Any]:
    """What a cell goes on from: the loop's state, its records, and what came before them."""
    parts = finished.parts()
    return {"loop": safe.state(), "records": records, "step": safe.done, "finished": parts}


def _start(
    config: AttackConfig,
    loaded: LoadedModel,
    healed: Checkpoint,
    prepared: Preparation,
    healthy: Measurement,
    probe: Probe,
    finished: Finished,
) -> Start:
    """Put the healed weights into the model and measure them."""
    if not prepared.arm.stops_early:
        raise ConfigError(
            f"--start-checkpoint counts steps to a rank, and --arm {config.arm} does not stop at "
            "one: give a checkpoint healed from another arm"
        )
    load_state(loaded, healed, config.start_checkpoint)
    found = finished.once(
        "healed measurement", lambda: measured(probe, loaded, config.seed, healed.digest)
    )
    return Start(healed.without_tensors(), found, target_rank(config, healthy, healed))


def reference_tags(config: AttackConfig) -> dict[str, str]:
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
    slug, kind = model_slug(config.label), "reattack" if config.start_checkpoint else "attack"
    return f"{slug}_{config.arm}_seed{config.seed}_{kind}_{run_fingerprint[:8]}"
