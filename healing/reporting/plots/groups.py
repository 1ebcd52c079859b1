"""Figures of a summary: groups of healing runs with their intervals, at print size."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from healing.config.arm_tags import arm_short
from healing.reporting.plots.style import (
    BLUE,
    COLUMN,
    PAGE,
    SMALL,
    arm_style,
    direct_labels,
    paper_figure,
    safe_text,
    text_colour,
    upright_verdict_zones,
    verdict_zones,
)
from healing.statistics.group import GroupSummary
from healing.statistics.heal_runs import SHAM_ENDPOINTS, UNIGRAM
from healing.statistics.intervals import Interval
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS
from healing.statistics.summary import sizes_of

LABELS = {"rank_recovery_pct": "rank recovery (%)", "loss_recovery_pct": "loss recovery (%)"}
LOSS = "loss_recovery_pct"
GREY = "#555555"


AT_LINES = 18
"""Characters of a name at the end of a line: what is longer leaves the axes no room."""


def _groups_by_model(groups: Sequence[GroupSummary]) -> dict[str, list[GroupSummary]]:
    ordered: dict[str, list[GroupSummary]] = {}
    for group in groups:
        ordered.setdefault(group.model, []).append(group)
    return ordered


def _settings_label(
    group: GroupSummary, groups: Sequence[GroupSummary], room: int = 22, short: bool = False
) -> str:
    """An arm's name, as tables spell it; with a mark where it was run with several settings.

    Args:
        group: To be named.
        groups: All that are drawn.
        room: Characters of the name at most.
        short: The arm's shortest name instead, in a figure as narrow as a column of a paper.
    """
    twins = [g for g in groups if (g.model, g.arm) == (group.model, group.arm)]
    mark = f" {safe_text(f'#{group.settings[:4]}')}" if len(twins) > 1 else ""
    if short:
        return safe_text(arm_short(group.arm, group.label), 8 if mark else 12) + mark
    return safe_text(group.label, room) + mark


def _model_title(members: Sequence[GroupSummary]) -> str:
    first = members[0]
    size = f" ({first.n_params / 1e6:.2g} M parameters)" if first.n_params else ""
    return safe_text(first.model) + size


def _note(ax: Axes, text: str, colour: str = GREY) -> None:
    """A small line in the upper left corner, under those already there."""
    n = sum(note.get_gid() == "note" for note in ax.texts)
    ax.annotate(
        text,
        (0.0, 1.0),
        xytext=(3, -3 - 1.2 * SMALL * n),
        xycoords="axes fraction",
        textcoords="offset points",
        va="top",
        fontsize=SMALL,
        color=text_colour(colour),
        gid="note",
    )


def mean_recovery(path: pathlib.Path, groups: Sequence[GroupSummary], width: float = PAGE) -> None:
    """Mean recovery over checkpoints with its interval against steps: one row per model, rank left
    and loss right, lines named at their ends.

    Args:
        path: Without suffix; PNG and PDF are written.
        groups: At least one.
        width: Inches.
    """
    by_model = _groups_by_model(groups)
    rows = len(by_model)
    size = (width, 0.3 + rows * (1.45 if width < PAGE else 1.9))
    with paper_figure(path, rows, 2, size) as (_, axes):
        for row, members in enumerate(by_model.values()):
            for column, endpoint in enumerate(PRIMARY_ENDPOINTS):
                ax = axes[2 * row + column]
                verdict_zones(ax, explained=row == column == 0 and width >= PAGE)
                ends = [_draw_band(ax, g, endpoint, groups, width < PAGE) for g in members]
                if endpoint == LOSS:
                    _draw_what_loss_is_read_beside(ax, members, named=row == 0 and width >= PAGE)
                ax.set(ylabel=LABELS[endpoint], ylim=_visible_range(members, endpoint))
                ax.set_xlabel("healing steps" if row == rows - 1 else "")
                direct_labels(ax, [end for end in ends if end is not None])
                ax.xaxis.set_major_locator(MaxNLocator(3 if width < PAGE else 5, integer=True))
            axes[2 * row].set_title(_model_title(members), loc="left")


def _draw_what_loss_is_read_beside(ax: Axes, members: Sequence[GroupSummary], named: bool) -> None:
    """A model that knows token frequencies alone, in the colour of each arm, and the sham."""
    parts = []
    for group in members:
        unigram = group.intervals.get(UNIGRAM)
        if unigram is not None and math.isfinite(unigram.point):
            colour = arm_style(group.arm)[0]
            ax.axhline(unigram.point, color=colour, linewidth=0.8, linestyle=(0, (1, 2)), zorder=1)
            parts = ["dots in an arm's colour: unigram model"]
    sham = [level for group in members if math.isfinite(level := _sham_level(group))]
    if sham:
        mean = sum(sham) / len(sham)
        ax.axhline(mean, color=BLUE, linewidth=0.9, linestyle=(0, (4, 1, 1, 1)), zorder=1)
    if named:
        parts += ["blue: sham at the end"] if sham else []
        ax.set_title("; ".join(parts), loc="left", fontsize=SMALL, color="#555555")


def _sham_level(group: GroupSummary) -> float:
    """Recovery of loss that the sham's loss after the last step stands for: 100·(sham −
    collapsed)/(healthy − collapsed), the ratio of the recoveries against the healthy model and
    against the sham.
    """
    own, against = group.intervals.get(LOSS), group.intervals.get(SHAM_ENDPOINTS[1])
    if own is None or against is None or not abs(against.point) > 1.0:
        return math.nan
    return 100.0 * own.point / against.point


def _visible_range(groups: Sequence[GroupSummary], endpoint: str) -> tuple[float, float]:
    """From the mean curves, so that one wide interval does not flatten the others."""
    means = [i.point for g in groups for i in g.bands[endpoint].intervals if math.isfinite(i.point)]
    low, high = min([0.0, *means]), max([100.0, *means])
    height = high - low
    return low - 0.12 * height, high + 0.26 * height  # room for notes over the healthy value


def _draw_band(
    ax: Axes, group: GroupSummary, endpoint: str, groups: Sequence[GroupSummary], narrow: bool
) -> tuple[float, str, str] | None:
    """Draw a group's mean and band; where the line ends, its name and colour."""
    colour, marker = arm_style(group.arm)
    band, name = (
        group.bands[endpoint],
        _settings_label(group, groups, 8 if narrow else AT_LINES, short=narrow),
    )
    points = [i.point for i in band.intervals]
    finite = [p for p in points if math.isfinite(p)]
    if not finite:
        _note(ax, f"{name}: undefined", colour)
        return None
    ax.plot(
        band.steps,
        points,
        color=colour,
        marker=marker,
        markersize=3,
        markevery=max(1, len(points) // 6),
    )
    ax.fill_between(
        band.steps,
        [i.low for i in band.intervals],
        [i.high for i in band.intervals],
        color=colour,
        alpha=0.18,
        linewidth=0,
    )
    return finite[-1], name, colour


def final_recovery(path: pathlib.Path, groups: Sequence[GroupSummary]) -> None:
    """Final recovery of each group: every checkpoint's mean, and the mean with its interval."""
    labels = [f"{safe_text(g.model)}  {_settings_label(g, groups)}" for g in groups]
    with paper_figure(path, 1, 2, (PAGE, 0.7 + 0.28 * len(groups))) as (_, axes):
        for ax, endpoint in zip(axes, PRIMARY_ENDPOINTS, strict=True):
            upright_verdict_zones(ax, explained=True)
            for y, group in enumerate(groups):
                _draw_final(ax, group, endpoint, y)
            ax.set(xlabel=LABELS[endpoint], ylim=(len(groups) - 0.5, -0.5))
            low, high = ax.get_xlim()
            ax.set_xlim(min(low, -5.0), max(high, 105.0))
            ax.grid(axis="y", visible=False)
            ax.set_yticks(range(len(groups)), labels if ax is axes[0] else [""] * len(groups))
            ax.tick_params(axis="y", length=0)


def _draw_final(ax: Axes, group: GroupSummary, endpoint: str, y: int) -> None:
    colour, marker = arm_style(group.arm)
    interval = group.intervals[endpoint]
    means = [m for m in group.means[endpoint].means if math.isfinite(m)]
    draw_points(ax, means, y, colour, marker)
    if math.isnan(interval.point):
        ax.annotate(
            "undefined",
            (0.02, y),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=SMALL,
            color=GREY,
            bbox={"facecolor": "white", "linewidth": 0, "pad": 1},
        )
        return
    draw_interval(ax, interval, y, colour)


def draw_points(ax: Axes, values: Sequence[float], y: float, colour: str, marker: str) -> None:
    """One point per value, just above the middle of a row."""
    heights = [y - 0.18] * len(values)
    ax.plot(values, heights, marker, color=colour, markersize=3.5, markeredgewidth=0.8, alpha=0.7)


def draw_interval(ax: Axes, interval: Interval, y: float, colour: str) -> None:
    """A mean with its bounds, just below the middle of a row."""
    height = y + 0.14
    if interval.defined:
        ax.plot([interval.low, interval.high], [height, height], color=colour, linewidth=1.6)
    ax.plot([interval.point], [height], "|", markersize=7, markeredgewidth=1.6, color=colour)


def recovery_against_parameters(path: pathlib.Path, groups: Sequence[GroupSummary]) -> None:
    """Final rank recovery against the number of parameters, one line per arm.

    The points of an arm with several settings of one size are not joined, by the rule of the
    scaling slope: nothing says which of them belong on one line.
    """
    arms = [
        arm for arm in dict.fromkeys(g.arm for g in groups) if _groups_of_known_size(groups, arm)
    ]
    with paper_figure(path, 1, 1, (COLUMN, 2.3)) as (_, (ax,)):
        verdict_zones(ax, explained=True)
        ends = [_draw_sizes(ax, groups, arm, n - (len(arms) - 1) / 2) for n, arm in enumerate(arms)]
        ax.set(xscale="log", xlabel="parameters (log scale)", ylabel="final rank recovery (%)")
        _tick_at_models(ax, groups)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, -5.0), max(high, 105.0) + (14.0 if arms else 0.0))
        direct_labels(ax, ends)
        if not arms:
            _note(ax, "rank recovery undefined everywhere")
        loose = [arm for arm in arms if not sizes_of(groups, arm)[1]]
        if loose:
            names = ", ".join(_short_name(groups, arm) for arm in loose[:3])
            _note(ax, f"not joined (several settings of a size): {names}")


