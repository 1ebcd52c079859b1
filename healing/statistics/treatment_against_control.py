"""HAEP against noise of one model: paired recoveries, and the time until half of the damage is
repaired (half-recovery time).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from healing.config.shared import CONTROL, TREATMENT
from healing.measurements.diagnosis import UNTRAINED
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
class Contrast:
    """HAEP against Gaussian noise of one model.

    Attributes:
        comparison: Recovery after the last step, paired by seed.
        half_recovery_test: Endpoint → log-rank test of the half-recovery times of the
            checkpoints. Secondary: not adjusted, not paired, and no part of the comparison's
            statement.
        notes: What the data did not determine.
    """

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
    """HAEP against noise, or why they cannot be compared.

    Noise that was matched to other states than these attacks is left out.

    Args:
        treatment: HAEP's runs, all of one settings.
        control: Noise runs, all of one settings.
        alpha: Level of the tests.
    """
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
    return Contrast(comparison, tests, notes.texts)


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
) -> tuple[dict[str, Contrast], dict[str, str]]:
    """Model → contrast, and model → why there is none although both arms were run.

    Args:
        groups: (model, arm, settings) → runs.
        alpha: Level of the tests.
    """
    found: dict[str, Contrast] = {}
    gaps: dict[str, str] = {}
    for model in dict.fromkeys(key[0] for key in groups):
        arms = [
            [runs for (m, a, _), runs in groups.items() if (m, a) == (model, arm)]
            for arm in (TREATMENT, CONTROL)
        ]
        if not all(arms):
            continue
        if max(map(len, arms)) > 1:  # nothing says which pairs belong together
            gaps[model] = "an arm has several settings (narrow the query with --filter)"
            continue
        result = contrast(arms[0][0], arms[1][0], alpha)
        if isinstance(result, str):
            gaps[model] = result
        else:
            found[model] = result
    return found, gaps
