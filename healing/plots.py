"""Figures: tables and records in, matplotlib figures out. One shared style, units on every axis."""

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

from healing.pooling import GroupSummary

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


def loss_curve(
    path: pathlib.Path,
    name: str,
    tokens: Sequence[float],
    train: Sequence[float],
    heldout: Sequence[float],
    unigram_loss: float,
) -> None:
    """Pretraining: loss against tokens, with the unigram model's held-out loss."""
    with figure(path) as (_, (ax,)):
        millions = [t / 1e6 for t in tokens]
        ax.plot(millions, train, color=SKY, label="training (mean since last point)")
        ax.plot(millions, heldout, color=BLUE, label="held out")
        ax.axhline(unigram_loss, color=BLACK, linestyle="--", linewidth=1)
        ax.annotate(
            "unigram model", (millions[-1], unigram_loss), ha="right", va="bottom", fontsize=9
        )
        ax.set(
            xlabel="training tokens (millions)",
            ylabel="cross entropy (nats per token)",
            title=f"Pretraining of {name}: held-out loss {heldout[-1]:.3f} nats",
        )
        ax.legend()


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


def _finite(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    kept = [(x, y) for x, y in points if math.isfinite(y)]
    return [x for x, _ in kept], [y for _, y in kept]


def _series(
    trajectory: Sequence[tuple[int, Mapping[str, float]]], name: str
) -> tuple[list[float], list[float]]:
    return _finite([(step, values[name]) for step, values in trajectory if name in values])


def rank_collapse(
    path: pathlib.Path, trajectory: Sequence[tuple[int, Mapping[str, float]]], arm: str, model: str
) -> None:
    """Attack: effective rank (mean and every block) and perplexity against attack steps."""
    colour, marker, label = ARM_STYLES[arm]
    with figure(path, 1, 2, (8.4, 3.6)) as (fig, (left, right)):
        layers = sorted(k for k in trajectory[0][1] if k.startswith("layers/effective_rank"))
        for number, name in enumerate(layers):
            left.plot(
                *_series(trajectory, name),
                color="#BBBBBB",
                linewidth=1,
                label="single blocks" if number == 0 else None,
            )
        left.plot(
            *_series(trajectory, "effective_rank"),
            color=colour,
            marker=marker,
            markersize=4,
            label="mean over blocks",
        )
        left.set(xlabel="attack steps", ylabel="effective rank (dimensions)", ylim=(0, None))
        left.legend()
        right.plot(*_series(trajectory, "perplexity"), color=colour, marker=marker, markersize=4)
        right.set(xlabel="attack steps", ylabel="perplexity (log scale)", yscale="log")
        fig.suptitle(f"{label} on {model}: effective rank and perplexity on the clean probe")


def spectral_decay(
    path: pathlib.Path, spectra: Mapping[str, Sequence[float]], title: str = ""
) -> None:
    """Singular values of centred hidden states, relative to the largest, mean over blocks.

    Args:
        path: PNG to write.
        spectra: State (healthy, collapsed, healed) → descending values.
        title: Above the axes.
    """
    with figure(path) as (_, (ax,)):
        for name, values in spectra.items():
            colour, line = STATE_STYLES[name]
            ax.plot(range(1, len(values) + 1), values, line, color=colour, label=name)
        ax.set(
            xlabel="singular value index",
            ylabel="singular value / largest (mean over blocks)",
            yscale="log",
            title=title or "Spectral decay of hidden states",
        )
        ax.legend()


def arm_label(arm: str) -> str:
    """Name of an arm as figures show it."""
    return ARM_STYLES[arm][2] if arm in ARM_STYLES else arm


def _arm_style(arm: str) -> tuple[str, str, str]:
    return ARM_STYLES.get(arm, ("#666666", "o", arm))


def _reference_line(ax: plt.Axes, value: float, state: str, x: float) -> None:
    """Horizontal line at a state's value, labelled directly."""
    colour, line = STATE_STYLES[state]
    ax.axhline(value, color=colour, linestyle=line, linewidth=1)
    ax.annotate(
        f"{state} {value:.4g}", (x, value), ha="right", va="bottom", fontsize=8, color=colour
    )


def recovery_trajectory(
    path: pathlib.Path,
    trajectory: Sequence[tuple[int, Mapping[str, float]]],
    summary: Mapping[str, Any],
    arm: str,
    title: str,
) -> None:
    """Healing: effective rank with its references, and both recoveries, against steps."""
    colour, marker, _ = _arm_style(arm)
    last = trajectory[-1][0]
    with figure(path, 1, 2, (8.8, 3.8)) as (fig, (left, right)):
        left.plot(*_series(trajectory, "effective_rank"), color=colour, marker=marker, markersize=3)
        _reference_line(left, summary["original_rank"], "healthy", last)
        _reference_line(left, summary["collapsed_rank"], "collapsed", last)
        left.set(xlabel="healing steps", ylabel="effective rank (dimensions)", ylim=(0, None))
        names = (
            ("rank_recovery_pct", colour, "-", "rank"),
            ("loss_recovery_pct", BLACK, "--", "loss"),
        )
        for name, shade, line, label in names:
            xs, ys = _series(trajectory, name)
            if ys:
                right.plot(xs, ys, line, color=shade, label=f"{label} recovery")
        right.axhspan(20, 70, color="#EEEEEE", zorder=0)
        for value, text, side in (
            (70, "reversible above 70 %", "bottom"),
            (20, "irreversible below 20 %", "top"),
        ):
            right.annotate(text, (last, value), ha="right", va=side, fontsize=8, color="#555555")
        if summary["rank_undefined_reason"]:
            right.set_title("rank recovery undefined", fontsize=9)
        right.set(xlabel="healing steps", ylabel="recovery (%)")
        if right.lines:
            right.legend(loc="best")
        fig.suptitle(title)


def perplexity_recovery(
    path: pathlib.Path,
    trajectory: Sequence[tuple[int, Mapping[str, float]]],
    summary: Mapping[str, Any],
    arm: str,
    title: str,
) -> None:
    """Healing: perplexity on a log scale against steps, with its references."""
    colour, marker, _ = _arm_style(arm)
    last = trajectory[-1][0]
    with figure(path) as (_, (ax,)):
        ax.plot(*_series(trajectory, "perplexity"), color=colour, marker=marker, markersize=3)
        for state, key in (
            ("healthy", "original_perplexity"),
            ("collapsed", "collapsed_perplexity"),
        ):
            if math.isfinite(summary[key]):
                _reference_line(ax, summary[key], state, last)
        ax.set(
            xlabel="healing steps",
            ylabel="perplexity on the probe (log scale)",
            yscale="log",
            title=title,
        )


def _groups_by_model(groups: Sequence[GroupSummary]) -> dict[str, list[GroupSummary]]:
    ordered: dict[str, list[GroupSummary]] = {}
    for group in groups:
        ordered.setdefault(group.model, []).append(group)
    return ordered


def _verdict_zones(ax: plt.Axes) -> None:
    """Shade the partial zone and mark the healthy value."""
    ax.axhspan(20, 70, color="#EEEEEE", zorder=0)
    ax.axhline(100, color=BLACK, linewidth=0.8, linestyle=":")


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
                _verdict_zones(ax)
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
    colour, marker, _ = _arm_style(group.arm)
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
    colour, marker, _ = _arm_style(group.arm)
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
        _verdict_zones(ax)
        for arm in dict.fromkeys(g.arm for g in groups):
            own = [g for g in groups if g.arm == arm]
            own = [g for g in own if math.isfinite(g.intervals["rank_recovery_pct"].point)]
            if not own:
                continue
            colour, marker, label = _arm_style(arm)
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
