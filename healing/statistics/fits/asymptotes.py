"""The limit that the recoveries of a group are heading for, said only where it can be known.

A limit is an extrapolation. Two things make one wrong: a law that AICc takes although its tail is
another one (which no interval of that law shows), and errors that depend on one another. So none is
given before the trajectories have levelled off, and its interval holds both ends of what the tail
leaves open: that nothing is to come, and that a slow power law is. All intervals are over
checkpoints: whatever happens within a trajectory is in their spread.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from healing.statistics.checkpoint_estimates import CheckpointTrajectory
from healing.statistics.fits.curve_fits import TrajectoryFit, fit_trajectory
from healing.statistics.fits.laws import Law
from healing.statistics.intervals import (
    MIN_CHECKPOINTS,
    DegenerateDataWarning,
    FloatArray,
    Interval,
    exp_interval,
    recovery_interval,
    t_interval,
)

MIN_MEASUREMENTS = 12
"""Of every trajectory after step 0; with six, AICc's penalty decides the law."""
FLAT_GAIN = 2.0
"""Points: the last quarter is flat where the 90 % interval of what it gains lies within ± this."""
SLOWEST_TAIL = 0.5
"""Exponent b of the slowest tail t^−b that an interval allows for."""
REMAINING_PER_DOUBLING = 1.0 / (2.0**SLOWEST_TAIL - 1.0)
"""A tail c·t^−b that gained G in its last doubling has G/(2^b − 1) to go."""
MAX_HALF_WIDTH = 10.0
"""Points; a limit known less well than this is not reported."""
NOT_DETERMINED = "not determined by this budget"


@dataclass(frozen=True)
class Asymptotes:
    """Limit (asymptote) and half-life of recovery, over the checkpoints of a group.

    ``asymptote`` is in points, ``half_life`` in steps (Student t over checkpoints, log scale). Both
    are NaN unless determined: 12 measurements of every checkpoint, a flat last quarter, fits that
    converge in every checkpoint (those that did would be a selection of the ones that bent early),
    and an interval that is not too wide. ``reasons`` says what was missing.
    """

    asymptote: Interval
    half_life: Interval
    laws: tuple[Law, ...]
    """Laws that AICc chose, one per converged checkpoint."""
    n_checkpoints: int
    """Checkpoints with a defined trajectory."""
    reasons: tuple[str, ...]
    last_quarter_gain: Interval
    """Points gained over the last quarter of the window, 90 % interval over checkpoints."""

    @property
    def converged(self) -> bool:
        """Whether a limit is determined."""
        return self.n_checkpoints > 0 and not self.reasons


def fit_asymptotes(trajectories: Sequence[CheckpointTrajectory], confidence: float) -> Asymptotes:
    """The limit of a group, where its trajectories determine one.

    With m the mean over the last quarter of the window, v and G the value at its end and the gain
    per doubling by a line in log₂ t through its last half, per checkpoint: a limit that is
    approached steadily, and not more slowly than t^−½, lies between the means of m and of
    v + G/(√2 − 1). The interval runs from the lower bound of the first to the upper bound of the
    second (each Student t over checkpoints), and takes in that of the fitted limits, whose mean is
    the point.

    Args:
        trajectories: one per checkpoint.
        confidence: of both intervals.

    Raises:
        ValueError: as ``fit_trajectory``.
    """
    means = [(np.asarray(t.steps, dtype=np.float64), t.mean()) for t in trajectories]
    measured = [(s[(s > 0) & ~np.isnan(r)], r[(s > 0) & ~np.isnan(r)]) for s, r in means]
    measured = [(steps, values) for steps, values in measured if len(steps)]
    with warnings.catch_warnings():
        # Each degeneracy is in the result: a reason, an interval without bounds.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        return _determine(measured, confidence)


