"""The planned contrasts of every model: the treatment against controls, against its own mechanism
and against harm by other means, paired by seed; with the time until half of the damage is repaired.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from healing.config.arm_tags import arm_short
from healing.measurements.diagnosis import UNTRAINED
from healing.measurements.recovery import RELATIVE_CHANGE
from healing.registry import CONTROL, DAMAGE_CONTROL, MECHANISM, TREATMENT
from healing.statistics.checkpoint_estimates import half_times
from healing.statistics.contrasts.family import (
    ArmComparison,
    EndpointComparison,
    Evidence,
    compare_family,
    evidence_of,
)
from healing.statistics.group import Damage, damage_of
from healing.statistics.heal_runs import HealRun, checkpoint_trajectories, tokens_per_step
from healing.statistics.intervals import ClusterMeans, cluster_means
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS, paired_differences
from healing.statistics.power import pairs_by_spread, pairs_for_margin, pairs_that_agree
from healing.statistics.survival import LogRankTest, logrank_test
from healing.statistics.warning_collector import WarningCollector

REACHED_WITHIN = 100.0 * RELATIVE_CHANGE
"""Percent of the healthy rank: a control whose attack falls short of the treatment's by less does
the same to the rank, since a smaller change does not count as a change."""


@dataclass(frozen=True)
class Kind:
    """One line of the plan: the treatment against all arms of a role.

    Attributes:
        role: Of the controls.
        name: For files: ``fine_tuning``.
        rank: For people: ``primary``.
        family: Contrasts of one family are adjusted together.
        about: What the controls are; ``{0}`` is the treatment.
    """

    role: str
    name: str
    rank: str
    family: str
    about: str


PLAN = (
    Kind(CONTROL, "fine_tuning", "primary", "primary", "the same fine-tuning without {0}'s idea"),
    Kind(MECHANISM, "mechanism", "second primary", "primary", "what {0}'s theory alone does"),
    Kind(DAMAGE_CONTROL, "other_damage", "secondary", "secondary", "harm by other means"),
)
"""Fixed before any run, in the order in which everything shows them. The two primary questions
share one adjustment, the secondary contrasts have their own and answer neither."""


@dataclass(frozen=True)
class Pair:
    """Two arms of one model, each by one of its runs, and why they are compared."""

    kind: Kind
    model: str
    treatment: HealRun
    control: HealRun

    @property
    def short(self) -> str:
        """Shortest name of the control."""
        return arm_short(self.control.arm, self.control.label)

    @property
    def title(self) -> str:
        """``nano, HAEP against random tokens``."""
        return f"{self.model}, {self.treatment.label} against {self.control.label}"


@dataclass(frozen=True)
class Gap:
    """Why two arms are not compared."""

    pair: Pair
    why: str


@dataclass(frozen=True)
class Reach:
    """How far the attacks of a pair of arms lowered the rank, means over the seeds of both.

    Attributes:
        treatment: Percent of the healthy rank.
        control: The same.
        pairs: Seeds of which both are known.
        n_reached: Of these, in which the control's attack goes as far, within
            :data:`REACHED_WITHIN`.
    """

    treatment: float
    control: float
    pairs: int
    n_reached: int

    @property
    def reached(self) -> bool:
        """Whether the control's attacks do the same on average; False where unknown."""
        return self.treatment - self.control < REACHED_WITHIN


@dataclass(frozen=True)
class PairsNeeded:
    """How many pairs would decide an endpoint, at the level of the family's first step.

    Attributes:
        agreeing: At least, for a difference like the observed one if all pairs had it; ``None``
            without a difference.
        alike: For equivalence within ±10 points from the observed spread; ``None`` where that is
            unknown or would take over 10,000.
        by_spread: The same unadjusted and by the spread alone, without a count.
    """

    agreeing: int | None
    alike: int | None
    by_spread: int | None


