"""Figure of the planned contrasts: treatment minus control, pair by pair, primary ones first."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes

from healing.reporting.plots.groups import GREY, draw_interval, draw_points
from healing.reporting.plots.style import (
    BLACK,
    PAGE,
    SMALL,
    arm_style,
    paper_figure,
    safe_text,
    text_colour,
)
from healing.statistics.contrasts.family import EndpointComparison
from healing.statistics.contrasts.plan import Contrast

NAMES = {"rank_recovery_pct": "rank", "loss_recovery_pct": "loss"}
SIGNS = {"superior": "more", "inferior": "less", "equivalent": "alike", "inconclusive": "undecided"}
"""What a row says, at its right end."""
HEADING = 0.75
"""Height of a heading over the rows of one kind, in rows."""


def contrasts(path: pathlib.Path, found: Sequence[Contrast]) -> None:
    """Each pair's difference, their mean with its interval, ±margin; rank left, loss right.

    Args:
        path: Without suffix; PNG and PDF are written.
        found: At least one, in the order of the plan.
    """
    heights, headings, last = _layout(found)
    labels = [_label(c, found) for c in found]
    with paper_figure(path, 1, 2, (PAGE, 0.75 + 0.27 * last)) as (_, axes):
        for column, ax in enumerate(axes):
            endpoints = [c.comparison.endpoints[column] for c in found]
            margin = endpoints[0].equivalence.margin
            ax.axvspan(-margin, margin, color="#EEEEEE", zorder=0)
            ax.axvline(0, color=BLACK, linewidth=0.8, linestyle=":")
            for y, contrast, endpoint in zip(heights, found, endpoints, strict=True):
                _draw_row(ax, endpoint, y, contrast.pair.control.arm)
            for y, text in headings:
                if column == 0:
                    _write_heading(ax, text, y)
            name = NAMES[endpoints[0].endpoint]
            ax.set(
                xlabel=f"difference in {name} recovery (points; grey: ±{margin:g})",
                ylim=(last - 0.3, -0.6),
            )
            low, high = ax.get_xlim()
            ax.set_xlim(min(low, -1.5 * margin), max(high, 1.5 * margin))
            ax.grid(axis="y", visible=False)
            ax.set_yticks(heights, labels if column == 0 else [""] * len(labels))
            ax.tick_params(axis="y", length=0)


def _layout(found: Sequence[Contrast]) -> tuple[list[float], list[tuple[float, str]], float]:
    """Height of every row, headings with theirs, and the height below the last row."""
    heights: list[float] = []
    headings: list[tuple[float, str]] = []
    y, before = 0.0, None
    for contrast in found:
        kind = contrast.pair.kind
        if kind is not before:
            about = kind.about.format(safe_text(contrast.pair.treatment.label, 9))
            headings.append((y, f"{kind.rank}: {about}"))
            y, before = y + HEADING, kind
        heights.append(y)
        y += 1.0
    return heights, headings, y


def _label(contrast: Contrast, found: Sequence[Contrast]) -> str:
    """``nano  random tokens``; with the treatment where there are several."""
    pair = contrast.pair
    several = len({c.pair.treatment.arm for c in found}) > 1
    own = f"{safe_text(pair.treatment.label, 9)} − " if several else ""
    return f"{safe_text(pair.model, 9)}  {own}{safe_text(pair.control.label, 18)}"


def _write_heading(ax: Axes, text: str, y: float) -> None:
    """A kind of contrast, over its rows, at the left edge of the panel."""
    ax.annotate(
        text,
        (0.01, y - 0.05),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=SMALL,
        color=BLACK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
    )


def _draw_row(ax: Axes, endpoint: EndpointComparison, y: float, arm: str) -> None:
    interval, (colour, marker) = endpoint.superiority.interval, arm_style(arm)
    draw_points(ax, [d for d in endpoint.differences if math.isfinite(d)], y, colour, marker)
    ax.annotate(
        "undefined" if math.isnan(interval.point) else SIGNS[endpoint.statement],
        (1.02, y),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=SMALL,
        color=GREY,
        annotation_clip=False,
    )
    if math.isfinite(interval.point):
        draw_interval(ax, interval, y, text_colour(colour))
