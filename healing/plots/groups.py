"""Figures of a summary: groups of healing runs with their intervals."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from matplotlib import pyplot as plt

from healing.plots.style import (
    BLACK,
    arm_label,
    arm_style,
    figure,
    verdict_zones,
)
from healing.pooling import GroupSummary


def _groups_by_model(groups: Sequence[GroupSummary]) -> dict[str, list[GroupSummary]]:
    ordered: dict[str, list[GroupSummary]] = {}
    for group in groups:
        ordered.setdefault(group.model, []).append(group)
    return ordered


def _settings_label(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    twins = [g for g in groups if (g.model, g.arm) == (group.model, group.arm)]
    suffix = f" #{group.settings[:6]}" if len(twins) > 1 else ""
    return arm_label(group.arm) + suffix


def mean_recovery(path: pathlib.Path, groups: Sequence[GroupSummary]) -> None:
    """Mean recovery over checkpoints with its interval, against steps: rank above, loss below."""
    by_model = _groups_by_model(groups)
    columns = len(by_model)
    endpoints = (
        ("rank_recovery_pct", "rank recovery (%)"),
        ("loss_recovery_pct", "loss recovery (%)"),
    )
    with figure(path, 2, columns, (1.2 + 4.2 * columns, 6.4)) as (fig, axes):
        for column, (model, members) in enumerate(by_model.items()):
            for row, (endpoint, label) in enumerate(endpoints):
                ax = axes[row * columns + column]
                verdict_zones(ax)
                for group in members:
                    _draw_band(ax, group, endpoint, groups)
                ax.set(xlabel="healing steps", ylabel=label, ylim=_visible_range(members, endpoint))
                ax.set_title(
                    f"{model} ({members[0].n_params / 1e6:.2g} M parameters)" if row == 0 else ""
                )
        handles = {
            text: h for ax in axes for h, text in zip(*ax.get_legend_handles_labels(), strict=True)
        }
        fig.legend(
            list(handles.values()),
            list(handles),
            loc="upper center",
            bbox_to_anchor=(0.5, 0.0),
            ncols=max(1, len(handles)),
        )


def _visible_range(groups: Sequence[GroupSummary], endpoint: str) -> tuple[float, float]:
    """From the mean curves, so that one wide interval does not flatten the others."""
    means = [i.point for g in groups for i in g.bands[endpoint].intervals if math.isfinite(i.point)]
    low, high = min([0.0, *means]), max([100.0, *means])
    margin = 0.15 * (high - low)
    return low - margin, high + margin


def _draw_band(
    ax: plt.Axes, group: GroupSummary, endpoint: str, groups: Sequence[GroupSummary]
) -> None:
    colour, marker, _ = arm_style(group.arm)
    band = group.bands[endpoint]
    points = [i.point for i in band.intervals]
    if not any(map(math.isfinite, points)):
        notes = sum(text.get_text().endswith("undefined") for text in ax.texts)
        ax.annotate(
            f"{_settings_label(group, groups)}: undefined",
            (0.98, 0.95 - 0.07 * notes),
            xycoords="axes fraction",
            ha="right",
            va="top",
            fontsize=8,
            color=colour,
        )
        return
    ax.plot(
        band.steps,
        points,
        color=colour,
        marker=marker,
        markersize=3.5,
        markevery=max(1, len(points) // 8),
        label=_settings_label(group, groups),
    )
    ax.fill_between(
        band.steps,
        [i.low for i in band.intervals],
        [i.high for i in band.intervals],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )


def final_recovery(path: pathlib.Path, groups: Sequence[GroupSummary]) -> None:
    """Final recovery of each group: every checkpoint's mean, and the mean with its interval."""
    endpoints = (
        ("rank_recovery_pct", "rank recovery (%)"),
        ("loss_recovery_pct", "loss recovery (%)"),
    )
    labels = [f"{g.model}  {_settings_label(g, groups)}" for g in groups]
    with figure(path, 1, 2, (9.6, 1.6 + 0.45 * len(groups))) as (_, axes):
        for ax, (endpoint, name) in zip(axes, endpoints, strict=True):
            ax.axvspan(20, 70, color="#EEEEEE", zorder=0)
            ax.axvline(100, color=BLACK, linewidth=0.8, linestyle=":")
            for y, group in enumerate(groups):
                _draw_final(ax, group, endpoint, y)
            ax.set(xlabel=name, ylim=(len(groups) - 0.5, -0.5))
            ax.grid(axis="y", visible=False)
            ax.set_yticks(range(len(groups)), labels if ax is axes[0] else [""] * len(groups))


def _draw_final(ax: plt.Axes, group: GroupSummary, endpoint: str, y: int) -> None:
    colour, marker, _ = arm_style(group.arm)
    interval = group.intervals[endpoint]
    means = [m for m in group.means[endpoint].means if math.isfinite(m)]
    ax.scatter(means, [y - 0.18] * len(means), color=colour, marker=marker, s=18, alpha=0.6)
    if math.isnan(interval.point):
        ax.annotate(
            "undefined",
            (0.02, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color="#555555",
        )
        return
    if interval.defined:
        ax.plot([interval.low, interval.high], [y + 0.12] * 2, color=colour, linewidth=2)
    ax.plot(
        [interval.point], [y + 0.12], marker="|", markersize=12, markeredgewidth=2, color=colour
    )


def recovery_against_parameters(path: pathlib.Path, groups: Sequence[GroupSummary]) -> None:
    """Final rank recovery against the number of parameters, one line per arm."""
    with figure(path) as (_, (ax,)):
        verdict_zones(ax)
        for arm in dict.fromkeys(g.arm for g in groups):
            own = [g for g in groups if g.arm == arm]
            own = [g for g in own if math.isfinite(g.intervals["rank_recovery_pct"].point)]
            if not own:
                continue
            colour, marker, label = arm_style(arm)
            xs = [g.n_params for g in own]
            ax.plot(
                xs,
                [g.intervals["rank_recovery_pct"].point for g in own],
                color=colour,
                marker=marker,
                label=label,
            )
            for g in own:
                interval = g.intervals["rank_recovery_pct"]
                if interval.defined:
                    ax.plot(
                        [g.n_params] * 2, [interval.low, interval.high], color=colour, linewidth=1
                    )
        ax.set(xscale="log", xlabel="parameters (log scale)", ylabel="final rank recovery (%)")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
