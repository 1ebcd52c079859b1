"""One group of healing runs: what their recoveries are, and what they say."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np

from healing.measurements.diagnosis import LOCKOUT
from healing.measurements.recovery import Verdict
from healing.statistics.budgets import (
    BudgetPoint,
    Persistence,
    panel_verdicts,
    persistence,
    verdict_of_values,
    verdicts_by_budget,
)
from healing.statistics.checkpoint_estimates import (
    HalfTimes,
    VerdictPlan,
    half_times,
    plan_verdict,
)
from healing.statistics.fits.asymptotes import Asymptotes, fit_asymptotes
from healing.statistics.heal_runs import (
    ENDPOINTS,
    SHAM_ENDPOINTS,
    HealRun,
    checkpoint_trajectories,
    defined_runs,
    measurement_error,
    shared_steps,
    tokens_per_step,
    values_at,
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
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS
from healing.statistics.variance_components import VarianceComponents, variance_components
from healing.statistics.verdicts import GroupVerdict
from healing.statistics.warning_collector import WarningCollector


@dataclass(frozen=True)
class Band:
    """Mean trajectory of a group with its interval at every step."""

    steps: tuple[int, ...]
    intervals: tuple[Interval, ...]


@dataclass(frozen=True)
class Damage:
    """What an attack did before healing began; means over checkpoints, NaN where unknown.

    Attributes:
        rank_reduction_pct: Of the healthy rank, percent of it.
        start_loss: Of the collapsed state, nats per token.
        final_loss: After healing, nats per token.
        weight_change: ‖W−W₀‖/‖W₀‖ of the collapsed weights.
    """

    rank_reduction_pct: float = math.nan
    start_loss: float = math.nan
    final_loss: float = math.nan
    weight_change: float = math.nan


def damage_of(runs: Sequence[HealRun]) -> Damage:
    """Means over the checkpoints of a group."""
    names = [f.name for f in fields(Damage)]
    return Damage(**{name: _checkpoint_mean(runs, name) for name in names})


def _checkpoint_mean(runs: Sequence[HealRun], name: str) -> float:
    values: dict[str, list[float]] = {}
    for run in runs:
        value = getattr(run, name)
        if math.isfinite(value):
            values.setdefault(run.checkpoint, []).append(value)
    means = [sum(v) / len(v) for v in values.values()]
    return sum(means) / len(means) if means else math.nan


def _shared_healer(runs: Sequence[HealRun]) -> str:
    healers = {run.healer for run in runs}
    return healers.pop() if len(healers) == 1 else ""


@dataclass(frozen=True)
class AgainstScratch:
    """Loss after healing beside that of learning from scratch, after equal tokens.

    Attributes:
        loss: Of the group, nats per token, mean over checkpoints.
        scratch_loss: Of the untrained model through the same training.
        pairs: Seeds that both have.
        lower: Of these, with the lower loss in the group.
    """

    loss: float
    scratch_loss: float
    pairs: int
    lower: int

    @property
    def beaten(self) -> bool:
        """Whether the group's mean loss is the lower one."""
        return self.loss < self.scratch_loss


def against_scratch(runs: Sequence[HealRun], scratch: Sequence[HealRun]) -> AgainstScratch | None:
    """The comparison, at equal steps and tokens; ``None`` where there is none.

    Args:
        runs: Of one group.
        scratch: Healing runs of the untrained model.
    """
    sides = [[r for r in side if math.isfinite(r.final_loss)] for side in (runs, scratch)]
    budgets = [{(r.steps[-1], r.tokens_per_step) for r in side if r.steps} for side in sides]
    if not all(sides) or budgets[0] != budgets[1] or len(budgets[0]) != 1:
        return None
    by_seed = [
        {seed: _checkpoint_mean([r for r in side if r.seed == seed], "final_loss")
         for seed in {r.seed for r in side}}
        for side in sides
    ]  # fmt: skip
    shared = by_seed[0].keys() & by_seed[1].keys()
    lower = sum(by_seed[0][seed] < by_seed[1][seed] for seed in shared)
    own, other = (_checkpoint_mean(side, "final_loss") for side in sides)
    return AgainstScratch(own, other, len(shared), lower)


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
        panel: Measure → verdict by it, beside the primary one; the loss is one of them.
        by_budget: Endpoint → verdicts at some of the measured steps.
        persistence: What is known of a rank that did not recover.
        damage: What the attack did, mean over checkpoints.
        healer: What healed all of them, for people; empty where unknown or several.
        scratch: Its loss beside that of learning from scratch, where that was run.
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
    panel: Mapping[str, GroupVerdict] = field(default_factory=dict)
    by_budget: Mapping[str, tuple[BudgetPoint, ...]] = field(default_factory=dict)
    persistence: Persistence | None = None
    damage: Damage = field(default_factory=Damage)
    healer: str = ""
    scratch: AgainstScratch | None = None
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
        intervals.append(found if step else replace(found, low=math.nan, high=math.nan))
    return Band(tuple(steps), tuple(intervals))


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
    verdicts = {e: verdict_of_values(runs, finals[e], e, confidence) for e in judged}
    panel = panel_verdicts(runs, confidence)
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
        panel=panel,
        by_budget={e: verdicts_by_budget(runs, e, confidence) for e in PRIMARY_ENDPOINTS},
        persistence=persistence(runs, first.model, verdicts["rank_recovery_pct"], panel),
        damage=damage_of(runs),
        healer=_shared_healer(runs),
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
