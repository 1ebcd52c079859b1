"""Recovery of one healing run: formulas, when they are undefined, spectral state, verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE = 20.0, 70.0
"""Recovery in percent that separates the verdicts: of a run by its recovery, of a group by the
interval of its mean and the count of its checkpoints. Every text and figure takes them from here.
"""

FURTHER_BELOW = -IRREVERSIBLE_BELOW
"""Recovery in percent under which the damage grew: as far on the other side of 0 as what still
counts as no recovery."""

UNHEALED, HEALED = 0.0, 100.0
"""Recovery in percent of the collapsed and of the healthy state."""


class Verdict(StrEnum):
    """What recovery says of the damage; the values are what runs and summaries store."""

    IRREVERSIBLE = "irreversible pathology"
    REVERSIBLE = "acute structural failure"
    PARTIAL = "partial"
    FURTHER = "further collapse"
    TOO_FEW = "too few checkpoints"
    INCONCLUSIVE = "inconclusive"
    UNDEFINED = "undefined"

    @property
    def meaning(self) -> str:
        """The same in plain words."""
        return {
            Verdict.IRREVERSIBLE: "does not heal within this budget",
            Verdict.REVERSIBLE: "heals",
            Verdict.PARTIAL: "heals in part",
            Verdict.FURTHER: "moves further away from healthy while it is trained",
            Verdict.TOO_FEW: "the checkpoints are counted, and decide nothing about others",
            Verdict.INCONCLUSIVE: "interval and count allow more than one verdict",
            Verdict.UNDEFINED: "the attack did not change the measure, so nothing can recover",
        }[self]

    @property
    def shown(self) -> str:
        """As people read it: with its meaning where the name alone suggests the opposite."""
        return f"{self.value} ({self.meaning})" if self is Verdict.REVERSIBLE else self.value


DECIDED = (Verdict.REVERSIBLE, Verdict.IRREVERSIBLE, Verdict.PARTIAL, Verdict.FURTHER)
"""Verdicts that say something about the damage."""

RELATIVE_CHANGE = 0.05
"""What the attack changed by less than this share of its healthy value has no recovery."""

STANDARD_ERRORS = 3.0
"""Nor has an effective rank that changed by less than this many standard errors."""

MAX_RECOVERY_ERROR = 10.0
"""Nor has one whose recovery would have a larger standard error than this, in points: just above
the other thresholds an error of 0.3 dimensions moves it from one verdict to another."""

PANEL = {
    "last_block": "last block",
    "min_block": "lowest block",
    "participation_ratio": "participation ratio",
    "effective_rank_energy": "entropy of σ²",
    "stable_rank": "stable rank",
    "accuracy_top1": "next-token accuracy",
}
"""Other measures of the same states, whose recovery stands beside the effective rank's mean over
blocks, which is the primary one; names in metrics → for people."""


def panel_metric(measure: str) -> str:
    """Name under which the recovery of a measure of :data:`PANEL` is logged, in percent."""
    return f"panel/{measure}_recovery_pct"


@dataclass(frozen=True)
class State:
    """What recovery needs of one state.

    Attributes:
        effective_rank: Mean over blocks.
        loss: Nats per token.
        perplexity: exp(loss).
        rank_standard_error: Of ``effective_rank``; NaN where unknown (healed states).
    """

    effective_rank: float
    loss: float
    perplexity: float
    rank_standard_error: float = math.nan


def recovery_pct(now: float, collapsed: float, healthy: float) -> float:
    """100·(now − collapsed)/(healthy − collapsed), unclamped; NaN where the attack changed nothing.

    Negative: it moved on from the healthy value. Above 100: it went past the healthy value.
    """
    if not all(map(math.isfinite, (now, collapsed, healthy))) or healthy == collapsed:
        return math.nan
    return 100.0 * (now - collapsed) / (healthy - collapsed)


def measurable_recovery_pct(now: float, collapsed: float, healthy: float) -> float:
    """As :func:`recovery_pct`; NaN where the attack changed the measure by under 5 % of healthy."""
    if abs(healthy - collapsed) < RELATIVE_CHANGE * abs(healthy):
        return math.nan
    return recovery_pct(now, collapsed, healthy)


def ppl_improvement_pct(now: float, collapsed: float) -> float:
    """100·(collapsed − now)/collapsed, in percent of the collapsed perplexity."""
    if not math.isfinite(collapsed) or not math.isfinite(now):
        return math.nan
    return 100.0 * (collapsed - now) / collapsed


def verdict_of(recovery: float) -> Verdict:
    """Further collapse below :data:`FURTHER_BELOW`, irreversible from there to below
    :data:`IRREVERSIBLE_BELOW`, reversible above :data:`REVERSIBLE_ABOVE`, partial between and on
    them; undefined for NaN.
    """
    if math.isnan(recovery):
        return Verdict.UNDEFINED
    if recovery < FURTHER_BELOW:
        return Verdict.FURTHER
    if recovery < IRREVERSIBLE_BELOW:
        return Verdict.IRREVERSIBLE
    return Verdict.REVERSIBLE if recovery > REVERSIBLE_ABOVE else Verdict.PARTIAL


@dataclass(frozen=True)
class Damage:
    """The healthy and the collapsed state, and what may be said of recovery between them."""

    healthy: State
    collapsed: State

    @property
    def rank_threshold(self) -> float:
        """Smallest |Δrank| that counts as a change: max(5 % of healthy, 3 standard errors)."""
        errors = (self.healthy.rank_standard_error, self.collapsed.rank_standard_error)
        combined = math.hypot(*(0.0 if math.isnan(e) else e for e in errors))
        return max(RELATIVE_CHANGE * self.healthy.effective_rank, STANDARD_ERRORS * combined)

    def rank_recovery_error(self, now: State) -> float:
        """Standard error of measurement of a state's rank recovery R, points, by the delta method.

        100/|h − c|·√(sₜ² + (1 − r)²·s_c² + r²·s_h²), r = R/100, s the standard errors of the state,
        the collapsed and the healthy one. They are taken as independent; that the same probe
        windows measure all three makes the true error smaller. One that is not known, as the
        healed state's, is taken for the largest of the others; NaN where none is known.
        """
        states = (now, self.collapsed, self.healthy)
        known = [s.rank_standard_error for s in states if math.isfinite(s.rank_standard_error)]
        change = self.healthy.effective_rank - self.collapsed.effective_rank
        if not known or change == 0.0 or math.isnan(change):
            return math.nan
        r = (now.effective_rank - self.collapsed.effective_rank) / change
        errors = [
            s.rank_standard_error if math.isfinite(s.rank_standard_error) else max(known)
            for s in states
        ]
        parts = [share * e for share, e in zip((1.0, 1.0 - r, r), errors, strict=True)]
        return 100.0 / abs(change) * math.hypot(*parts)

    @property
    def _largest_error(self) -> float:
        """Standard error of a rank recovery at its largest between collapsed and healthy; 0 where
        unknown. That of no single state, so that a trajectory is defined as a whole or not at all.
        """
        errors = [self.rank_recovery_error(state) for state in (self.collapsed, self.healthy)]
        return max((e for e in errors if math.isfinite(e)), default=0.0)

    @property
    def rank_reason(self) -> str:
        """Why rank recovery is undefined; empty where it is defined."""
        change = self.collapsed.effective_rank - self.healthy.effective_rank
        if math.isnan(change):
            return "effective rank is not finite"
        if abs(change) < self.rank_threshold:
            return (
                f"the attack changed the effective rank by {change:+.3g}, "
                f"below the detection threshold of {self.rank_threshold:.3g}"
            )
        if self._largest_error > MAX_RECOVERY_ERROR:
            return (
                f"the attack changed the effective rank by {change:+.3g}, too little to know how "
                f"much of it comes back: a recovery has a standard error of "
                f"{self._largest_error:.3g} points, more than {MAX_RECOVERY_ERROR:g} (measure on "
                "more text: --probe-tokens)"
            )
        return ""

    @property
    def loss_reason(self) -> str:
        """Why loss recovery is undefined; empty where it is defined."""
        change = self.collapsed.loss - self.healthy.loss
        if math.isnan(change):
            return "loss is not finite"
        if abs(change) < RELATIVE_CHANGE * self.healthy.loss:
            return f"the attack changed the loss by {change:+.3g} nats, under 5 % of healthy"
        return ""

    @property
    def spectral_state(self) -> str:
        """``collapsed``, ``inflated`` (the rank rose), ``unchanged``, or ``undefined``."""
        change = self.collapsed.effective_rank - self.healthy.effective_rank
        if math.isnan(change):
            return "undefined"
        if abs(change) < self.rank_threshold:
            return "unchanged"
        return "collapsed" if change < 0 else "inflated"

    @property
    def rank_reduction_pct(self) -> float:
        """100·(healthy − collapsed)/healthy; negative where the rank rose."""
        healthy = self.healthy.effective_rank
        return 100.0 * (healthy - self.collapsed.effective_rank) / healthy

    def sham_recovery(self, now: State, sham: State) -> dict[str, float]:
        """Recovery referred to the sham at the same step, in percent; NaN where undefined.

        100·(now − collapsed)/(sham − collapsed): fine-tuning moves a healthy model too, and a
        healed one can be asked for no more than that. Undefined where the plain recovery is (what
        fine-tuning does to an undamaged model is no recovery), where the sham lies on the other
        side of the collapsed value than the healthy model does, and where it lies too close to it
        by the plain rule.
        """
        against = Damage(
            replace(sham, rank_standard_error=self.healthy.rank_standard_error), self.collapsed
        )
        numbers, plain = against.recovery(now), self.recovery(now)
        ahead = {
            "rank": (sham.effective_rank - self.collapsed.effective_rank)
            * (self.healthy.effective_rank - self.collapsed.effective_rank),
            "loss": (sham.loss - self.collapsed.loss) * (self.healthy.loss - self.collapsed.loss),
        }
        return {
            f"{name}_recovery_sham_pct": numbers[f"{name}_recovery_pct"]
            if ahead[name] > 0 and math.isfinite(plain[f"{name}_recovery_pct"])
            else math.nan
            for name in ("rank", "loss")
        }

    def recovery(self, now: State) -> dict[str, float]:
        """The three recovery numbers of a state, in percent; NaN where undefined."""
        healthy, collapsed = self.healthy, self.collapsed
        rank = recovery_pct(now.effective_rank, collapsed.effective_rank, healthy.effective_rank)
        loss = recovery_pct(now.loss, collapsed.loss, healthy.loss)
        return {
            "rank_recovery_pct": math.nan if self.rank_reason else rank,
            "loss_recovery_pct": math.nan if self.loss_reason else loss,
            "ppl_improvement_pct": ppl_improvement_pct(now.perplexity, collapsed.perplexity),
        }
