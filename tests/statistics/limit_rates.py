"""How often a limit is given, and how often its interval then holds the truth, by simulation.

``python -m tests.statistics.limit_rates`` prints the table of docs/method.md.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from healing.statistics.checkpoint_estimates import CheckpointTrajectory
from healing.statistics.fits.asymptotes import fit_asymptotes

Approach = Callable[[np.ndarray, float], np.ndarray]
"""Share of the limit reached at times (in windows), by the run's own time scale."""


def exponential(per_window: float) -> Approach:
    return lambda t, scale: -np.expm1(-per_window * t / scale)


def power(b: float, per_window: float) -> Approach:
    return lambda t, scale: 1.0 - (1.0 + per_window * t / scale) ** -b


LAWS: dict[str, Approach] = {
    "exponential, 10 τ": exponential(10.0),
    "exponential, 2 τ": exponential(2.0),
    "power law t^-1.5, 30 τ": power(1.5, 30.0),
    "power law t^-0.75, 30 τ": power(0.75, 30.0),
    "power law t^-0.5, 100 τ": power(0.5, 100.0),
    "power law t^-0.25, 1000 τ": power(0.25, 1000.0),
}
"""What is simulated: law, and how many time constants the window holds."""
LIMITS = (60.0, 80.0)
CORRELATIONS = (0.0, 0.8)
CHECKPOINTS = (5, 10)
POINTS = (12, 24, 48)
BETWEEN, NOISE = 4.0, 1.0
"""Points: SD of the limits of checkpoints, and of the errors of a measurement."""
SPREAD_OF_SCALES = 0.2
"""SD of the logarithm of the time scales of checkpoints."""


@dataclass(frozen=True)
class Rate:
    """Of one regime: groups, how many have a limit, and how many of these hold the truth."""

    groups: int
    given: int
    covered: int

    def __add__(self, other: Rate) -> Rate:
        pairs = zip(self.__dict__.values(), other.__dict__.values(), strict=True)
        return Rate(*(a + b for a, b in pairs))


def errors(rng: np.random.Generator, n: int, points: int, phi: float, sd: float) -> np.ndarray:
    """Stationary AR(1) errors, shape ``(n, points)``."""
    draws = rng.normal(size=(n, points))
    out = np.empty_like(draws)
    out[:, 0] = draws[:, 0]
    for i in range(1, points):
        out[:, i] = phi * out[:, i - 1] + math.sqrt(1.0 - phi**2) * draws[:, i]
    return sd * out


def group(
    rng: np.random.Generator, law: Approach, limit: float, phi: float, n: int, points: int,
    noise: float = NOISE,
) -> list[CheckpointTrajectory]:  # fmt: skip
    """Simulated trajectories of a group of checkpoints."""
    t = np.arange(1, points + 1) / points
    limits = rng.normal(limit, BETWEEN, n)
    scales = np.exp(rng.normal(0.0, SPREAD_OF_SCALES, n))
    noises = errors(rng, n, points, phi, noise)
    rows = [a * law(t, s) + e for a, s, e in zip(limits, scales, noises, strict=True)]
    steps = tuple(range(0, 20 * points + 1, 20))
    return [CheckpointTrajectory(steps, ((0.0, *row),)) for row in rows]


def rate(
    law: str, limit: float, phi: float, n: int, points: int, groups: int, noise: float = NOISE
) -> Rate:
    """Simulated groups of one regime; one seed per regime."""
    rng = np.random.default_rng([list(LAWS).index(law), int(limit), int(10 * phi), n, points])
    given = covered = 0
    for _ in range(groups):
        found = fit_asymptotes(group(rng, LAWS[law], limit, phi, n, points, noise), 0.95)
        given += found.converged
        covered += found.converged and found.asymptote.low <= limit <= found.asymptote.high
    return Rate(groups, given, covered)


def cell(found: Rate) -> str:
    """``given % / coverage %``."""
    covers = f"{100 * found.covered / found.given:.0f}" if found.given >= 10 else "–"
    return f"{100 * found.given / found.groups:.0f} / {covers}"


def table(groups: int) -> list[str]:
    """Markdown: per cent of groups that are given a limit / of these, intervals that hold it."""
    header = ["true approach, limit", "AR"]
    header += [f"n = {n}, {p} points" for n in CHECKPOINTS for p in POINTS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for law in LAWS:
        for limit in LIMITS:
            for phi in CORRELATIONS:
                cells = [
                    cell(rate(law, limit, phi, n, points, groups))
                    for n in CHECKPOINTS
                    for points in POINTS
                ]
                lines.append("| " + " | ".join([f"{law}, {limit:g} %", f"{phi:g}", *cells]) + " |")
                print(lines[-1], file=sys.stderr, flush=True)
    return lines


if __name__ == "__main__":
    print("\n".join(table(int(sys.argv[1]) if len(sys.argv) > 1 else 400)))