def _determine(measured: Sequence[tuple[FloatArray, FloatArray]], confidence: float) -> Asymptotes:
    blank = replace(t_interval([], confidence), n=len(measured))
    found = Asymptotes(
        asymptote=blank,
        half_life=replace(blank, method="log-scale Student t"),
        laws=(),
        n_checkpoints=len(measured),
        reasons=(),
        last_quarter_gain=replace(blank, confidence=0.9),
    )
    if not measured:
        return found
    fewest = min(len(steps) for steps, _ in measured)
    if fewest < MIN_MEASUREMENTS:
        reason = f"{fewest} measurements, at least {MIN_MEASUREMENTS} needed"
        return replace(found, reasons=(reason,))
    if len(measured) < MIN_CHECKPOINTS:
        reason = f"{len(measured)} checkpoints, at least {MIN_CHECKPOINTS} needed"
        return replace(found, reasons=(reason,))
    gain = recovery_interval([_last_quarter_gain(*one) for one in measured], 0.9)
    found = replace(found, last_quarter_gain=gain)
    if not (gain.low > -FLAT_GAIN and gain.high < FLAT_GAIN):
        reason = (
            f"the last quarter is not shown to be flat: it gains {gain.point:.1f} points, 90 % "
            f"interval {gain.low:.1f} to {gain.high:.1f}"
        )
        return replace(found, reasons=(reason,))
    fits = [fit_trajectory(steps, values, confidence) for steps, values in measured]
    found = replace(found, laws=tuple(fit.law for fit in fits if fit.converged and fit.law))
    if len(found.laws) < len(fits):
        return replace(found, reasons=_fit_reasons(fits))
    asymptote = _limit(measured, fits, confidence)
    half_width = max(asymptote.high - asymptote.point, asymptote.point - asymptote.low)
    if half_width > MAX_HALF_WIDTH:
        reason = f"the limit's interval reaches {half_width:.0f} points from it"
        return replace(found, reasons=(reason,))
    half_life = exp_interval(t_interval([math.log(f.half_life.point) for f in fits], confidence))
    half_life = replace(half_life, method="log-scale Student t")
    return replace(found, asymptote=asymptote, half_life=half_life)


def _fit_reasons(fits: Sequence[TrajectoryFit]) -> tuple[str, ...]:
    lost = [fit.reason for fit in fits if not fit.converged]
    counts = {reason: lost.count(reason) for reason in dict.fromkeys(lost)}
    return tuple(f"{reason} in {n} of {len(fits)} fits" for reason, n in counts.items())


def _line(abscissae: FloatArray, values: FloatArray) -> tuple[float, float]:
    """Slope, and value at the last abscissa, of the least-squares line."""
    centred = abscissae - abscissae.mean()
    slope = float(centred @ values / (centred @ centred))
    return slope, float(values.mean() + slope * centred[-1])


def _last_quarter_gain(steps: FloatArray, values: FloatArray) -> float:
    """Points that the last quarter of the window gains, by a line through its measurements."""
    late = steps >= 0.75 * steps[-1]
    slope, _ = _line(steps[late], values[late]) if late.sum() > 1 else (math.nan, math.nan)
    return slope * 0.25 * float(steps[-1])


def _limit(
    measured: Sequence[tuple[FloatArray, FloatArray]],
    fits: Sequence[TrajectoryFit],
    confidence: float,
) -> Interval:
    nothing_to_come, slow_tail = [], []
    for steps, values in measured:
        half = steps >= 0.5 * steps[-1]
        per_doubling, end = _line(np.log2(steps[half]), values[half])
        nothing_to_come.append(float(values[steps >= 0.75 * steps[-1]].mean()))
        slow_tail.append(end + REMAINING_PER_DOUBLING * per_doubling)
    fitted = recovery_interval([fit.asymptote.point for fit in fits], confidence)
    ends = [recovery_interval(v, confidence) for v in (nothing_to_come, slow_tail)]
    return replace(
        fitted,
        low=min(i.low for i in (fitted, *ends)),
        high=max(i.high for i in (fitted, *ends)),
        method="Student t over fits and tails",
    )
