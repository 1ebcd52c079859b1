"""How often the rule for contrasts is wrong, by simulation in regimes that are hard for it.

``python -m tests.statistics.contrast_rates`` prints the tables of docs/method.md.
"""

from __future__ import annotations

import numpy as np
from scipy import special

from healing.statistics.contrasts.family import adjusted, claim_p_values
from tests.statistics.verdict_rates import Draw, log_normal, normal, two_kinds

SIZES = (3, 5, 10, 20, 40)
MARGIN, ALPHA = 10.0, 0.05


def shifted(draw: Draw, by: float, sign: float = 1.0) -> Draw:
    return lambda rng, shape: by + sign * draw(rng, shape)


NO_DIFFERENCE: dict[str, Draw] = {
    "normal, SD 15": normal(0.0, 15.0),
    "half at −40, half at 40": two_kinds(0.5, -40.0, 40.0),
    "90 % at −10, 10 % at 90": two_kinds(0.9, -10.0, 90.0),
    "95 % at −5, 5 % at 95": two_kinds(0.95, -5.0, 95.0),
    "20 minus log-normal, σ = 1": shifted(log_normal(20.0, 1.0), 20.0, -1.0),
    "20 minus log-normal, σ = 0.5": shifted(log_normal(20.0, 0.5), 20.0, -1.0),
}
"""Differences in points of mean 0: every "more" and "less" is false."""
AT_THE_MARGIN: dict[str, Draw] = {
    "normal, SD 5": normal(10.0, 5.0),
    "half at 0, half at 20": two_kinds(0.5, 0.0, 20.0),
    "90 % at 0, 10 % at 100": two_kinds(0.9, 0.0, 100.0),
    "95 % at 5, 5 % at 105": two_kinds(0.95, 5.0, 105.0),
    "log-normal, σ = 1": log_normal(10.0, 1.0),
    "log-normal, σ = 0.5": log_normal(10.0, 0.5),
}
"""Differences of mean 10: every "alike within 10 points" is false."""
DIFFERENT: dict[str, Draw] = {
    "mean −20, SD 9": normal(-20.0, 9.0),
    "mean −40, SD 15": normal(-40.0, 15.0),
}
ALIKE: dict[str, Draw] = {"mean 0, SD 5": normal(0.0, 5.0), "mean 0, SD 9": normal(0.0, 9.0)}


def t_p_values(values: np.ndarray, margin: float = MARGIN) -> tuple[np.ndarray, np.ndarray]:
    """One-sided p of "more" by Student's t, and of TOST, for groups of shape ``(..., n)``."""
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    error = values.std(axis=-1, ddof=1) / np.sqrt(n)
    more = special.stdtr(n - 1, -mean / error)
    outer = np.maximum(
        special.stdtr(n - 1, -(mean + margin) / error),
        special.stdtr(n - 1, (mean - margin) / error),
    )
    return more, outer


def claims(values: np.ndarray, count: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P values of "more", "less" and "alike", by the rule or by t alone."""
    more, tost = t_p_values(values)
    return claim_p_values(values, MARGIN, more, tost) if count else (more, 1.0 - more, tost)


def different(draw: Draw, n: int, groups: int, count: bool = True) -> float:
    """Share of groups that are called more or less; one contrast, one endpoint."""
    more, less, _ = claims(draw(np.random.default_rng(n), (groups, n)), count)
    return float((np.minimum(more, less) <= ALPHA / 2.0).mean())


def alike(draw: Draw, n: int, groups: int, count: bool = True) -> float:
    """Share of groups that are called alike; one contrast, one endpoint."""
    return float((claims(draw(np.random.default_rng(n), (groups, n)), count)[2] <= ALPHA).mean())


def family(
    draw: Draw, n: int, families: int, tests: int, count: bool = True
) -> tuple[float, float]:
    """Share of families of independent tests with any "more" or "less", and with any "alike"."""
    ps = claims(draw(np.random.default_rng(n), (families, tests, n)), count)
    any_different = any_alike = 0
    for more, less, both in zip(*ps, strict=True):
        p_different, p_alike = adjusted(more, less, both)
        any_different += bool((p_different <= ALPHA).any())
        any_alike += bool((p_alike <= ALPHA).any())
    return any_different / families, any_alike / families


def _row(name: str, cells: list[str]) -> str:
    return "| " + " | ".join([name, *cells]) + " |"


def table(groups: int) -> list[str]:
    """Markdown, in percent: by t alone → by t and count."""
    lines = [
        _row("differences (points)", [f"n = {n}" for n in SIZES]),
        "|---" * (1 + len(SIZES)) + "|",
    ]
    for title, rate, regimes in (
        ("mean 0: called different", different, NO_DIFFERENCE),
        ("mean 10: called alike", alike, AT_THE_MARGIN),
        ("*different, and called so*", different, DIFFERENT),
        ("*alike, and called so*", alike, ALIKE),
    ):
        for name, draw in regimes.items():
            cells = [
                f"{100 * rate(draw, n, groups, False):.1f} → {100 * rate(draw, n, groups):.1f}"
                for n in SIZES
            ]
            lines.append(_row(f"{title}; {name}", cells))
    return lines


def family_table(families: int, tests: int = 12) -> list[str]:
    """The same over a family, any false statement."""
    lines = [
        _row(f"any of {tests} tests", [f"n = {n}" for n in SIZES]),
        "|---" * (1 + len(SIZES)) + "|",
    ]
    for title, place, regimes in (
        ("called different", 0, NO_DIFFERENCE),
        ("called alike", 1, AT_THE_MARGIN),
    ):
        for name in list(regimes)[:5:2] + list(regimes)[4:5]:
            cells = [
                " → ".join(
                    f"{100 * family(regimes[name], n, families, tests, count)[place]:.1f}"
                    for count in (False, True)
                )
                for n in SIZES
            ]
            lines.append(_row(f"{title}; {name}", cells))
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    print("\n".join(["", *table(10_000), "", *family_table(1_000)]))