@dataclass(frozen=True)
class Contrast:
    """A treatment against a control of one model: HAEP against random tokens.

    Attributes:
        pair: The arms, and the kind of contrast.
        comparison: Recovery after the last step, paired by seed, adjusted over the family.
        starts: What the attacks of treatment and control had done when healing began, over the
            seeds of both.
        reach: How far the attacks lowered the rank.
        needed: Endpoint → pairs that would decide.
        half_recovery_test: Endpoint → log-rank test of the half-recovery times of the
            checkpoints. Secondary: not adjusted, not paired, and no part of the comparison's
            statement.
        notes: What the data did not determine.
    """

    pair: Pair
    comparison: ArmComparison
    starts: tuple[Damage, Damage]
    reach: Reach
    needed: Mapping[str, PairsNeeded]
    half_recovery_test: Mapping[str, LogRankTest]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Measured:
    """A contrast before the adjustment."""

    pair: Pair
    evidence: Sequence[Evidence]
    starts: tuple[Damage, Damage]
    reach: Reach
    half_recovery_test: Mapping[str, LogRankTest]
    notes: tuple[str, ...]


def _by_seed(runs: Sequence[HealRun], endpoint: str) -> ClusterMeans:
    values = [r.final.get(endpoint, math.nan) for r in runs]
    return cluster_means(values, [r.seed for r in runs])


def _differences(
    treatment: Sequence[HealRun], control: Sequence[HealRun], endpoint: str
) -> list[float]:
    pairs = paired_differences(_by_seed(treatment, endpoint), _by_seed(control, endpoint))
    return pairs.differences.tolist()


def _budget(runs: Sequence[HealRun]) -> int:
    """Last step of the runs that were trained to their end; 0 where none was."""
    return max((r.steps[-1] for r in runs if r.status not in UNTRAINED and r.steps), default=0)


def _obstacle(pair: Pair, treatment: Sequence[HealRun], control: Sequence[HealRun]) -> str:
    """Why two groups cannot be compared; empty where they can."""
    if not {r.seed for r in treatment} & {r.seed for r in control}:
        other = f"no run of {pair.control.label} shares a seed with"
        if pair.kind.role == DAMAGE_CONTROL:
            return f"{other} an attack that it was matched to"
        return f"{other} one of {pair.treatment.label}"
    budgets = _budget(treatment), _budget(control)
    if all(budgets) and budgets[0] != budgets[1]:
        return f"they were healed for {budgets[0]} and {budgets[1]} steps"
    tokens = tokens_per_step(treatment), tokens_per_step(control)
    if all(tokens) and tokens[0] != tokens[1]:
        return f"their healing steps have {tokens[0]} and {tokens[1]} tokens"
    healers = [sorted({r.healer for r in side if r.healer}) for side in (treatment, control)]
    if all(healers) and healers[0] != healers[1]:
        return f"they were healed by {' and '.join(healers[0])}, and by {' and '.join(healers[1])}"
    return ""


def _measure(
    pair: Pair, treatment: Sequence[HealRun], control: Sequence[HealRun], alpha: float
) -> _Measured | str:
    """A contrast before the adjustment, or why two groups cannot be compared.

    Control runs that were matched to other states than these attacks are left out.
    """
    attacks = {r.checkpoint for r in treatment}
    control = [r for r in control if not r.reference or r.reference in attacks]
    obstacle = _obstacle(pair, treatment, control)
    if obstacle:
        return obstacle
    notes = WarningCollector()
    # An arm without defined values is reported with its own group.
    already_reported = WarningCollector()
    differences = {
        e: already_reported.call(e, _differences, treatment, control, e) for e in PRIMARY_ENDPOINTS
    }
    evidence = notes.call("paired differences", evidence_of, differences, alpha=alpha)
    tests = {e: _half_recovery_test(notes, treatment, control, e) for e in PRIMARY_ENDPOINTS}
    seeds = {r.seed for r in treatment} & {r.seed for r in control}
    sides = [[r for r in side if r.seed in seeds] for side in (treatment, control)]
    starts = damage_of(sides[0]), damage_of(sides[1])
    return _Measured(pair, evidence, starts, _reach(*sides), tests, notes.texts)


def _reach(treatment: Sequence[HealRun], control: Sequence[HealRun]) -> Reach:
    """How far the attacks went, over the seeds in which both are known."""
    by_seed: list[dict[str, float]] = []
    for side in (treatment, control):
        own_runs: dict[str, list[HealRun]] = {}
        for run in side:
            own_runs.setdefault(run.seed, []).append(run)
        by_seed.append({s: damage_of(found).rank_reduction_pct for s, found in own_runs.items()})
    rows = [(own, by_seed[1].get(seed, math.nan)) for seed, own in by_seed[0].items()]
    known = [(own, other) for own, other in rows if math.isfinite(own) and math.isfinite(other)]
    if not known:
        return Reach(math.nan, math.nan, 0, 0)
    own, other = (sum(column) / len(known) for column in zip(*known, strict=True))
    return Reach(own, other, len(known), sum(a - b < REACHED_WITHIN for a, b in known))


