"""Healing runs pooled into groups: the statistics of the summary, as plain data in and out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np

from healing.comparison import PRIMARY_ENDPOINTS, ArmComparison, compare_arms, paired_differences
from healing.config import CONTROL, SHAM, TREATMENT
from healing.lockout import LOCKOUT
from healing.prospects import (
    Approach,
    CheckpointTrajectory,
    HalfTimes,
    VerdictPlan,
    approach,
    half_times,
    plan_verdict,
)
from healing.scaling import ScalingSlope, scaling_slope
from healing.stats import (
    ClusterMeans,
    DegenerateDataWarning,
    Interval,
    bca_interval,
    cluster_means,
    group_verdict,
    t_interval,
)

SHAM_ENDPOINTS = ("rank_recovery_sham_pct", "loss_recovery_sham_pct")
RANK_ENDPOINTS = ("rank_recovery_pct", "rank_recovery_sham_pct")
UNIGRAM = "unigram_loss_recovery_pct"
"""What a model that knows token frequencies alone would score on loss recovery."""
ENDPOINTS = (*PRIMARY_ENDPOINTS, "ppl_improvement_pct", *SHAM_ENDPOINTS, UNIGRAM)
T = TypeVar("T")


@dataclass(frozen=True)
class HealRun:
    """One healing run as the statistics see it.

    Attributes:
        run_id: Where it is stored.
        name: What a person calls it.
        finished: Whether it ended well; otherwise ``failure`` says why.
        model: Model size.
        arm: Way of hurting.
        settings: Hash of everything but seed and replicate; runs of other settings are not pooled.
        checkpoint: The collapsed state: the independent unit.
        seed: Of the attack; pairs the arms.
        n_params: Parameters of the model.
        final: Endpoint → percent after the last step; NaN where undefined, absent where it was
            not asked for (the sham's).
        steps: Measured steps.
        trajectory: Endpoint → percent at each step.
        status: As :attr:`healing.lockout.Diagnosis.status`.
        spectral_state: ``collapsed``, ``inflated``, ``unchanged``, ``undefined``.
        undefined_reason: Why rank recovery is undefined; empty where defined.
        noise_match: What noise shares with the attack of its seed; empty for other arms.
        reference: The collapsed state that noise was matched to; empty where it was to none.
        failure: Why the run failed.
    """

    run_id: str
    name: str
    finished: bool
    model: str = ""
    arm: str = ""
    settings: str = ""
    checkpoint: str = ""
    seed: str = ""
    n_params: int = 0
    final: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    trajectory: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    status: str = "ok"
    spectral_state: str = ""
    undefined_reason: str = ""
    noise_match: str = ""
    reference: str = ""
    failure: str = ""


@dataclass(frozen=True)
class Band:
    """Mean trajectory of a group with its interval at every step."""

    steps: tuple[int, ...]
    intervals: tuple[Interval, ...]


@dataclass(frozen=True)
class GroupSummary:
    """Statistics of the runs of one model, arm and settings.

    Attributes:
        model: Model size.
        arm: Way of hurting.
        settings: Hash that parts otherwise equal groups.
        noise_match: What noise shares with the attack of its seed; empty for other arms.
        n_params: Parameters of the model.
        n_runs: Finished runs.
        n_checkpoints: Independent units among them.
        n_undefined: Runs without a defined rank recovery.
        n_lockout: Runs whose collapsed model cannot compute in float32.
        spectral_states: State → number of runs.
        means: Endpoint → checkpoint means.
        intervals: Endpoint → Student t interval.
        bootstrap: Endpoint → BCa interval (from 10 checkpoints).
        verdict: By the interval of rank recovery.
        verdict_loss: By the interval of loss recovery.
        half_recovery: Endpoint → Kaplan–Meier median of the steps to 50 %.
        bands: Endpoint → mean trajectory.
        notes: What the data did not determine.
        statuses: Status → number of runs.
        half_times: Endpoint → steps to 50 % of every checkpoint, and their Kaplan–Meier curve.
        approaches: Endpoint → fitted asymptote and half-life.
        plans: Endpoint with an inconclusive verdict → checkpoints that would decide it.
    """

    model: str
    arm: str
    settings: str
    noise_match: str
    n_params: int
    n_runs: int
    n_checkpoints: int
    n_undefined: int
    n_lockout: int
    spectral_states: Mapping[str, int]
    means: Mapping[str, ClusterMeans]
    intervals: Mapping[str, Interval]
    bootstrap: Mapping[str, Interval]
    verdict: str
    verdict_loss: str
    half_recovery: Mapping[str, Interval]
    bands: Mapping[str, Band]
    notes: tuple[str, ...]
    statuses: Mapping[str, int] = field(default_factory=dict)
    half_times: Mapping[str, HalfTimes] = field(default_factory=dict)
    approaches: Mapping[str, Approach] = field(default_factory=dict)
    plans: Mapping[str, VerdictPlan] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """The whole table.

    Attributes:
        groups: Ordered by model size, then arm.
        comparisons: Model → HAEP against Gaussian noise, paired by seed.
        slopes: Arm → rank recovery against log10(parameters), from three sizes on.
        failed: Runs that did not finish.
        undefined: Finished runs without a defined rank recovery.
        confidence: Level of all intervals.
    """

    groups: tuple[GroupSummary, ...]
    comparisons: Mapping[str, ArmComparison]
    slopes: Mapping[str, ScalingSlope]
    failed: tuple[HealRun, ...]
    undefined: tuple[HealRun, ...]
    confidence: float


class _Notes:
    """Collects what the statistics warn about instead of printing it."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def call(self, function: Callable[..., T], *args: object, **options: object) -> T:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", DegenerateDataWarning)
            result = function(*args, **options)
        for warning in caught:
            text = str(warning.message)
            if text not in self.texts:
                self.texts.append(text)
        return result


