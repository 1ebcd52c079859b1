"""What a verdict depends on: how long was healed, by which measure, by which healer.

A recovery is the budget's and the healer's before it is the model's. So the verdict is given at
several budgets within the window, by every measure of the panel, and "irreversible" is said only
where nothing that was tried speaks against it (:class:`Persistence`).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from healing.config.heal import HealConfig
from healing.config.presets import PRESETS, Preset, preset_for
from healing.errors import ConfigError
from healing.measurements.diagnosis import UNTRAINED
from healing.measurements.recovery import HEALED, PANEL, UNHEALED, Verdict
from healing.statistics.heal_runs import (
    HealRun,
    checkpoint_trajectories,
    defined_runs,
    is_missing,
    measurement_error,
    shared_steps,
    tokens_per_step,
    values_at,
)
from healing.statistics.intervals import DegenerateDataWarning, cluster_means
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS
from healing.statistics.verdicts import GroupVerdict, group_verdict

RANK, LOSS = PRIMARY_ENDPOINTS
KNOWLEDGE = ("accuracy_top1",)
"""Measures of the panel that say what the model knows, whatever its rank did."""
FRACTIONS = (0.125, 0.25, 0.5, 1.0)
"""Of the window, where the verdict is given."""
MIN_BUDGETS = 16
"""Times the default tokens that must have been healed before "irreversible" is said."""
MAX_LAST_GAIN = 5.0
"""Points that the last doubling of the budget may have gained then."""


@dataclass(frozen=True)
class BudgetPoint:
    """The verdict after some of the steps.

    Attributes:
        step: Optimiser step, measured by all runs.
        tokens: Training tokens until then; 0 where unknown.
        verdict: As at the end of the window.
    """

    step: int
    tokens: int
    verdict: GroupVerdict


@dataclass(frozen=True)
class Persistence:
    """What has to hold before a state that did not recover is called irreversible.

    Attributes:
        tokens: Training tokens of every run; 0 where unknown.
        default_tokens: Of the model's default budget.
        healers_tried: Healers among which the strongest was used; 0 where none was searched.
        measures: Measures whose verdict is "irreversible" too.
        other_measures: Measures whose verdict is not.
        last_gain: Rank recovery gained by the last doubling of the budget, points, mean over
            checkpoints; NaN where half of the budget was not measured.
    """

    tokens: int
    default_tokens: int
    healers_tried: int
    measures: tuple[str, ...]
    other_measures: tuple[str, ...]
    last_gain: float

    @property
    def long_enough(self) -> bool:
        """Whether the budget is a multiple of the default one."""
        return self.tokens >= MIN_BUDGETS * self.default_tokens > 0

    @property
    def levelled_off(self) -> bool:
        """Whether the last doubling gained little."""
        return self.last_gain < MAX_LAST_GAIN

    @property
    def by_every_measure(self) -> bool:
        """Whether the panel was measured and agrees."""
        return bool(self.measures) and not self.other_measures

    @property
    def holds(self) -> bool:
        """Whether all of it does."""
        searched = self.healers_tried > 1
        return self.long_enough and self.levelled_off and self.by_every_measure and searched


def default_tokens(model: str) -> int:
    """Training tokens of the default budget of a model, by its label; for one that is not known
    here by Pythia's preset.
    """
    plain = HealConfig()
    preset: Preset
    try:
        preset = preset_for(model.partition("@")[0].removesuffix("-deduped"))
    except ConfigError:
        preset = PRESETS["1b"]
    return preset.sweep_healing_steps * preset.batch_size * plain.sequence_length


def verdict_of_values(
    runs: Sequence[HealRun], values: Sequence[float], endpoint: str, confidence: float
) -> GroupVerdict:
    """Verdict of a group from one value per run; those that are missing count as in the worst case.

    Args:
        runs: Of the group.
        values: Recovery of each in per cent; NaN where undefined.
        endpoint: What the values are of: decides which undefined ones are missing.
        confidence: Of interval and count.
    """
    checkpoints = [r.checkpoint for r in runs]
    missing = [math.isnan(v) and is_missing(r, endpoint) for r, v in zip(runs, values, strict=True)]
    cases = [
        [case if lost else v for v, lost in zip(values, missing, strict=True)]
        for case in (UNHEALED, HEALED)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # said of the group's own means
        means = cluster_means(values, checkpoints)
        low, high = (cluster_means(case, checkpoints).means for case in cases)
    error = measurement_error(runs, endpoint)
    return group_verdict(means.means, means.undefined_fraction, (low, high), confidence, error)


def verdicts_by_budget(
    runs: Sequence[HealRun], endpoint: str, confidence: float
) -> tuple[BudgetPoint, ...]:
    """Verdicts at the measured steps nearest to :data:`FRACTIONS` of the window, ascending.

    Args:
        runs: Of one group.
        endpoint: Of the verdict.
        confidence: Of interval and count.
    """
    followed = defined_runs(runs, endpoint)
    steps = [step for step in shared_steps(followed) if step > 0]
    if not steps:
        return ()
    chosen = {min(steps, key=lambda s: abs(s - f * steps[-1])) for f in FRACTIONS}
    per_step, points = tokens_per_step(runs), []
    known = set(map(id, followed))  # to compare runs is to compare all their numbers
    for step in sorted(chosen):
        values = [values_at(r, endpoint, [step])[0] if id(r) in known else math.nan for r in runs]
        verdict = verdict_of_values(runs, values, endpoint, confidence)
        points.append(BudgetPoint(step, step * per_step, verdict))
    return tuple(points)


def panel_verdicts(runs: Sequence[HealRun], confidence: float) -> dict[str, GroupVerdict]:
    """The loss and the measures of the panel → verdict by each, as far as any run has it defined.

    Args:
        runs: Of one group.
        confidence: Of interval and count.
    """
    loss = verdict_of_values(runs, [r.final.get(LOSS, math.nan) for r in runs], LOSS, confidence)
    found = {"loss": loss} if loss.n else {}
    for measure in PANEL:
        # A rank that the attack raised, or hardly changed, has no recovery by any measure of it.
        values = [
            r.panel.get(measure, math.nan)
            if r.spectral_state == "collapsed" or measure in KNOWLEDGE
            else math.nan
            for r in runs
        ]
        if any(map(math.isfinite, values)):
            found[measure] = verdict_of_values(runs, values, LOSS, confidence)
    return found


def last_gain(runs: Sequence[HealRun], endpoint: str) -> float:
    """Points gained between half of the budget and its end, mean over checkpoints."""
    gains = []
    for path in checkpoint_trajectories(runs, endpoint):
        at = dict(zip(path.steps, path.mean().tolist(), strict=True))
        half = [s for s in at if s > 0 and 2 * s <= path.steps[-1]] if path.steps else []
        if half:
            gains.append(at[path.steps[-1]] - at[max(half)])
    known = [gain for gain in gains if math.isfinite(gain)]
    return sum(known) / len(known) if known else math.nan


def persistence(
    runs: Sequence[HealRun], model: str, primary: GroupVerdict, panel: dict[str, GroupVerdict]
) -> Persistence | None:
    """What is known of a state that did not recover; ``None`` where the verdict is another.

    Args:
        runs: Of one group.
        model: Its label.
        primary: Verdict on rank recovery.
        panel: Verdicts by the other measures.
    """
    if primary.side not in (Verdict.IRREVERSIBLE, Verdict.FURTHER):
        return None
    low = (Verdict.IRREVERSIBLE, Verdict.FURTHER)
    spectral = {m: v for m, v in panel.items() if v.verdict != Verdict.UNDEFINED}
    trained = [r for r in runs if r.status not in UNTRAINED and r.steps]
    tokens = tokens_per_step(runs) * min((r.steps[-1] for r in trained), default=0)
    return Persistence(
        tokens=tokens,
        default_tokens=default_tokens(model),
        healers_tried=min((r.healers_tried for r in trained), default=0),
        measures=tuple(m for m, v in spectral.items() if v.verdict in low),
        other_measures=tuple(m for m, v in spectral.items() if v.verdict not in low),
        last_gain=last_gain(runs, RANK),
    )


def disagreeing(primary: GroupVerdict, panel: dict[str, GroupVerdict]) -> dict[str, GroupVerdict]:
    """Measures by which the interval, or most checkpoints, lie in another zone than by the primary
    one.
    """
    if primary.side is None:
        return {}
    return {m: v for m, v in panel.items() if v.side is not None and v.side != primary.side}
