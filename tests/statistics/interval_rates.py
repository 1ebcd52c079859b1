"""How often the interval of a mean recovery holds the truth, by simulation.

``python -m tests.statistics.interval_rates`` prints the table of docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from healing.statistics.intervals import recovery_bounds
from tests.statistics.verdict_rates import log_normal, normal, two_kinds

SIZES = (3, 5, 10, 20)
Values = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]


def shared(sd: float, own: float) -> Values:
    """All checkpoints of a group are off by the same error: of a probe, a corpus, a model."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return 50.0 + rng.normal(0.0, sd, (shape[0], 1)) + rng.normal(0.0, own, shape)

    return draw


REGIMES: dict[str, tuple[float, Values, float]] = {
    "normal, SD 5": (50.0, normal(50.0, 5.0), 0.0),
    "the same, and an error common to all of SD 1": (50.0, shared(1.0, 5.0), 0.0),
    "the same, common error of SD 5": (50.0, shared(5.0, 5.0), 0.0),
    "the same, common error of SD 5 that is known": (50.0, shared(5.0, 5.0), 5.0),
    "log-normal, σ = 0.5": (20.0, log_normal(20.0, 0.5), 0.0),
    "log-normal, σ = 1": (20.0, log_normal(20.0, 1.0), 0.0),
    "exponential": (25.0, lambda rng, shape: rng.exponential(25.0, shape), 0.0),
    "80 % stay at 4, 20 % heal to 87": (20.6, two_kinds(0.8, 4.0, 87.0), 0.0),
}
"""What is drawn → true mean, the draw, and the standard error that the interval is told."""


def coverage(name: str, n: int, groups: int) -> tuple[float, float, float]:
    """Shares of groups whose 95 % interval holds the mean, lies below it, lies above it."""
    mean, draw, error = REGIMES[name]
    values = draw(np.random.default_rng(n), (groups, n))
    low, high = recovery_bounds(values, 0.95, error)
    below, above = float((high < mean).mean()), float((low > mean).mean())
    return 1.0 - below - above, below, above


def table(groups: int) -> list[str]:
    """Markdown: coverage in per cent, and in brackets the share of intervals that lie too low."""
    header = ["recoveries", "true mean (%)", *(f"n = {n}" for n in SIZES)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, (mean, _, _) in REGIMES.items():
        found = [coverage(name, n, groups) for n in SIZES]
        cells = [f"{100 * covered:.1f} ({100 * below:.1f})" for covered, below, _ in found]
        lines.append("| " + " | ".join([name, f"{mean:g}", *cells]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(200_000)))
