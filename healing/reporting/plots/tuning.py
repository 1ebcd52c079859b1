"""Figures of a search for the strongest healer: its course, each axis, their importance."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from healing.reporting.plots.style import (
    BLACK,
    BLUE,
    SKY,
    VERMILION,
    figure,
    finite_points,
    safe_text,
)
from healing.reporting.tuning import value_text
from healing.statistics.healer_trials import (
    COMPLETE,
    DIVERGED,
    PRUNED,
    Trial,
    best_so_far,
    winner,
)

LOSS = "final loss (nats per token)"
_MARKS = {PRUNED: ("x", "#888888", "ended early"), DIVERGED: ("^", VERMILION, "diverged")}


def _through(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.state == COMPLETE]


def _limit(ax: Axes, trials: Sequence[Trial]) -> float:
    """Set the range of losses so that the better half fills it; its upper end.

    A few hopeless healers would press all others onto one line.
    """
    losses = sorted(trial.loss for trial in _through(trials))
    low, high = losses[0], max(losses[len(losses) // 2], trials[0].loss)
    if not math.isfinite(high):
        high = losses[-1]
    margin = 0.12 * (high - low) or 0.1
    top = min(losses[-1], high + margin) + margin
    ax.set_ylim(low - margin, top)
    return top


def history(path: pathlib.Path, trials: Sequence[Trial], title: str) -> None:
    """Final loss of each trial in their order, and the lowest so far.

    Args:
        path: PNG to write.
        trials: At least one went through; the first is the default healer.
        title: Above the axes.
    """
    with figure(path, size=(6.9, 4.0)) as (_, (ax,)):
        top = _limit(ax, trials)
        places = [trial.number for trial in trials]
        xs, ys = finite_points(list(zip(places, best_so_far(trials), strict=True)))
        ax.step(xs, ys, where="post", color=BLUE, label="lowest so far")
        _dots(ax, [(float(i), t.loss) for i, t in zip(places, trials, strict=True)
                   if t.state == COMPLETE], top, "went through")  # fmt: skip
        for state, (marker, colour, label) in _MARKS.items():
            found = [i for i, t in zip(places, trials, strict=True) if t.state == state]
            if found:
                ax.plot(found, [top] * len(found), marker, color=colour, label=label, clip_on=False)
        if math.isfinite(trials[0].loss):
            ax.axhline(trials[0].loss, color=BLACK, linestyle=":", linewidth=1)
            ax.annotate("default healer", (places[-1], trials[0].loss), ha="right", va="bottom",
                        fontsize=8)  # fmt: skip
        ax.set(xlabel="trial", ylabel=LOSS, title=title, xlim=(-0.5, places[-1] + 0.5))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(loc="best", fontsize=8)


def _dots(ax: Axes, points: Sequence[tuple[float, float]], top: float, label: str = "") -> None:
    """Losses as dots; those above the range as triangles at its end."""
    inside = [(x, y) for x, y in points if y <= top]
    above = [x for x, y in points if y > top]
    ax.plot(*zip(*inside, strict=True), "o", color=SKY, markeredgecolor=BLUE, label=label or None)
    if above:
        note = "went through, above the range" if label else None
        ax.plot(above, [top] * len(above), "^", color=SKY, markeredgecolor=BLUE, clip_on=False,
                label=note)  # fmt: skip


def slices(path: pathlib.Path, trials: Sequence[Trial], title: str) -> None:
    """Final loss against each axis, of the trials that went through; the winner is marked.

    Args:
        path: PNG to write.
        trials: At least one went through.
        title: Above all axes.
    """
    best, names = winner(trials), list(trials[0].values)
    assert best is not None, "at least one went through"
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    with figure(path, rows, columns, (2.6 * columns, 2.7 * rows + 0.4)) as (fig, axes):
        for ax, name in zip(axes[: len(names)], names, strict=True):
            top = _limit(ax, trials)
            place = _places(ax, [trial.values[name] for trial in trials])
            _dots(ax, [(place(t.values[name]), t.loss) for t in _through(trials)], top)
            ax.plot([place(best.values[name])], [best.loss], "*", color=VERMILION, markersize=12)
            ax.set_xlabel("rate over the default" if name == "rate" else name)
        for ax in axes[len(names) :]:
            ax.set_axis_off()
        for ax in axes[::columns]:
            ax.set_ylabel(LOSS, fontsize=9)
        fig.suptitle(title)


def _places(ax: Axes, values: Sequence[Any]) -> Any:
    """Where a value stands: on a log scale where many numbers occur, else one place per value."""
    distinct = sorted(set(values), key=lambda v: (str(type(v)), v))
    if len(distinct) > 6 and all(isinstance(v, float) and v > 0 for v in distinct):
        ax.set_xscale("log")
        return float
    ax.set_xticks(range(len(distinct)))
    ax.set_xticklabels([safe_text(value_text(v), 10) for v in distinct], fontsize=8)
    ax.set_xlim(-0.5, len(distinct) - 0.5)
    return lambda value: float(distinct.index(value))


def importance(path: pathlib.Path, shares: Mapping[str, float], title: str) -> None:
    """Share of the final loss's variance by axis, as bars."""
    names = sorted(shares, key=shares.__getitem__)
    with figure(path, size=(5.6, 0.9 + 0.32 * len(names))) as (_, (ax,)):
        ax.barh(np.arange(len(names)), [100 * shares[n] for n in names], color=BLUE, height=0.6)
        ax.set_yticks(np.arange(len(names)))
        ax.set_yticklabels(names)
        ax.set(xlabel="share of the final loss's variance (%)", title=title, xlim=(0, 100))
