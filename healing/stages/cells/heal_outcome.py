"""What a healing run is and what it leaves, apart from the model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from healing.config.arm_tags import SHAM_ARM
from healing.config.heal import OF_THE_ATTACK, HealConfig
from healing.config.healer import Healer
from healing.config.options import AUTO
from healing.measurements.continuations import Continuations
from healing.measurements.diagnosis import (
    Diagnosis,
    Failure,
    HealthyReplay,
)
from healing.measurements.probe import Measurement
from healing.measurements.recovery import (
    Damage,
    State,
    measurable_recovery_pct,
    panel_metric,
    recovery_pct,
    verdict_of,
)
from healing.models.checkpoints import (
    Checkpoint,
)
from healing.statistics.survival import half_recovery_time
from healing.training.healing_loop import HealRecord
from healing.training.precision import Precision


@dataclass(frozen=True)
class HealCell:
    """One healing run: everything that decides its numbers, picklable.

    Attributes:
        config: Resolved configuration.
        checkpoint: Path of the collapsed checkpoint; empty for the sham, which heals the healthy
            model.
        replicate: Number of the run among those of the same checkpoint and seed.
        sham: Trajectory of the sham of the same seed, replicate and settings: step → state.
        sham_run_id: Run of that sham; empty without one.
        healer: That the configuration's settings are of; ``None`` where none was selected.
        key: By which a sweep finds it again (:mod:`healing.stages.launching.known_cells`); empty
            where none asks for it.
    """

    config: HealConfig
    checkpoint: str
    replicate: int = 0
    sham: Mapping[int, State] = field(default_factory=dict, compare=False)
    sham_run_id: str = field(default="", compare=False)
    healer: Healer | None = field(default=None, compare=False)
    key: str = field(default="", compare=False)

    def sham_cell(self) -> HealCell:
        """The healing of the healthy model that this cell is referred to."""
        bare = replace(
            self.config, sham=False, arm=SHAM_ARM, collapsed_checkpoint="", attack_run_id=""
        )
        # What was asked of a fresh attack is no difference between shams.
        left_out: dict[str, Any] = dict.fromkeys(OF_THE_ATTACK, AUTO)
        return HealCell(replace(bare, checkpoint_dir="", **left_out), "", self.replicate)


@dataclass(frozen=True)
class HealOutcome:
    """What a healing cell leaves beside the healed model, which is too large to keep for each run.

    Attributes:
        cell: What was run.
        fingerprint: Hash of what determined the result.
        checkpoint: The collapsed state it started from, without its tensors.
        healthy_digest: Of the untouched model's weights.
        healthy: Measurement of the untouched model.
        records: The trajectory, from step 0.
        digests: Corpus digests by split.
        in_float32: What the collapsed model cannot compute in float32 before any step, if so.
        healthy_replay: The healthy model through the same first steps, where the run stalled.
        unigram_loss: Of token frequencies alone on the probe, nats per token: a collapsed model may
            be worse than knowing nothing, and most of its loss comes back without any knowledge.
        weight_change: ‖W−W₀‖/‖W₀‖ of the collapsed weights against the healthy ones.
        said: What the three states make of the same openings; ``None`` where that is not wanted.
    """

    cell: HealCell
    fingerprint: str
    checkpoint: Checkpoint
    healthy_digest: str
    healthy: Measurement
    records: tuple[HealRecord, ...]
    digests: dict[str, str]
    in_float32: Failure | None = None
    healthy_replay: HealthyReplay | None = None
    unigram_loss: float = math.nan
    weight_change: float = math.nan
    said: Continuations | None = None

    @property
    def damage(self) -> Damage:
        """Healthy and collapsed state."""
        return Damage(self.healthy.state, self.records[0].measurement.state)

    @property
    def diagnosis(self) -> Diagnosis:
        """What the status rests on."""
        config, last = self.cell.config, self.records[-1]
        return Diagnosis(
            str(Precision(config.precision, config.precision_mode)),
            self.in_float32,
            last.failure,
            last.stalled,
            self.healthy_replay,
            last.nonfinite_steps,
            last.scaler_skipped_steps,
            last.step,
        )

    @property
    def status(self) -> str:
        """As :attr:`healing.measurements.diagnosis.Diagnosis.status`."""
        return self.diagnosis.status

    def recovery(self, record: HealRecord) -> dict[str, float]:
        """Recovery numbers of one record, in percent, and those of the panel."""
        panel = {panel_metric(k): v for k, v in self._panel(record.measurement).items()}
        return {**self._recovery(record), **panel}

    def _recovery(self, record: HealRecord) -> dict[str, float]:
        """Recovery numbers of one record, in percent; NaN where the model cannot compute.

        A model that takes no step keeps its rank: 0 % would be an invented result.
        """
        now, sham = record.measurement.state, self.cell.sham.get(record.step)
        numbers = self.damage.recovery(now)
        unigram = recovery_pct(self.unigram_loss, self.damage.collapsed.loss, self.healthy.loss)
        numbers["unigram_loss_recovery_pct"] = math.nan if self.damage.loss_reason else unigram
        if sham is not None:
            numbers |= self.damage.sham_recovery(now, sham)
        return dict.fromkeys(numbers, math.nan) if self._not_computing else numbers

    def _panel(self, now: Measurement) -> dict[str, float]:
        """Recovery by the other measures, in percent; NaN where the model cannot compute."""
        healthy, collapsed = self.healthy.panel(), self.records[0].measurement.panel()
        numbers = {
            name: measurable_recovery_pct(value, collapsed[name], healthy[name])
            for name, value in now.panel().items()
        }
        return dict.fromkeys(numbers, math.nan) if self._not_computing else numbers

    @property
    def _not_computing(self) -> str:
        """Why there is no recovery to speak of; known before the healthy model has been tried."""
        if not (self.in_float32 or self.records[-1].stalled):
            return ""
        return self.diagnosis.sentence

    def rank_shares(self) -> NDArray[np.float64]:
        """Effective rank of every block over that of the healthy block: (records, blocks)."""
        ranks = [[s.effective_rank for s in r.measurement.spectra] for r in self.records]
        return np.array(ranks) / np.array([s.effective_rank for s in self.healthy.spectra])

    def half_recovery(self, name: str) -> tuple[float, bool]:
        """Steps until half of a recovery is reached, and whether the run ended before (censored).

        (NaN, True) where the recovery is undefined.
        """
        values = [self.recovery(r)[name] for r in self.records]
        if not any(math.isfinite(v) for v in values[1:]):
            return math.nan, True
        found = half_recovery_time([float(r.step) for r in self.records], values)
        return found.time, found.censored

    def summary(self) -> dict[str, Any]:
        """Final numbers, as stored in ``healing_summary.json``."""
        damage, last = self.damage, self.records[-1]
        final = last.measurement.state
        recovery, panel = self._recovery(last), self._panel(last.measurement)
        rank_time, rank_censored = self.half_recovery("rank_recovery_pct")
        loss_time, loss_censored = self.half_recovery("loss_recovery_pct")
        per_step = int(self.cell.config.batch_size) * self.cell.config.sequence_length  # tokens
        return {
            **recovery,
            "panel": panel,
            "verdict": verdict_of(recovery["rank_recovery_pct"]),
            "verdict_loss": verdict_of(recovery["loss_recovery_pct"]),
            "spectral_state": damage.spectral_state,
            "rank_undefined_reason": self._not_computing or damage.rank_reason,
            "loss_undefined_reason": self._not_computing or damage.loss_reason,
            "original_rank": damage.healthy.effective_rank,
            "collapsed_rank": damage.collapsed.effective_rank,
            "final_effective_rank": final.effective_rank,
            "original_perplexity": damage.healthy.perplexity,
            "collapsed_perplexity": damage.collapsed.perplexity,
            "final_perplexity": final.perplexity,
            "original_loss": damage.healthy.loss,
            "collapsed_loss": damage.collapsed.loss,
            "final_loss": final.loss,
            "unigram_loss": self.unigram_loss,
            "rank_reduction_pct": damage.rank_reduction_pct,
            "rank_change_threshold": damage.rank_threshold,
            "rank_recovery_error": damage.rank_recovery_error(final),
            "weight_change": self.weight_change,
            "half_recovery_steps_rank": rank_time,
            "half_recovery_censored_rank": rank_censored,
            "half_recovery_steps_loss": loss_time,
            "half_recovery_censored_loss": loss_censored,
            "half_recovery_tokens_rank": rank_time * per_step,
            "half_recovery_tokens_loss": loss_time * per_step,
            "steps": last.step,
            **self.diagnosis.summary(),
        }
