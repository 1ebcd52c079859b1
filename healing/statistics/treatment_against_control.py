"""Treatment against damage control: paired recoveries, and the time until half of the damage is
repaired (half-recovery time).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from healing.config.arm_tags import arm_short
from healing.measurements.diagnosis import UNTRAINED
from healing.registry import DAMAGE_CONTROL, TREATMENT
from healing.statistics.checkpoint_estimates import half_times
from healing.statistics.heal_runs import HealRun, checkpoint_trajectories, tokens_per_step
from healing.statistics.intervals import ClusterMeans, cluster_means
from healing.statistics.paired_tests import (
    PRIMARY_ENDPOINTS,
    ArmComparison,
    compare_arms,
    paired_differences,
)
from healing.statistics.survival import LogRankTest, logrank_test
from healing.statistics.warning_collector import WarningCollector


@dataclass(frozen=True)
class Pair:
    """Two arms of one model, each by one of its runs."""

    model: str
    treatment: HealRun
    control: HealRun

    @property
    def short(self) -> str:
        """Shortest name of the control."""
        return arm_short(self.control.arm, self.control.label)

    @property
    def title(self) -> str:
        """``nano, HAEP against noise``."""
        return f"{self.model}, {self.treatment.label} against {self.short}"


@dataclass(frozen=True)
class Gap:
    """Why two arms are not compared."""

    pair: Pair
    why: str


@dataclass(frozen=True)
class Contrast:
    """A treatment against a damage control of one model: HAEP against Gaussian noise.

    Attributes:
        pair: The arms.
        comparison: Recovery after the last step, paired by seed.
        half_recovery_test: Endpoint → log-rank test of the half-recovery times of the
            checkpoints. Secondary: not adjusted, not paired, and no part of the comparison's
            statement.
        notes: What the data did not determine.
    """

    pair: Pair
    comparison: ArmComparison
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


def _obstacle(treatment: Sequence[HealRun], control: Sequence[HealRun]) -> str:
    """Why two groups cannot be compared; empty where they can."""
    if not {r.seed for r in treatment} & {r.seed for r in control}:
        return "no noise run shares a seed with the attack that it was matched to"
    budgets = _budget(treatment), _budget(control)
    if all(budgets) and budgets[0] != budgets[1]:
        return f"they were healed for {budgets[0]} and {budgets[1]} steps"
    tokens = tokens_per_step(treatment), tokens_per_step(control)
    if all(tokens) and tokens[0] != tokens[1]:
        return f"their healing steps have {tokens[0]} and {tokens[1]} tokens"
    return ""


def contrast(
    treatment: Sequence[HealRun], control: Sequence[HealRun], alpha: float
) -> Contrast | str:
    """A treatment against a damage control, or why they cannot be compared.

    Control runs that were matched to other states than these attacks are left out.

    Args:
        treatment: Runs of one model, arm and settings.
        control: Of the same model.
        alpha: Level of the tests.
    """
    pair = Pair(treatment[0].model, treatment[0], control[0])
    attacks = {r.checkpoint for r in treatment}
    control = [r for r in control if not r.reference or r.reference in attacks]
    obstacle = _obstacle(treatment, control)
    if obstacle:
        return obstacle
    notes = WarningCollector()
    # An arm without defined values is reported with its own group.
    already_reported = WarningCollector()
    differences = {
        e: already_reported.call(e, _differences, treatment, control, e) for e in PRIMARY_ENDPOINTS
    }
    comparison = notes.call("paired differences", compare_arms, differences, alpha=alpha)
    tests = {e: _half_recovery_test(notes, treatment, control, e) for e in PRIMARY_ENDPOINTS}
    return Contrast(pair, comparison, tests, notes.texts)


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


def contrasts(
    groups: Mapping[tuple[str, str, str], list[HealRun]], alpha: float
) -> tuple[dict[str, Contrast], dict[str, Gap]]:
    """Every treatment of a model against every damage control that was run on it.

    Args:
        groups: (model, arm, settings) → runs.
        alpha: Level of the tests.

    Returns:
        Contrasts, and why there is none although both arms were run; by model where it has one pair
        of arms, else by model and labels.
    """
    found: dict[str, Contrast] = {}
    gaps: dict[str, Gap] = {}
    for model in dict.fromkeys(key[0] for key in groups):
        arms = {
            role: _by_arm([runs for (m, _, _), runs in groups.items() if m == model], role)
            for role in (TREATMENT, DAMAGE_CONTROL)
        }
        pairs = [
            (Pair(model, t[0][0], c[0][0]), t, c)
            for t in arms[TREATMENT]
            for c in arms[DAMAGE_CONTROL]
        ]
        for pair, treatments, controls in pairs:
            key = model if len(pairs) == 1 else pair.title
            result = _contrast_of(pair, treatments, controls, alpha)
            if isinstance(result, Gap):
                gaps[key] = result
            else:
                found[key] = result
    return found, gaps


def _by_arm(groups: Sequence[list[HealRun]], role: str) -> list[list[list[HealRun]]]:
    """The groups of every arm of a role."""
    arms: dict[str, list[list[HealRun]]] = {}
    for runs in groups:
        if runs[0].role == role:
            arms.setdefault(runs[0].arm, []).append(runs)
    return list(arms.values())


def _contrast_of(
    pair: Pair, treatments: Sequence[list[HealRun]], controls: Sequence[list[HealRun]], alpha: float
) -> Contrast | Gap:
    """The contrast of a pair of arms, given their groups, or why there is none."""
    if len(controls) > 1:  # noise of another treatment is no noise of this one
        attacks = {r.checkpoint for runs in treatments for r in runs}
        own = [c for c in controls if any(not r.reference or r.reference in attacks for r in c)]
        controls = own or controls
    if max(len(treatments), len(controls)) > 1:  # nothing says which pairs belong together
        return Gap(pair, "an arm has several settings (narrow the query with --filter)")
    result = contrast(treatments[0], controls[0], alpha)
    return Gap(pair, result) if isinstance(result, str) else result