def _needed(found: EndpointComparison, n_family: int, alpha: float) -> PairsNeeded:
    margin, known = found.equivalence.margin, 0.0 < found.sd < math.inf
    difference = found.superiority.interval.point
    return PairsNeeded(
        pairs_that_agree(difference, alpha=alpha / (2 * n_family)),
        pairs_for_margin(found.sd, margin, alpha=alpha / n_family),
        pairs_by_spread(found.sd, margin, alpha=alpha) if known else None,
    )


def _half_recovery_test(
    notes: WarningCollector, treatment: Sequence[HealRun], control: Sequence[HealRun], endpoint: str
) -> LogRankTest:
    already_reported = WarningCollector()  # what the times warn of stands with their group
    sides = [
        already_reported.call(
            endpoint, half_times, checkpoint_trajectories(r, endpoint), 0.95
        ).times
        for r in (treatment, control)
    ]
    columns = [([h.time for h in side], [h.censored for h in side]) for side in sides]
    return notes.call(endpoint, logrank_test, *columns[0], *columns[1])


def planned_contrasts(
    groups: Mapping[tuple[str, str, str], list[HealRun]], alpha: float
) -> tuple[tuple[Contrast, ...], tuple[Gap, ...]]:
    """Every treatment of a model against every arm that the plan names and that was run on it.

    Args:
        groups: (model, arm, settings) → runs, in the order in which models are shown.
        alpha: Probability of a false statement of each kind, over each family.

    Returns:
        Contrasts in the order of the plan, and why there is none although both arms were run.
    """
    measured: list[_Measured] = []
    gaps: list[Gap] = []
    for kind in PLAN:
        for model in dict.fromkeys(key[0] for key in groups):
            own = [runs for (m, _, _), runs in groups.items() if m == model]
            for treatments in _by_arm(own, TREATMENT):
                for controls in _by_arm(own, kind.role):
                    pair = Pair(kind, model, treatments[0][0], controls[0][0])
                    found = _measured_or_gap(pair, treatments, controls, alpha)
                    (gaps if isinstance(found, Gap) else measured).append(found)  # type: ignore[arg-type]
    return tuple(_adjusted(measured, alpha)), tuple(gaps)


def _adjusted(measured: Sequence[_Measured], alpha: float) -> list[Contrast]:
    """The contrasts, each family adjusted by itself; in the order given, which is the plan's."""
    contrasts = []
    for family in dict.fromkeys(kind.family for kind in PLAN):
        own = [m for m in measured if m.pair.kind.family == family]
        compared = compare_family([m.evidence for m in own], alpha)
        for m, comparison in zip(own, compared, strict=True):
            needed = {
                e.endpoint: _needed(e, comparison.n_family, alpha) for e in comparison.endpoints
            }
            contrasts.append(
                Contrast(
                    m.pair, comparison, m.starts, m.reach, needed, m.half_recovery_test, m.notes
                )
            )
    return contrasts


def _by_arm(groups: Sequence[list[HealRun]], role: str) -> list[list[list[HealRun]]]:
    """The groups of every arm of a role."""
    arms: dict[str, list[list[HealRun]]] = {}
    for runs in groups:
        if runs[0].role == role:
            arms.setdefault(runs[0].arm, []).append(runs)
    return list(arms.values())


def _measured_or_gap(
    pair: Pair, treatments: Sequence[list[HealRun]], controls: Sequence[list[HealRun]], alpha: float
) -> _Measured | Gap:
    """The contrast of a pair of arms, given their groups, or why there is none."""
    if len(controls) > 1:  # noise of another treatment is no noise of this one
        attacks = {r.checkpoint for runs in treatments for r in runs}
        own = [c for c in controls if any(not r.reference or r.reference in attacks for r in c)]
        controls = own or controls
    if max(len(treatments), len(controls)) > 1:  # nothing says which pairs belong together
        return Gap(pair, "an arm has several settings (narrow the query with --filter)")
    result = _measure(pair, treatments[0], controls[0], alpha)
    return Gap(pair, result) if isinstance(result, str) else result