def _tick_at_models(ax: Axes, groups: Sequence[GroupSummary]) -> None:
    """One tick per model, with its name and size; names that would overlap stay away."""
    sizes = {g.n_params: g.model for g in groups if g.n_params}
    ax.xaxis.set_minor_locator(NullLocator())
    if not sizes:
        return
    ordered = sorted(sizes)
    low, high = math.log(ordered[0]), math.log(ordered[-1])
    shown, last = [], -math.inf
    for size in ordered:
        place = (math.log(size) - low) / (high - low) if high > low else 0.5
        shown.append(
            f"{safe_text(sizes[size], 9)}\n{size / 1e6:.2g} M" if place - last > 0.14 else ""
        )
        last = place if shown[-1] else last
    ax.set_xticks(ordered, shown)
    ax.set_xlim(ordered[0] / 1.6, ordered[-1] * 1.6)


def _groups_of_known_size(groups: Sequence[GroupSummary], arm: str) -> list[GroupSummary]:
    """Groups of an arm with a known size and a defined recovery."""
    own, _ = sizes_of(groups, arm)
    return [g for g in own if math.isfinite(g.intervals["rank_recovery_pct"].point)]


def _short_name(groups: Sequence[GroupSummary], arm: str) -> str:
    label = next(g.label for g in groups if g.arm == arm)
    return safe_text(label, AT_LINES)


