"""How often the rule for group verdicts is wrong, by simulation in regimes that are hard for it.

``python -m tests.statistics.verdict_rates`` prints the table of docs/method.md.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from healing.measurements.recovery import Verdict, verdict_of
from healing.statistics.intervals import recovery_bounds
from healing.statistics.verdicts import ZONES, decided

Draw = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
SIZES = (3, 5, 10, 14, 20)


def two_kinds(share: float, first: float, second: float, sd: float = 2.0) -> Draw:
    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
        return np.where(rng.random(shape) < share, first, second) + rng.normal(0.0, sd, shape)

    return draw


def log_normal(mean: float, sigma: float) -> Draw:
    return lambda rng, shape: mean * np.exp(rng.normal(-(sigma**2) / 2.0, sigma, shape))


def normal(mean: float, sd: float) -> Draw:
    return lambda rng, shape: rng.normal(mean, sd, shape)


REGIMES: dict[str, tuple[float, Draw]] = {
    "80 % stay at 4, 20 % heal to 87": (20.6, two_kinds(0.8, 4.0, 87.0)),
    "80 % stay at 0, 20 % heal to 100": (20.0, two_kinds(0.8, 0.0, 100.0)),
    "half stay at 5, half heal to 85": (45.0, two_kinds(0.5, 5.0, 85.0)),
    "exponential at the floor": (25.0, lambda rng, shape: rng.exponential(25.0, shape)),
    "90 % heal to 77, 10 % stay at 5": (69.8, two_kinds(0.9, 77.0, 5.0)),
    "70 % heal to 99, 30 % stay at 0": (69.3, two_kinds(0.7, 99.0, 0.0)),
    "log-normal, σ = 1": (20.0, log_normal(20.0, 1.0)),
    "log-normal, σ = 0.5": (20.0, log_normal(20.0, 0.5)),
    "100 minus exponential": (70.0, lambda rng, shape: 100.0 - rng.exponential(30.0, shape)),
    "normal, SD 5": (20.0, normal(20.0, 5.0)),
    "normal, SD 5 ": (70.0, normal(70.0, 5.0)),
}
"""What is drawn → its true mean, and the draw: every "irreversible" and "reversible" is false."""
CLEAR: dict[str, tuple[float, Draw]] = {
    "normal, SD 2": (2.0, normal(2.0, 2.0)),
    "normal, SD 5  ": (5.0, normal(5.0, 5.0)),
    "normal, SD 8": (45.0, normal(45.0, 8.0)),
    "normal, SD 4": (90.0, normal(90.0, 4.0)),
}
"""Groups whose verdict is true: how often it is given."""


def by_interval_alone(values: np.ndarray) -> dict[Verdict, np.ndarray]:
    """The same without the count."""
    low, high = recovery_bounds(values)
    return {v: zone.holds(low) & zone.holds(high) for v, zone in ZONES.items()}


def rates(draw: Draw, n: int, groups: int, rule=decided) -> dict[Verdict, float]:
    """Verdict → share of simulated groups that get it; one seed for every n."""
    values = draw(np.random.default_rng(n), (groups, n))
    return {verdict: float(given.mean()) for verdict, given in rule(values).items()}


def false_rates(name: str, n: int, groups: int, rule=decided) -> tuple[float, float]:
    """Share of false "irreversible" and of false "reversible" in a hard regime."""
    found = rates(REGIMES[name][1], n, groups, rule)
    return found[Verdict.IRREVERSIBLE], found[Verdict.REVERSIBLE]


def table(groups: int) -> list[str]:
    """Markdown, in percent: false verdicts by interval alone → by interval and count."""
    header = ["recoveries", "true mean (%)", *(f"n = {n}" for n in SIZES)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for name, (mean, _) in REGIMES.items():
        cells = []
        for n in SIZES:
            before = max(false_rates(name, n, groups, by_interval_alone))
            after = max(false_rates(name, n, groups))
            cells.append(f"{100 * before:.1f} → {100 * after:.1f}")
        lines.append("| " + " | ".join([name.strip(), f"{mean:g}", *cells]) + " |")
    for name, (mean, draw) in CLEAR.items():
        cells = [f"{100 * rates(draw, n, groups)[verdict_of(mean)]:.1f}" for n in SIZES]
        shown = f"*{name.strip()}: verdict given*"
        lines.append("| " + " | ".join([shown, f"{mean:g}", *cells]) + " |")
    return lines


if __name__ == "__main__":
    print("\n".join(table(200_000)))
