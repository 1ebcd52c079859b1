"""Is it the attack, or how far it went? Recovery against weight distance and loss, over all arms.

Rank recovery of a checkpoint = arm + β·log₂ distance + γ·log₂ loss at the start of healing, over
the checkpoints of one model that were healed alike. Arms of one attack seed share batches and
initial draws, so the seed is the cluster (:mod:`healing.statistics.fits.cluster_robust`). What the
data do not carry is left out and named: arms that do not overlap with the reference in distance or
loss, covariates that do not vary within arms or cannot be told apart, and everything where seeds
are few. It is an observation: nobody set the distances, which are outcomes of the attacks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from healing.registry import SHAM, TREATMENT, YARDSTICK
from healing.statistics.fits.cluster_robust import cluster_robust
from healing.statistics.heal_runs import HealRun
from healing.statistics.intervals import FloatArray, Interval

ENDPOINT = "rank_recovery_pct"
MIN_SEEDS = 5
"""Fewest clusters with a regression."""
MIN_DEGREES = 3.0
"""Satterthwaite degrees of freedom; t quantiles do not hold below (measured: docs/method.md)."""
MIN_IN_COMMON = 2
"""Checkpoints of each of two arms that must lie in the range that both cover."""
MAX_CORRELATION = 0.95
"""Within arms; above, distance and loss cannot be told apart."""
MIN_LOG_SPREAD = 0.02
"""Standard deviation within arms of a log₂ covariate, about 1.4 %: below, it says nothing."""
NAMES = {"weight_change": "distance", "start_loss": "loss"}
COVARIATES = tuple(NAMES)


@dataclass(frozen=True)
class DamagePoint:
    """One checkpoint: what the attack did to it, and its final rank recovery (mean of replicates).

    ``weight_change`` is ‖W−W₀‖/‖W₀‖, ``start_loss`` in nats per token, ``recovery`` in per cent.
    """

    arm: str
    label: str
    seed: str
    weight_change: float
    start_loss: float
    recovery: float


@dataclass(frozen=True)
class DamageRegression:
    """What distance and loss explain of the recoveries of one model.

    Attributes:
        points: All checkpoints with distance, loss and recovery that were healed alike.
        reference: Label of the arm that the others are compared with: the treatment, unless it has
            one checkpoint.
        n_seeds: Clusters.
        unadjusted: Label of an arm → its mean recovery minus the reference's, points.
        adjusted: The same at equal distance and loss (those of ``covariates``), where it
            can be said.
        covariates: What is held equal.
        slopes: ``weight_change``, ``start_loss`` → points per doubling, within arms, the other one
            held equal.
        apart: Label of an arm → in what it does not overlap with the reference.
        left_out: What else was left out, and why.
        others: Runs of this model that were healed otherwise.
    """

    points: tuple[DamagePoint, ...]
    reference: str = ""
    n_seeds: int = 0
    unadjusted: Mapping[str, Interval] = field(default_factory=dict)
    adjusted: Mapping[str, Interval] = field(default_factory=dict)
    covariates: tuple[str, ...] = ()
    slopes: Mapping[str, Interval] = field(default_factory=dict)
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    others: int = 0

    @property
    def arms(self) -> tuple[str, ...]:
        """Labels, the reference first."""
        labels = dict.fromkeys(p.label for p in self.points)
        return tuple(sorted(labels, key=lambda label: label != self.reference))


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if math.isfinite(v)]
    return sum(known) / len(known) if known else math.nan


def _points(runs: Sequence[HealRun]) -> list[DamagePoint]:
    """One per checkpoint whose distance, loss and recovery are known; distances of 0 have no
    logarithm.
    """
    settings: dict[str, set[str]] = {}
    checkpoints: dict[tuple[str, str, str], list[HealRun]] = {}
    for run in runs:
        settings.setdefault(run.arm, set()).add(run.settings)
        checkpoints.setdefault((run.arm, run.settings, run.checkpoint), []).append(run)
    found = []
    for own in checkpoints.values():
        first = own[0]
        several = len(settings[first.arm]) > 1
        label = f"{first.label} #{first.settings[:6]}" if several else first.label
        numbers = [
            _mean([r.weight_change for r in own]),
            _mean([r.start_loss for r in own]),
            _mean([r.final.get(ENDPOINT, math.nan) for r in own]),
        ]
        if all(map(math.isfinite, numbers)) and min(numbers[:2]) > 0.0:
            found.append(DamagePoint(first.arm, label, first.seed, *numbers))
    return found


def _healed_alike(runs: Sequence[HealRun]) -> tuple[list[HealRun], int]:
    """The runs of the healer, steps and tokens that most arms and then most checkpoints have, and
    how many runs had others.
    """
    attacked = [r for r in runs if r.role not in (SHAM, YARDSTICK) and r.steps]
    by_care: dict[tuple[str, int, int], list[HealRun]] = {}
    for run in attacked:
        by_care.setdefault((run.healer, run.steps[-1], run.tokens_per_step), []).append(run)
    if not by_care:
        return [], 0

    def extent(found: list[HealRun]) -> tuple[int, int]:
        return len({r.arm for r in found}), len({r.checkpoint for r in found})

    kept = max(by_care.values(), key=extent)
    return kept, len(attacked) - len(kept)


def damage_regression(runs: Sequence[HealRun], confidence: float = 0.95) -> DamageRegression | None:
    """The regression of one model's runs; ``None`` where fewer than two arms have a distance.

    Args:
        runs: Finished runs of one model.
        confidence: Level of the intervals.
    """
    alike, others = _healed_alike(runs)
    points = _points(alike)
    sizes = Counter(p.label for p in points)
    if len(sizes) < 2:
        return None
    treated = {r.arm for r in alike if r.role == TREATMENT}

    def standing(label: str) -> tuple[bool, bool, int]:
        return sizes[label] > 1, _arm_of(points, label) in treated, sizes[label]

    reference = max(sizes, key=standing)
    found = DamageRegression(tuple(points), reference, len({p.seed for p in points}), others=others)
    left_out = [f"{label} has one checkpoint" for label, n in sizes.items() if n < 2]
    kept = [p for p in points if sizes[p.label] > 1]
    seeds = len({p.seed for p in kept})
    if seeds < MIN_SEEDS:
        reason = f"{seeds} attack seeds, at least {MIN_SEEDS} needed"
        return replace(found, left_out=(*left_out, reason))
    apart = _apart(kept, reference)
    near = [p for p in kept if p.label not in apart]
    unadjusted, _, thin = _regress(kept, reference, (), confidence)
    covariates, why = _usable(near)
    adjusted: dict[str, Interval] = {}
    slopes: dict[str, Interval] = {}
    thinner: tuple[str, ...] = ()
    if len({p.label for p in near}) > 1 and len({p.seed for p in near}) < MIN_SEEDS:
        why = (*why, f"arms that overlap have under {MIN_SEEDS} attack seeds")
    elif covariates and len({p.label for p in near}) > 1:
        adjusted, slopes, thinner = _regress(near, reference, covariates, confidence)
    return replace(
        found,
        unadjusted=unadjusted,
        adjusted=adjusted,
        covariates=covariates,
        slopes=slopes,
        apart=apart,
        left_out=tuple(dict.fromkeys((*left_out, *why, *thin, *thinner))),
    )


def _arm_of(points: Sequence[DamagePoint], label: str) -> str:
    return next(p.arm for p in points if p.label == label)


def _apart(points: Sequence[DamagePoint], reference: str) -> dict[str, tuple[str, ...]]:
    """Arms of which, or of whose reference, too few checkpoints lie in the range of both."""
    found = {}
    for label in dict.fromkeys(p.label for p in points):
        without = tuple(
            name
            for name in COVARIATES
            if label != reference
            and not _overlap(
                *([getattr(p, name) for p in points if p.label == of] for of in (label, reference))
            )
        )
        if without:
            found[label] = without
    return found


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    low, high = max(min(one), min(other)), min(max(one), max(other))
    return all(sum(low <= v <= high for v in side) >= MIN_IN_COMMON for side in (one, other))


def _logs(points: Sequence[DamagePoint], name: str) -> FloatArray:
    return np.log2([getattr(p, name) for p in points])


def _within_arms(points: Sequence[DamagePoint], name: str) -> FloatArray:
    """The logarithms less their arm's mean."""
    values, labels = _logs(points, name), np.array([p.label for p in points])
    for label in set(labels):
        values[labels == label] -= values[labels == label].mean()
    return values