def _draw_sizes(
    ax: Axes, groups: Sequence[GroupSummary], arm: str, place: float
) -> tuple[float, str, str]:
    """Draw one arm, a little to the side so that intervals of one size do not hide one another."""
    colour, marker = arm_style(arm)
    own, joined = _groups_of_known_size(groups, arm), sizes_of(groups, arm)[1]
    seen: dict[int, int] = {}
    xs = []
    for group in own:
        twin = seen[group.n_params] = seen.get(group.n_params, -1) + 1
        xs.append(group.n_params * 1.04 ** (place + 0.35 * twin))
    intervals = [g.intervals["rank_recovery_pct"] for g in own]
    line = "-" if joined else "none"
    points = [i.point for i in intervals]
    ax.plot(xs, points, color=colour, marker=marker, markersize=4, linestyle=line)
    for x, i in zip(xs, intervals, strict=True):
        if i.defined:
            ax.plot([x, x], [i.low, i.high], color=colour, linewidth=0.9)
    return points[-1], _short_name(own, arm), colour


def half_recovery(path: pathlib.Path, groups: Sequence[GroupSummary]) -> None:
    """Share of checkpoints that have recovered by half, against steps (1 − Kaplan–Meier).

    Ticks are checkpoints that were followed so far and did not get there (right-censored).
    """
    by_model = _groups_by_model(groups)
    rows = len(by_model)
    names = {"rank_recovery_pct": "of their rank", "loss_recovery_pct": "of their loss"}
    with paper_figure(path, rows, 2, (PAGE, 0.3 + 1.8 * rows)) as (_, axes):
        for row, members in enumerate(by_model.values()):
            for column, endpoint in enumerate(PRIMARY_ENDPOINTS):
                ax = axes[2 * row + column]
                ax.set_ylim(-4, 116)
                ends = [_draw_survival(ax, g, endpoint, groups, n) for n, g in enumerate(members)]
                ax.set_ylabel(f"checkpoints with half\n{names[endpoint]} back (%)")
                ax.set_xlabel("healing steps" if row == rows - 1 else "")
                direct_labels(ax, [end for end in ends if end is not None])
                ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes[2 * row].set_title(_model_title(members), loc="left")


