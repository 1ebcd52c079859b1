"""Healing runs pooled into groups: the statistics of the summary, as plain data in and out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from healing.registry import SHAM, YARDSTICK
from healing.statistics.contrasts.catalyst import CatalystAnswer, catalyst_answers
from healing.statistics.contrasts.plan import Contrast, Gap, planned_contrasts
from healing.statistics.damage_regression import DamageRegression, damage_regression
from healing.statistics.fits.size_trend import ScalingSlope, scaling_slope
from healing.statistics.group import GroupSummary, against_scratch, summarize_group
from healing.statistics.heal_runs import HealRun, Repeat, distinct_runs, without_raised_rank
from healing.statistics.warning_collector import WarningCollector


@dataclass(frozen=True)
class Summary:
    """The whole table.

    Attributes:
        groups: Ordered by model size, then arm.
        contrasts: Treatment against controls, in the order of the plan (primary ones first).
        gaps: Arms that were run and are not compared, and why.
        slopes: Arm → rank recovery against log10(parameters), from three sizes on.
        failed: Runs that did not end well.
        running: Runs that the store does not say have ended.
        repeats: Finished runs that repeat another one and are not counted.
        undefined: Finished runs without a defined rank recovery.
        notes: What contrasts and slopes do not determine: (of what, why).
        confidence: Level of all intervals.
        damage: Model → recovery against distance and loss over all arms, where two have a distance.
    """

    groups: tuple[GroupSummary, ...]
    contrasts: tuple[Contrast, ...]
    gaps: tuple[Gap, ...]
    slopes: Mapping[str, ScalingSlope]
    failed: tuple[HealRun, ...]
    running: tuple[HealRun, ...]
    repeats: tuple[Repeat, ...]
    undefined: tuple[HealRun, ...]
    notes: tuple[tuple[str, str], ...]
    confidence: float
    damage: Mapping[str, DamageRegression] = field(default_factory=dict)

    @property
    def catalyst(self) -> list[CatalystAnswer]:
        """Whether the treatment's idea is special, per model and treatment."""
        return catalyst_answers(self.contrasts, self.gaps)

    def contrast(self, model: str, control: str) -> Contrast:
        """The contrast of a model with the control of this arm (the first treatment's).

        Raises:
            KeyError: There is none.
        """
        for found in self.contrasts:
            if (found.pair.model, found.pair.control.arm) == (model, control):
                return found
        raise KeyError(f"{model}: no contrast with {control}")

    def label(self, arm: str) -> str:
        """Of an arm, for people."""
        return next((g.label for g in self.groups if g.arm == arm), arm)


def _settings_order(runs: Iterable[HealRun]) -> dict[tuple[str, str, str], list[HealRun]]:
    groups: dict[tuple[str, str, str], list[HealRun]] = {}
    for run in sorted(runs, key=lambda r: (r.n_params, r.model, r.arm, r.settings)):
        groups.setdefault((run.model, run.arm, run.settings), []).append(run)
    return groups


def sizes_of(groups: Sequence[GroupSummary], arm: str) -> tuple[list[GroupSummary], bool]:
    """The groups of an arm whose size is known, and whether they belong on one line: several
    settings of one size do not, for nothing says which of them go together.
    """
    own = [g for g in groups if g.arm == arm and g.n_params > 0]
    return own, len({g.model for g in own}) == len(own)


def _slopes(
    groups: Sequence[GroupSummary], confidence: float, notes: WarningCollector
) -> dict[str, ScalingSlope]:
    slopes = {}
    for arm in dict.fromkeys(g.arm for g in groups):
        own, one_line = sizes_of(groups, arm)
        # One mean per size: sizes deviate from a line, so that checkpoints of one size are not
        # independent given the line (their interval would cover about half of the time).
        points = [(math.log10(g.n_params), g.intervals["rank_recovery_pct"].point) for g in own]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if one_line and len({x for x, _ in points}) >= 3:
            sizes, recovery = zip(*points, strict=True)
            slopes[arm] = notes.call(arm, scaling_slope, sizes, recovery, confidence)
    return slopes


def _scratch_of(
    members: Sequence[HealRun], grouped: Mapping[tuple[str, str, str], list[HealRun]]
) -> list[HealRun]:
    """Runs of the untrained model that a group is held against; none for that model itself."""
    first = members[0]
    if first.role in (YARDSTICK, SHAM):
        return []
    found = [r for runs in grouped.values() for r in runs if r.role == YARDSTICK]
    return [r for r in found if r.model == first.model]


def summarize_runs(runs: Sequence[HealRun], confidence: float, rng: np.random.Generator) -> Summary:
    """Group, estimate, compare; nothing is left out without being listed.

    Args:
        runs: All runs of the query, finished or not, oldest first.
        confidence: Level of the intervals.
        rng: Draws the bootstrap.
    """
    distinct, repeats = distinct_runs([r for r in runs if r.finished])
    finished = [without_raised_rank(r) for r in distinct]
    grouped = _settings_order(finished)
    groups = tuple(
        replace(
            summarize_group(members, confidence, rng),
            scratch=against_scratch(members, _scratch_of(members, grouped)),
        )
        for members in grouped.values()
    )
    found, gaps = planned_contrasts(grouped, 1.0 - confidence)
    slope_notes = WarningCollector()
    slopes = _slopes(groups, confidence, slope_notes)
    notes = [(c.pair.title, n) for c in found for n in c.notes]
    notes += [("scaling with size", n) for n in slope_notes.texts]
    return Summary(
        groups=groups,
        contrasts=found,
        gaps=gaps,
        slopes=slopes,
        failed=tuple(r for r in runs if not r.finished and not r.running),
        running=tuple(r for r in runs if r.running),
        repeats=repeats,
        # The sham changes nothing by design: not news.
        undefined=tuple(r for r in finished if r.undefined_reason and r.role != SHAM),
        notes=tuple(notes),
        confidence=confidence,
        damage=_damage(finished, confidence),
    )


def _damage(finished: Sequence[HealRun], confidence: float) -> dict[str, DamageRegression]:
    models = dict.fromkeys(r.model for r in sorted(finished, key=lambda r: (r.n_params, r.model)))
    of = {m: damage_regression([r for r in finished if r.model == m], confidence) for m in models}
    return {model: found for model, found in of.items() if found is not None}
