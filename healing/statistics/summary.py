"""Healing runs pooled into groups: the statistics of the summary, as plain data in and out."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from healing.measurements.diagnosis import LOCKOUT
from healing.measurements.recovery import Verdict
from healing.registry import SHAM
from healing.statistics.checkpoint_estimates import (
    Asymptotes,
    HalfTimes,
    VerdictPlan,
    fit_asymptotes,
    half_times,
    plan_verdict,
)
from healing.statistics.heal_runs import (
    ENDPOINTS,
    SHAM_ENDPOINTS,
    HealRun,
    Repeat,
    checkpoint_trajectories,
    defined_runs,
    distinct_runs,
    measurement_error,
    shared_steps,
    tokens_per_step,
    values_at,
    without_raised_rank,
    worst_case_values,
)
from healing.statistics.intervals import (
    MIN_BOOTSTRAP_CHECKPOINTS,
    ClusterMeans,
    DegenerateDataWarning,
    Interval,
    bca_interval,
    cluster_means,
    recovery_interval,
    scale_interval,
)
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS, ArmComparison
from healing.statistics.size_trend import ScalingSlope, scaling_slope
from healing.statistics.treatment_against_control import Contrast, Gap, contrasts
from healing.statistics.variance_components import VarianceComponents, variance_components
from healing.statistics.verdicts import GroupVerdict, group_verdict
from healing.statistics.warning_collector import WarningCollector


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
        arm: Attack method (arm).
        settings: Hash that parts otherwise equal groups.
        noise_match: What noise shares with the attack of its seed; empty for other arms.
        n_params: Parameters of the model.
        n_runs: Finished runs.
        n_checkpoints: Independent units among them.
        n_undefined: Runs without a defined rank recovery.
        n_lockout: Runs whose collapsed model cannot compute in float32.
        spectral_states: State → number of runs.
        means: Endpoint → checkpoint means.
        intervals: Endpoint → Student t interval with the error of measurement.
        bootstrap: Endpoint → BCa interval (from 10 checkpoints).
        verdicts: Endpoint → verdict by interval and count, and what it rests on.
        half_recovery: Endpoint → Kaplan–Meier median of the steps to 50 %.
        bands: Endpoint → mean trajectory.
        notes: What the data did not determine.
        statuses: Status → number of runs.
        half_times: Endpoint → steps to 50 % of every checkpoint, and their Kaplan–Meier curve.
        asymptotes: Endpoint → fitted asymptotes and half-lives.
        plans: Endpoint without a decided verdict → checkpoints that would decide it.
        variance: Endpoint → variance between and within checkpoints.
        tokens_per_step: Training tokens of one healing step; 0 where unknown.
        role: Of the arm, as in :data:`healing.registry.ROLES`.
        label: Of the arm, for people.
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
    verdicts: Mapping[str, GroupVerdict]
    half_recovery: Mapping[str, Interval]
    bands: Mapping[str, Band]
    notes: tuple[str, ...]
    statuses: Mapping[str, int] = field(default_factory=dict)
    half_times: Mapping[str, HalfTimes] = field(default_factory=dict)
    asymptotes: Mapping[str, Asymptotes] = field(default_factory=dict)
    plans: Mapping[str, VerdictPlan] = field(default_factory=dict)
    variance: Mapping[str, VarianceComponents] = field(default_factory=dict)
    tokens_per_step: int = 0
    role: str = ""
    label: str = ""

    @property
    def verdict(self) -> Verdict:
        """Of rank recovery."""
        return self.verdicts["rank_recovery_pct"].verdict

    @property
    def verdict_loss(self) -> Verdict:
        """Of loss recovery."""
        return self.verdicts["loss_recovery_pct"].verdict

    @property
    def half_recovery_tokens(self) -> dict[str, Interval]:
        """As ``half_recovery`` in training tokens; empty where tokens per step are unknown."""
        if not self.tokens_per_step:
            return {}
        return {e: scale_interval(i, self.tokens_per_step) for e, i in self.half_recovery.items()}

    def undefined_checkpoints(self, endpoint: str) -> int:
        """Checkpoints without a defined recovery: those that the endpoint's n does not count."""
        return int((self.means[endpoint].counts == 0).sum())


@dataclass(frozen=True)
class Summary:
    """The whole table.

    Attributes:
        groups: Ordered by model size, then arm.
        contrasts: Model → treatment against damage control (HAEP against Gaussian noise); with
            several pairs of arms, model and their labels.
        gaps: The same → why their runs are not compared.
        slopes: Arm → rank recovery against log10(parameters), from three sizes on.
        failed: Runs that did not end well.
        running: Runs that the store does not say have ended.
        repeats: Finished runs that repeat another one and are not counted.
        undefined: Finished runs without a defined rank recovery.
        notes: What contrasts and slopes do not determine: (of what, why).
        confidence: Level of all intervals.
    """

    groups: tuple[GroupSummary, ...]
    contrasts: Mapping[str, Contrast]
    gaps: Mapping[str, Gap]
    slopes: Mapping[str, ScalingSlope]
    failed: tuple[HealRun, ...]
    running: tuple[HealRun, ...]
    repeats: tuple[Repeat, ...]
    undefined: tuple[HealRun, ...]
    notes: tuple[tuple[str, str], ...]
    confidence: float

    @property
    def comparisons(self) -> dict[str, ArmComparison]:
        """As ``contrasts``: recovery after the last step, paired by seed."""
        return {model: found.comparison for model, found in self.contrasts.items()}

    def label(self, arm: str) -> str:
        """Of an arm, for people."""
        return next((g.label for g in self.groups if g.arm == arm), arm)