def _draw_survival(
    ax: Axes, group: GroupSummary, endpoint: str, groups: Sequence[GroupSummary], number: int
) -> tuple[float, str, str] | None:
    colour, _ = arm_style(group.arm)
    name = _settings_label(group, groups, AT_LINES)
    times = [h for h in group.half_times[endpoint].times if math.isfinite(h.time)]
    if not times:
        _note(ax, f"{name}: undefined", colour)
        return None
    curve = group.half_times[endpoint].curve
    last = max([*group.bands[endpoint].steps[-1:], *(h.time for h in times)])
    shares = [0.0, *(100.0 * (1.0 - curve.probabilities))]
    xs, ys = [0.0, *curve.times, last], [*shares, shares[-1]]
    # Lines that lie on one another stay visible: later ones are thinner and dashed.
    dashes = ("-", (0, (4, 1.5)), (0, (1.5, 1.2)))[number % 3]
    width = max(0.9, 1.9 - 0.4 * number)
    ax.step(xs, ys, where="post", color=colour, linestyle=dashes, linewidth=width)
    for h in times:
        if h.censored:
            level = max(y for x, y in zip(xs, ys, strict=True) if x <= h.time)
            ax.plot([h.time], [level], marker="|", markersize=6, color=colour)
    return ys[-1], f"{name} (n = {len(times)})", colour
