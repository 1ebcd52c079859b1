"""Estimates per checkpoint: its trajectory, half-recovery time, number of checkpoints needed.

Half-recovery times are made per checkpoint, the independent unit, and then pooled; a
trajectory is the mean over the defined replicates of one checkpoint. Nothing here changes a
verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from healing.measurements.recovery import (
    FURTHER_BELOW,
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Verdict,
)
from healing.statistics.intervals import (
    SPREAD_FLOOR,
    FloatArray,
    Interval,
    as_vector,
    drop_undefined,
)
from healing.statistics.power import (
    MAX_CHECKPOINTS,
    counted_checkpoints,
    required_checkpoints,
)
from healing.statistics.survival import (
    HalfRecovery,
    SurvivalCurve,
    half_recovery_time,
    kaplan_meier,
    log_time_interval,
    mean_trajectory,
)

POWER = 0.8
"""Probability with which the planned checkpoints should give a verdict."""


@dataclass(frozen=True)
class CheckpointTrajectory:
    """One checkpoint: ascending steps, and per cent at each of them for every replicate."""

    steps: tuple[int, ...]
    replicates: tuple[tuple[float, ...], ...]

    def mean(self) -> FloatArray:
        """As :func:`healing.statistics.survival.mean_trajectory`: undefined replicates are left
        out, and the others are averaged where all of them are defined.
        """
        return mean_trajectory(np.asarray(self.steps, dtype=np.float64), self.replicates)


@dataclass(frozen=True, eq=False)
class HalfTimes:
    """Half-recovery times of the checkpoints of a group, and their Kaplan-Meier curve."""

    times: tuple[HalfRecovery, ...]
    """One per checkpoint; the time is NaN where recovery is undefined."""
    curve: SurvivalCurve
    geometric_mean: Interval
    """Log-scale Student t where no time is censored; otherwise NaN: a censored time has no mean."""


@dataclass(frozen=True)
class VerdictPlan:
    """How many checkpoints would decide, if observed mean and spread were the true ones."""

    verdict: Verdict
    """The verdict on whose side the observed mean lies."""
    n_checkpoints: int | None
    """Checkpoints in all; ``None`` where even 100,000 would not do, or where too many of them would
    lie on the other side of a threshold."""
    mean: float
    sd: float
    power: float


def half_times(trajectories: Sequence[CheckpointTrajectory], confidence: float) -> HalfTimes:
    """Time to 50 % per checkpoint, right-censored where it was not reached, and their curve.

    Args:
        trajectories: one per checkpoint.
        confidence: of the interval of the median.

    Raises:
        ValueError: as ``half_recovery_time`` and ``kaplan_meier``.

    Warns:
        DegenerateDataWarning: as ``half_recovery_time`` and ``kaplan_meier``.
    """
    found = [half_recovery_time(t.steps, t.replicates) for t in trajectories]
    times, censored = [h.time for h in found], [h.censored for h in found]
    curve = kaplan_meier(times, censored, confidence)
    if any(censored) or curve.n == 0:  # the curve's own warning says so
        nan = math.nan
        mean = Interval(nan, nan, nan, curve.n, "log-scale Student t", confidence)
    else:
        mean = log_time_interval(times, censored, confidence)
    return HalfTimes(tuple(found), curve, mean)


def plan_verdict(
    checkpoint_means: ArrayLike, confidence: float, power: float = POWER
) -> VerdictPlan | None:
    """Checkpoints that would give the verdict on whose side the mean lies, by interval and count.

    The plan takes the observed mean and standard deviation for the true ones, and checkpoints for
    normal. From three of them all of this is rough: it is an order of magnitude.

    Args:
        checkpoint_means: per cent, shape ``(checkpoints,)``; NaN is left out.
        confidence: of the interval that the verdict is read from.
        power: probability wanted.

    Returns:
        ``None`` where fewer than two means are defined or their mean lies exactly on a threshold.

    Raises:
        ValueError: bad shape, infinite entries, confidence or power outside (0, 1).
    """
    means = drop_undefined(as_vector("checkpoint_means", checkpoint_means))
    if len(means) < 2:
        return None
    mean, sd = float(means.mean()), max(SPREAD_FLOOR, float(means.std(ddof=1)))
    verdict = _side(mean)
    if verdict is None:
        return None
    try:
        n: int | None = required_checkpoints(mean, sd, verdict, power, confidence=confidence)
        counted = counted_checkpoints(mean, sd, verdict, power, confidence=confidence)
        n = None if n is None or counted is None else max(n, counted)
    except ValueError as error:
        if f"over {MAX_CHECKPOINTS} checkpoints" not in str(error):
            raise
        n = None
    return VerdictPlan(verdict, n, mean, sd, power)


def _side(mean: float) -> Verdict | None:
    if mean < FURTHER_BELOW:
        return Verdict.FURTHER
    if mean < IRREVERSIBLE_BELOW:
        return Verdict.IRREVERSIBLE
    if mean > REVERSIBLE_ABOVE:
        return Verdict.REVERSIBLE
    return Verdict.PARTIAL if IRREVERSIBLE_BELOW < mean < REVERSIBLE_ABOVE else None