def _usable(points: Sequence[DamagePoint]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Covariates that can be told from the arms and from one another; why others cannot."""
    within = {name: _within_arms(points, name) for name in COVARIATES}
    usable = tuple(n for n in COVARIATES if within[n].std() >= MIN_LOG_SPREAD)
    why = [f"{NAMES[n]} does not vary within arms" for n in COVARIATES if n not in usable]
    if len(usable) == 2:
        one, other = within.values()
        r = float(one @ other / math.sqrt((one @ one) * (other @ other)))
        if abs(r) > MAX_CORRELATION:
            why.append(
                f"distance and loss go together within arms (correlation {r:.2f}): only the "
                "distance is held equal"
            )
            usable = usable[:1]
    return usable, tuple(why)


def _regress(
    points: Sequence[DamagePoint], reference: str, covariates: Sequence[str], confidence: float
) -> tuple[dict[str, Interval], dict[str, Interval], tuple[str, ...]]:
    """Differences of the arms from the reference, points per doubling of each covariate, and which
    of them rest on too few degrees of freedom to be given.
    """
    labels = [label for label in dict.fromkeys(p.label for p in points) if label != reference]
    columns = [np.ones(len(points))]
    columns += [np.array([float(p.label == label) for p in points]) for label in labels]
    columns += [_logs(points, name) for name in covariates]
    recovery = np.array([p.recovery for p in points])
    fit = cluster_robust(np.column_stack(columns), recovery, [p.seed for p in points])
    given: dict[str, Interval] = {}
    thin = []
    for place, name in enumerate((*labels, *covariates), start=1):
        df = float(fit.degrees_of_freedom[place])
        if df >= MIN_DEGREES:
            given[name] = fit.interval(place, confidence)
        else:
            what = f"slope of {NAMES[name]}" if name in covariates else f"difference of {name}"
            rests = f"rests on {df:.1f} degrees of freedom, at least {MIN_DEGREES:g} needed"
            thin.append(f"the {what} {rests}")
    slopes = {name: given[name] for name in covariates if name in given}
    return {name: given[name] for name in labels if name in given}, slopes, tuple(thin)