def _settings_order(runs: Iterable[HealRun]) -> dict[tuple[str, str, str], list[HealRun]]:
    groups: dict[tuple[str, str, str], list[HealRun]] = {}
    for run in sorted(runs, key=lambda r: (r.n_params, r.model, r.arm, r.settings)):
        groups.setdefault((run.model, run.arm, run.settings), []).append(run)
    return groups


def _band(runs: Sequence[HealRun], endpoint: str, confidence: float) -> Band:
    """Interval over checkpoints at every step that all runs with a value measured."""
    runs = defined_runs(runs, endpoint)
    steps, checkpoints = shared_steps(runs), [r.checkpoint for r in runs]
    error, intervals = measurement_error(runs, endpoint), []
    columns = zip(*(values_at(run, endpoint, steps) for run in runs), strict=True)
    for step, values in zip(steps, columns, strict=True):
        with warnings.catch_warnings():
            # The summary's notes speak of the final values.
            warnings.simplefilter("ignore", DegenerateDataWarning)
            means = cluster_means(values, checkpoints).means
            found = recovery_interval(means, confidence, error)
        # At step 0 recovery is 0 by definition: no error, and no interval.
        blank = {} if step else {"low": math.nan, "high": math.nan}
        intervals.append(replace(found, **blank))
    return Band(tuple(steps), tuple(intervals))


def _verdict(
    runs: Sequence[HealRun], endpoint: str, means: ClusterMeans, confidence: float
) -> GroupVerdict:
    checkpoints = [r.checkpoint for r in runs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DegenerateDataWarning)  # said of the means themselves
        low, high = (
            cluster_means(case, checkpoints).means for case in worst_case_values(runs, endpoint)
        )
    error = measurement_error(runs, endpoint)
    return group_verdict(means.means, means.undefined_fraction, (low, high), confidence, error)


def _plans(
    means: Mapping[str, ClusterMeans], verdicts: Mapping[str, GroupVerdict], confidence: float
) -> dict[str, VerdictPlan]:
    """Plans of the endpoints whose verdict more checkpoints would decide."""
    more = (Verdict.INCONCLUSIVE, Verdict.TOO_FEW)
    open_ones = [e for e in PRIMARY_ENDPOINTS if verdicts[e].verdict in more]
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
    first, notes = runs[0], WarningCollector()
    checkpoints = [r.checkpoint for r in runs]
    measured = [e for e in ENDPOINTS if any(e in r.final for r in runs)]
    finals = {e: [r.final.get(e, math.nan) for r in runs] for e in measured}
    means = {e: notes.call(e, cluster_means, finals[e], checkpoints) for e in measured}
    intervals = {
        e: notes.call(e, recovery_interval, means[e].means, confidence, measurement_error(runs, e))
        for e in measured
    }
    judged = [e for e in (*PRIMARY_ENDPOINTS, *SHAM_ENDPOINTS) if e in measured]
    verdicts = {e: _verdict(runs, e, means[e], confidence) for e in judged}
    enough = len(set(checkpoints)) >= MIN_BOOTSTRAP_CHECKPOINTS
    bootstrap = {
        e: notes.call(e, bca_interval, means[e].means, rng, confidence) for e in measured if enough
    }
    states = [r.spectral_state for r in runs]
    statuses = [r.status for r in runs]
    paths = {e: checkpoint_trajectories(runs, e) for e in PRIMARY_ENDPOINTS}
    half = {e: notes.call(e, half_times, p, confidence) for e, p in paths.items()}
    variance = {
        e: notes.call(e, variance_components, finals[e], checkpoints) for e in PRIMARY_ENDPOINTS
    }
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
        verdicts=verdicts,
        half_recovery={e: h.curve.median for e, h in half.items()},
        bands={e: _band(runs, e, confidence) for e in PRIMARY_ENDPOINTS},
        notes=notes.texts,
        statuses={s: statuses.count(s) for s in sorted(set(statuses))},
        half_times=half,
        asymptotes={e: fit_asymptotes(p, confidence) for e, p in paths.items()},
        plans=_plans(means, verdicts, confidence),
        variance=variance,
        tokens_per_step=tokens_per_step(runs),
        role=first.role,
        label=first.label,
    )


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
    groups = tuple(summarize_group(members, confidence, rng) for members in grouped.values())
    found, gaps = contrasts(grouped, 1.0 - confidence)
    slope_notes = WarningCollector()
    slopes = _slopes(groups, confidence, slope_notes)
    notes = [(c.pair.title, n) for c in found.values() for n in c.notes]
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
    )