def _settings_order(runs: Iterable[HealRun]) -> dict[tuple[str, str, str], list[HealRun]]:
    groups: dict[tuple[str, str, str], list[HealRun]] = {}
    for run in sorted(runs, key=lambda r: (r.n_params, r.model, r.arm, r.settings)):
        groups.setdefault((run.model, run.arm, run.settings), []).append(run)
    return groups


def _defined(runs: Sequence[HealRun], endpoint: str) -> list[HealRun]:
    """The runs with a defined value somewhere: one that could not be trained ends early, and its
    steps would cut those of the others short. All of them, where none has any.
    """
    found = [r for r in runs if any(map(math.isfinite, r.trajectory[endpoint]))]
    return found or list(runs)


def _band(runs: Sequence[HealRun], endpoint: str, confidence: float, notes: _Notes) -> Band:
    """Interval over checkpoints at every step that all runs with a value measured."""
    runs = _defined(runs, endpoint)
    shared = sorted(set.intersection(*(set(r.steps) for r in runs))) if runs else []
    checkpoints = [r.checkpoint for r in runs]
    intervals = []
    for step in shared:
        values = [r.trajectory[endpoint][r.steps.index(step)] for r in runs]
        with warnings.catch_warnings():
            # Step 0 has no spread by definition; the summary notes speak of the final values.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            means = cluster_means(values, checkpoints).means
            intervals.append(t_interval(means, confidence))
    return Band(tuple(shared), tuple(intervals))


def _checkpoint_trajectories(runs: Sequence[HealRun], endpoint: str) -> list[CheckpointTrajectory]:
    """One per checkpoint, its replicates at the steps that all of them measured."""
    found = []
    for checkpoint in dict.fromkeys(r.checkpoint for r in runs):
        own = _defined([r for r in runs if r.checkpoint == checkpoint], endpoint)
        shared = sorted(set.intersection(*(set(r.steps) for r in own)))
        rows = (tuple(r.trajectory[endpoint][r.steps.index(s)] for s in shared) for r in own)
        found.append(CheckpointTrajectory(tuple(shared), tuple(rows)))
    return found


def _plans(
    means: Mapping[str, ClusterMeans], intervals: Mapping[str, Interval], confidence: float
) -> dict[str, VerdictPlan]:
    """Plans of the endpoints whose verdict is inconclusive."""
    open_ones = [e for e in PRIMARY_ENDPOINTS if _verdict(means, intervals, e) == "inconclusive"]
    plans = {e: plan_verdict(means[e].means, confidence) for e in open_ones}
    return {endpoint: plan for endpoint, plan in plans.items() if plan is not None}


def summarize_group(
    runs: Sequence[HealRun], confidence: float, rng: np.random.Generator
) -> GroupSummary:
    """Statistics of runs that share model, arm and settings.

    Args:
        runs: Finished runs, at least one.
        confidence: Level of the intervals.
        rng: Draws the bootstrap.
    """
    first, notes = runs[0], _Notes()
    checkpoints = [r.checkpoint for r in runs]
    measured = [e for e in ENDPOINTS if any(e in r.final for r in runs)]
    means = {
        e: notes.call(cluster_means, [r.final.get(e, math.nan) for r in runs], checkpoints)
        for e in measured
    }
    intervals = {e: notes.call(t_interval, means[e].means, confidence) for e in measured}
    enough = len(set(checkpoints)) >= 10
    bootstrap = {
        e: notes.call(bca_interval, means[e].means, rng, confidence) for e in measured if enough
    }
    states = [r.spectral_state for r in runs]
    statuses = [r.status for r in runs]
    paths = {e: _checkpoint_trajectories(runs, e) for e in PRIMARY_ENDPOINTS}
    half = {e: notes.call(half_times, p, confidence) for e, p in paths.items()}
    return GroupSummary(
        model=first.model,
        arm=first.arm,
        settings=first.settings,
        noise_match=first.noise_match,
        n_params=first.n_params,
        n_runs=len(runs),
        n_checkpoints=len(set(checkpoints)),
        n_undefined=means["rank_recovery_pct"].n_undefined,
        n_lockout=statuses.count(LOCKOUT),
        spectral_states={s: states.count(s) for s in sorted(set(states))},
        means=means,
        intervals=intervals,
        bootstrap=bootstrap,
        verdict=_verdict(means, intervals, "rank_recovery_pct"),
        verdict_loss=_verdict(means, intervals, "loss_recovery_pct"),
        half_recovery={e: h.curve.median for e, h in half.items()},
        bands={e: _band(runs, e, confidence, notes) for e in PRIMARY_ENDPOINTS},
        notes=tuple(notes.texts),
        statuses={s: statuses.count(s) for s in sorted(set(statuses))},
        half_times=half,
        approaches={e: approach(p, confidence) for e, p in paths.items()},
        plans=_plans(means, intervals, confidence),
    )


