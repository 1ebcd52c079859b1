"""The shared style of all figures: colours, sizes, arms and states, reference lines.

Figures are drawn without pyplot, so that a notebook's backend and its settings stay what they are.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colors, font_manager, ft2font, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import offset_copy
from PIL import Image
from scipy import optimize

from healing.config.summarize import FIGURE_STYLES
from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE
from healing.registry import ARMS
from healing.reporting.phrases import quantity_text

# Okabe & Ito (2008): distinguishable with every common form of colour blindness.
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_SETTINGS = threading.RLock()
"""matplotlib's settings are global, also while they are changed for one figure: one thread draws
at a time."""

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

COLUMN, PAGE = 3.3, 6.9
"""Width in inches of one column and of the page of a two-column paper."""
PAPER: dict[Any, Any] = STYLE | {
    # Drawn at the size it is printed at, so that 7 points are 7 points.
    "savefig.dpi": 300,
    "savefig.bbox": "standard",
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "axes.linewidth": 0.6,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "grid.linewidth": 0.4,
    "pdf.fonttype": 42,  # TrueType: type 3 fonts are refused by several publishers
}
SMALL = 6.5
"""Points; notes inside paper figures."""

SANS, SERIF = FIGURE_STYLES
_TYPES: dict[str, dict[Any, Any]] = {
    SANS: {},
    # Comes with matplotlib, looks like Times, and has letters and mathematics of one cut. What it
    # lacks is taken from the other.
    SERIF: {"font.family": ["STIXGeneral", "DejaVu Sans"], "mathtext.fontset": "stix"},
}
_LARGER = {SERIF: 1.12}
"""Times looks smaller than its size says, and is narrower: this much larger it is as legible and
takes no more room."""
_TYPE: contextvars.ContextVar[str] = contextvars.ContextVar("figure style", default=SANS)

STATE_STYLES = {
    "healthy": (GREEN, "-"),
    "collapsed": (VERMILION, "--"),
    "healed": (BLUE, "-."),
}


@contextlib.contextmanager
def figure_style(name: str) -> Iterator[None]:
    """The type of the paper figures that are drawn in the block.

    Args:
        name: Of :data:`healing.config.summarize.FIGURE_STYLES`.
    """
    before = _TYPE.set(name)
    try:
        yield
    finally:
        _TYPE.reset(before)


@contextlib.contextmanager
def _styled_figure(
    style: Mapping[Any, Any], rows: int, columns: int, size: tuple[float, float]
) -> Iterator[Figure]:
    with _SETTINGS, rc_context(dict(style)):
        fig = Figure(figsize=size)
        FigureCanvasAgg(fig)
        fig.subplots(rows, columns)
        yield fig


@contextlib.contextmanager
def figure(
    path: pathlib.Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 4.0)
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A styled figure that is written to ``path`` when the block ends well.

    Yields:
        The figure and its axes as a flat list.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _styled_figure(STYLE, rows, columns, size) as fig:
        yield fig, fig.axes
        # Not constrained_layout: it costs five times the drawing itself.
        fig.tight_layout()
        fig.savefig(path)


@contextlib.contextmanager
def paper_figure(
    path: pathlib.Path, rows: int, columns: int, size: tuple[float, float]
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A figure at print size, written as PNG and PDF without dates: same input, same bytes.

    Args:
        path: Without suffix.
        rows: Of axes.
        columns: Of axes.
        size: Inches.

    Yields:
        The figure and its axes as a flat list.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    style = _TYPE.get()
    with _styled_figure(PAPER | _TYPES[style], rows, columns, size) as fig:
        yield fig, fig.axes
        for text in fig.findobj(Text) if style in _LARGER else ():
            text.set_fontsize(_LARGER[style] * float(text.get_fontsize()))
        fig.tight_layout(pad=0.3, w_pad=1.0, h_pad=0.8)
        fig.savefig(path.with_name(path.name + ".png"))
        fig.savefig(path.with_name(path.name + ".pdf"), metadata={"CreationDate": None})


@contextlib.contextmanager
def bare_figure(size: tuple[float, float]) -> Iterator[tuple[Figure, Axes]]:
    """A figure that is written by nobody: 100 pixels to the inch, its axes laid out by hand."""
    with _styled_figure(STYLE, 1, 1, size) as fig:
        fig.subplots_adjust(left=0.13, right=0.98, bottom=0.14, top=0.91)
        yield fig, fig.axes[0]


@contextlib.contextmanager
def small_figure(
    path: pathlib.Path, columns: int, size: tuple[float, float] = (6.9, 1.9)
) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """One row of panels for the page of a run: PNG, 100 pixels to the inch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with _styled_figure(PAPER, 1, columns, size) as fig:
        yield fig, fig.axes
        fig.tight_layout(pad=0.4, w_pad=0.8)
        fig.savefig(path, dpi=100)


def for_a_page(source: pathlib.Path, path: pathlib.Path, width: int = 690) -> None:
    """A figure at the width of a run's page, which shows pictures as large as they are.

    Args:
        source: PNG at print resolution.
        path: PNG to write.
        width: Pixels.
    """
    with Image.open(source) as picture:
        size = (width, round(picture.height * width / picture.width))
        picture.convert("RGB").resize(size, Image.Resampling.LANCZOS).save(path)


