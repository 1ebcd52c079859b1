"""The shared style of all figures: colours, sizes, arms and states, reference lines."""

from __future__ import annotations

import contextlib
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

# Okabe & Ito (2008): distinguishable with every common form of colour blindness.
BLACK, ORANGE, SKY, GREEN, YELLOW, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_PYPLOT = threading.RLock()
"""pyplot's settings and figure list are global: one thread draws at a time."""

STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 130,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
}

ARM_STYLES = {
    # Colour, marker and name of each arm, the same in every figure.
    "haep": (VERMILION, "o", "HAEP"),
    "haep_oracle": (PURPLE, "v", "HAEP oracle"),
    "spectral": (BLUE, "s", "spectral"),
    "random_tokens": (ORANGE, "^", "random tokens"),
    "random_text": (GREEN, "D", "clean text"),
    "gaussian_noise": (SKY, "P", "Gaussian noise"),
    "none": (BLACK, "x", "sham"),
}
STATE_STYLES = {
    "healthy": (GREEN, "-"),
    "collapsed": (VERMILION, "--"),
    "healed": (BLUE, "-."),
}


@contextlib.contextmanager
def figure(
    path: pathlib.Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)
) -> Iterator[tuple[Figure, Sequence[plt.Axes]]]:
    """A styled figure that is written to ``path`` and closed when the block ends well.

    Yields:
        The figure and its axes as a flat list.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _PYPLOT, plt.rc_context(STYLE):
        fig, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
        try:
            yield fig, list(axes.flat)
            # Not constrained_layout: it costs five times the drawing itself.
            fig.tight_layout()
            fig.savefig(path)
        finally:
            plt.close(fig)


def finite_points(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Abscissae and ordinates of the points whose ordinate is finite."""
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def series(
    trajectory: Sequence[tuple[int, Mapping[str, float]]], name: str
) -> tuple[list[float], list[float]]:
    """Steps and values of one metric of a trajectory, finite ones only."""
    return finite_points([(step, values[name]) for step, values in trajectory if name in values])


def arm_label(arm: str) -> str:
    """Name of an arm as figures show it."""
    return ARM_STYLES[arm][2] if arm in ARM_STYLES else arm


def arm_style(arm: str) -> tuple[str, str, str]:
    """Colour, marker and name of an arm; grey for one that has none of its own."""
    return ARM_STYLES.get(arm, ("#666666", "o", arm))


def reference_line(ax: plt.Axes, value: float, state: str, x: float) -> None:
    """Horizontal line at a state's value, labelled directly."""
    colour, line = STATE_STYLES[state]
    ax.axhline(value, color=colour, linestyle=line, linewidth=1)
    ax.annotate(
        f"{state} {value:.4g}", (x, value), ha="right", va="bottom", fontsize=8, color=colour
    )


def verdict_zones(ax: plt.Axes) -> None:
    """Shade the partial zone and mark the healthy value."""
    ax.axhspan(20, 70, color="#EEEEEE", zorder=0)
    ax.axhline(100, color=BLACK, linewidth=0.8, linestyle=":")