def _verdict(
    means: Mapping[str, ClusterMeans], intervals: Mapping[str, Interval], endpoint: str
) -> str:
    return group_verdict(intervals[endpoint], means[endpoint].undefined_fraction)


def _by_seed(runs: Sequence[HealRun], endpoint: str) -> ClusterMeans:
    values = [r.final.get(endpoint, math.nan) for r in runs]
    return cluster_means(values, [r.seed for r in runs])


def _without_raised_rank(run: HealRun) -> HealRun:
    """Rank recovery of a run whose attack raised the rank, undefined: a rank that was raised comes
    down again, which is no recovery from a collapse and is not averaged with one.
    """
    if run.spectral_state != "inflated":
        return run
    nan = {e: math.nan for e in RANK_ENDPOINTS if e in run.final}
    paths = {e: (math.nan,) * len(run.steps) for e in RANK_ENDPOINTS if e in run.trajectory}
    return replace(
        run,
        final={**run.final, **nan},
        trajectory={**run.trajectory, **paths},
        undefined_reason="the attack raised the effective rank: nothing had collapsed",
    )


def _compare(
    treatment: Sequence[HealRun], control: Sequence[HealRun], alpha: float
) -> ArmComparison | None:
    """HAEP against noise of the same seeds; ``None`` where no seed is in both. Noise that was
    matched to something else than these attacks is not compared with them.
    """
    attacks = {r.checkpoint for r in treatment}
    control = [r for r in control if not r.reference or r.reference in attacks]
    if not {r.seed for r in treatment} & {r.seed for r in control}:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)
        differences = {
            e: paired_differences(_by_seed(treatment, e), _by_seed(control, e)).differences
            for e in PRIMARY_ENDPOINTS
        }
        return compare_arms(differences, alpha=alpha)


def _comparisons(
    groups: Mapping[tuple[str, str, str], list[HealRun]], alpha: float
) -> dict[str, ArmComparison]:
    found = {}
    for model in dict.fromkeys(key[0] for key in groups):
        arms = {
            arm: [runs for (m, a, _), runs in groups.items() if (m, a) == (model, arm)]
            for arm in (TREATMENT, CONTROL)
        }
        # With several settings per arm nothing says which pairs belong together.
        if all(len(candidates) == 1 for candidates in arms.values()):
            comparison = _compare(arms[TREATMENT][0], arms[CONTROL][0], alpha)
            if comparison is not None:
                found[model] = comparison
    return found


def _slopes(groups: Sequence[GroupSummary], confidence: float) -> dict[str, ScalingSlope]:
    slopes = {}
    for arm in dict.fromkeys(g.arm for g in groups):
        own = [g for g in groups if g.arm == arm and g.n_params > 0]
        if len({g.model for g in own}) < len(own):
            continue  # several settings of one size: nothing says which belong on one line
        # One mean per size: sizes deviate from a line, so that checkpoints of one size are not
        # independent given the line (their interval would cover about half of the time).
        points = [(math.log10(g.n_params), g.intervals["rank_recovery_pct"].point) for g in own]
        points = [(x, y) for x, y in points if math.isfinite(y)]
        if len({x for x, _ in points}) >= 3:
            sizes, recovery = zip(*points, strict=True)
            slopes[arm] = _Notes().call(scaling_slope, sizes, recovery, confidence)
    return slopes


def summarize_runs(runs: Sequence[HealRun], confidence: float, rng: np.random.Generator) -> Summary:
    """Group, estimate, compare; nothing is left out without being listed.

    Args:
        runs: All runs of the query, finished or not.
        confidence: Level of the intervals.
        rng: Draws the bootstrap.
    """
    finished = [_without_raised_rank(r) for r in runs if r.finished]
    grouped = _settings_order(finished)
    groups = tuple(summarize_group(members, confidence, rng) for members in grouped.values())
    return Summary(
        groups=groups,
        comparisons=_comparisons(grouped, 1.0 - confidence),
        slopes=_slopes(groups, confidence),
        failed=tuple(r for r in runs if not r.finished),
        # The sham changes nothing by design: not news.
        undefined=tuple(r for r in finished if r.undefined_reason and r.arm != SHAM),
        confidence=confidence,
    )
