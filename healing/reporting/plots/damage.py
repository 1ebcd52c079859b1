"""Rank recovery against how far the attack went: weight distance and loss, over all arms."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

from healing.reporting.plots.style import (
    PAGE,
    SMALL,
    ZONES,
    arm_style,
    direct_labels,
    paper_figure,
    safe_text,
    verdict_zones,
)
from healing.statistics.damage_regression import DamagePoint, DamageRegression

AXES = {
    "weight_change": "weight distance ‖W−W₀‖/‖W₀‖ (log scale)",
    "start_loss": "loss at the start of healing (nats, log scale)",
}

MARGIN = 8.0
"""Points above and below the data: recoveries differ by less than the zones of the verdicts do."""


def recovery_against_damage(path: pathlib.Path, found: Mapping[str, DamageRegression]) -> None:
    """One point per checkpoint: recovery against distance (left) and loss (right), a row per model.

    Args:
        path: Without suffix; PNG and PDF are written.
        found: Model → its points, at least one.
    """
    rows = len(found)
    with paper_figure(path, rows, 2, (PAGE, 0.3 + 2.0 * rows)) as (_, axes):
        for row, (model, regression) in enumerate(found.items()):
            for column, (name, label) in enumerate(AXES.items()):
                ax = axes[2 * row + column]
                verdict_zones(ax)
                ends = [_draw_arm(ax, regression.points, arm, name) for arm in regression.arms]
                ax.set(xscale="log", ylabel="rank recovery (%)")
                ax.set_xlabel(label if row == rows - 1 else "")
                recoveries = [p.recovery for p in regression.points]
                ax.set_ylim(min(recoveries) - MARGIN, max(recoveries) + MARGIN)
                _few_ticks(ax)
                if column:
                    direct_labels(ax, ends)
            axes[2 * row].set_title(safe_text(model), loc="left")
        # Over the axes: no place inside is free of points.
        axes[1].set_title(ZONES, loc="left", fontsize=SMALL, color="#555555", gid="zones")


def _draw_arm(
    ax: Axes, points: Sequence[DamagePoint], label: str, name: str
) -> tuple[float, str, str]:
    """Draw the checkpoints of one arm; its mean, name and colour."""
    own = [p for p in points if p.label == label]
    colour, marker = arm_style(own[0].arm)
    recoveries = [p.recovery for p in own]
    ax.plot(
        [getattr(p, name) for p in own],
        recoveries,
        marker,
        color=colour,
        markersize=4,
        markeredgewidth=0.8,
        alpha=0.75,
    )
    arm, _, mark = label.partition(" #")
    text = safe_text(arm, 18) + (f" #{safe_text(mark, 4)}" if mark else "")
    return sum(recoveries) / len(recoveries), text, colour


def _few_ticks(ax: Axes) -> None:
    """Plain numbers also within a decade: the axes are often shorter than one."""
    low, high = ax.get_xlim()
    few = high < 30.0 * low
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if few else (1.0,)
    ax.xaxis.set_major_locator(LogLocator(subs=subs))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