def text_colour(colour: str) -> str:
    """A line's colour, darkened so that small type in it can be read on white."""
    red, green, blue = colors.to_rgb(colour)
    return colors.to_hex((0.62 * red, 0.62 * green, 0.62 * blue))


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points of the font that figures are set in."""
    return frozenset(ft2font.FT2Font(font_manager.findfont("DejaVu Sans")).get_charmap())


def safe_text(text: str, limit: int = 22) -> str:
    """A name as figures can show it: no mathematics, missing characters by their number, and at
    most ``limit`` characters, so that the axes keep their room.
    """
    shown = "".join(c if ord(c) in _glyphs() else f"U+{ord(c):04X}" for c in " ".join(text.split()))
    short = shown if len(shown) <= limit else shown[: limit - 1] + "…"
    return short.replace("$", r"\$")


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions at least ``gap`` apart, in the order of ``values`` and as near as possible.

    Least squares under the order (isotonic regression of the values less what the gaps take) and
    within [low, high]; where they do not fit, they go over ``high``.
    """
    if not values:
        return []
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    free = optimize.isotonic_regression(np.asarray(values)[order] - steps).x
    placed = np.empty(len(values))
    placed[order] = np.clip(free, low, max(low, high - steps[-1])) + steps
    return [float(p) for p in placed]


def direct_labels(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names to the right of the axes, at the height where each line ends.

    Args:
        ax: With its final limits on y.
        ends: Last value in data units, text, colour.
    """
    bottom, top = ax.get_ylim()
    heights = [min(1.0, max(0.0, (y - bottom) / (top - bottom))) for y, _, _ in ends]
    fig = ax.get_figure(root=True)
    assert fig is not None
    points = 72.0 * ax.get_position().height * fig.get_size_inches()[1]
    places = spread(heights, 1.25 * SMALL / points, 0.0, 1.0)
    near, far = (offset_copy(ax.transAxes, fig, x=x, units="points") for x in (1, 7))
    for height, place, (_, text, colour) in zip(heights, places, ends, strict=True):
        ax.annotate(
            text,
            xy=(1.0, height),
            xytext=(1.0, place),
            xycoords=near,
            textcoords=far,
            va="center",
            fontsize=SMALL,
            color=text_colour(colour),
            annotation_clip=False,
            # From the name's own left edge: from its middle it would cross its neighbours.
            arrowprops={
                "arrowstyle": "-",
                "color": colour,
                "lw": 0.9,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0.0, 0.5),
            },
        )


def finite_points(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Abscissae and ordinates of the points whose ordinate is finite."""
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def series(
    trajectory: Sequence[tuple[int, Mapping[str, float]]], name: str
) -> tuple[list[float], list[float]]:
    """Steps and values of one metric of a trajectory, finite ones only."""
    return finite_points([(step, values[name]) for step, values in trajectory if name in values])


UNKNOWN = "#666666", "o"
"""Colour and marker of an arm that is not installed here, or gives none."""


def arm_style(arm: str) -> tuple[str, str]:
    """Colour and marker of an arm, the same in every figure."""
    if not ARMS.known(arm):
        return UNKNOWN
    facts = ARMS.facts(arm)
    return facts.get("COLOUR", UNKNOWN[0]), facts.get("MARKER", UNKNOWN[1])


def reference_line(ax: Axes, value: float, state: str, x: float) -> None:
    """Horizontal line at a state's value, labelled directly."""
    colour, line = STATE_STYLES[state]
    ax.axhline(value, color=colour, linestyle=line, linewidth=1)
    ax.annotate(
        f"{state} {quantity_text(value)}",
        (x, value),
        ha="right",
        va="bottom",
        fontsize=8,
        color=text_colour(colour),
    )


ZONES = f"dotted: healthy; grey: {IRREVERSIBLE_BELOW:g}–{REVERSIBLE_ABOVE:g} %, in part"
"""What the line and the zone are, as figures say it."""


def verdict_zones(ax: Axes, explained: bool = False) -> None:
    """Shade the partial zone and mark the healthy value.

    Args:
        ax: Recovery in per cent is its ordinate.
        explained: Whether both are named, over the line: once per figure is enough.
    """
    ax.axhspan(IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, color="#EEEEEE", zorder=0)
    ax.axhline(100, color=BLACK, linewidth=0.8, linestyle=":")
    if explained:
        ax.annotate(ZONES, (0.985, 100.0), xytext=(0, 1.5), textcoords="offset points",
                    xycoords=("axes fraction", "data"), ha="right", va="bottom",
                    fontsize=SMALL, color="#555555", gid="zones")  # fmt: skip


def upright_verdict_zones(ax: Axes, explained: bool = False) -> None:
    """The same where recovery is the abscissa; the names stand over the axes."""
    ax.axvspan(IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, color="#EEEEEE", zorder=0)
    ax.axvline(100, color=BLACK, linewidth=0.8, linestyle=":")
    if explained:
        middle = (IRREVERSIBLE_BELOW + REVERSIBLE_ABOVE) / 2
        for text, x in (("in part", middle), ("healthy", 100.0)):
            ax.annotate(text, (x, 1.0), xytext=(0, 1.5), textcoords="offset points",
                        xycoords=("data", "axes fraction"), ha="center", va="bottom",
                        fontsize=SMALL, color="#555555", gid="zones")  # fmt: skip
