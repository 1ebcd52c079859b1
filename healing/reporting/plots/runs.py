"""Figures of one run: pretraining, attack, healing."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from healing.config.arm_tags import arm_label
from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE
from healing.reporting.plots.style import (
    BLACK,
    BLUE,
    SKY,
    STATE_STYLES,
    arm_style,
    figure,
    reference_line,
    series,
)

Trajectory = Sequence[tuple[int, Mapping[str, float]]]
"""Step and measured numbers by name, ascending."""


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


def rank_collapse(path: pathlib.Path, trajectory: Trajectory, arm: str, model: str) -> None:
    """Attack: effective rank (mean and every block) and perplexity against attack steps."""
    colour, marker = arm_style(arm)
    with figure(path, 1, 2, (8.4, 3.6)) as (fig, (left, right)):
        layers = sorted(k for k in trajectory[0][1] if k.startswith("layers/effective_rank"))
        for number, name in enumerate(layers):
            left.plot(
                *series(trajectory, name),
                color="#BBBBBB",
                linewidth=1,
                label="single blocks" if number == 0 else None,
            )
        left.plot(
            *series(trajectory, "effective_rank"),
            color=colour,
            marker=marker,
            markersize=4,
            label="mean over blocks",
        )
        left.set(xlabel="attack steps", ylabel="effective rank (dimensions)", ylim=(0, None))
        left.legend()
        right.plot(*series(trajectory, "perplexity"), color=colour, marker=marker, markersize=4)
        right.set(xlabel="attack steps", ylabel="perplexity (log scale)", yscale="log")
        fig.suptitle(
            f"{arm_label(arm)} on {model}: effective rank and perplexity on the clean probe"
        )


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


def _measured_line(ax: Axes, trajectory: Trajectory, name: str, arm: str) -> None:
    """One measured number of a healing run against its steps, in the arm's colour."""
    colour, marker = arm_style(arm)
    ax.plot(*series(trajectory, name), color=colour, marker=marker, markersize=3)
    ax.set_xlabel("healing steps")


def recovery_trajectory(
    path: pathlib.Path,
    trajectory: Trajectory,
    summary: Mapping[str, Any],
    arm: str,
    title: str,
) -> None:
    """Healing: effective rank with its references, and both recoveries, against steps."""
    colour, last = arm_style(arm)[0], trajectory[-1][0]
    with figure(path, 1, 2, (8.8, 3.8)) as (fig, (left, right)):
        _measured_line(left, trajectory, "effective_rank", arm)
        reference_line(left, summary["original_rank"], "healthy", last)
        reference_line(left, summary["collapsed_rank"], "collapsed", last)
        left.set(ylabel="effective rank (dimensions)", ylim=(0, None))
        names = (
            ("rank_recovery_pct", colour, "-", "rank"),
            ("loss_recovery_pct", BLACK, "--", "loss"),
        )
        for name, shade, line, label in names:
            xs, ys = series(trajectory, name)
            if ys:
                right.plot(xs, ys, line, color=shade, label=f"{label} recovery")
        right.axhspan(IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, color="#EEEEEE", zorder=0)
        for value, text, side in (
            (REVERSIBLE_ABOVE, f"reversible above {REVERSIBLE_ABOVE:g} %", "bottom"),
            (IRREVERSIBLE_BELOW, f"irreversible below {IRREVERSIBLE_BELOW:g} %", "top"),
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
    trajectory: Trajectory,
    summary: Mapping[str, Any],
    arm: str,
    title: str,
) -> None:
    """Healing: perplexity on a log scale against steps, with its references."""
    last = trajectory[-1][0]
    with figure(path) as (_, (ax,)):
        _measured_line(ax, trajectory, "perplexity", arm)
        for state, key in (
            ("healthy", "original_perplexity"),
            ("collapsed", "collapsed_perplexity"),
        ):
            if math.isfinite(summary[key]):
                reference_line(ax, summary[key], state, last)
        ax.set(ylabel="perplexity on the probe (log scale)", yscale="log", title=title)
