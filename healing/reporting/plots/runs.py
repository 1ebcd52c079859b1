"""Figures of one run: pretraining, attack, healing."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from matplotlib.axes import Axes

from healing.config.arm_tags import arm_label
from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE
from healing.reporting.phrases import quantity_text
from healing.reporting.plots.style import (
    BLACK,
    BLUE,
    SKY,
    SMALL,
    STATE_STYLES,
    arm_style,
    figure,
    reference_line,
    series,
    small_figure,
    text_colour,
    verdict_zones,
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
            (REVERSIBLE_ABOVE, f"over {REVERSIBLE_ABOVE:g} %: recovered", "bottom"),
            (REVERSIBLE_ABOVE, "between: in part", "top"),
            (IRREVERSIBLE_BELOW, f"under {IRREVERSIBLE_BELOW:g} %: not recovered", "top"),
        ):
            right.annotate(text, (last, value), ha="right", va=side, fontsize=8, color="#555555")
        if summary["rank_undefined_reason"]:
            right.set_title("rank recovery undefined", fontsize=9)
        right.set(xlabel="healing steps", ylabel="recovery (%)")
        if right.lines:
            right.legend(loc="best")
        fig.suptitle(title)


def overview(
    path: pathlib.Path,
    trajectory: Trajectory,
    summary: Mapping[str, Any],
    sham_loss: Mapping[int, float],
    arm: str,
) -> None:
    """Healing at a glance, as small as a run's page has room for: rank, loss, both recoveries.

    Args:
        path: PNG to write, 690 × 190 pixels.
        trajectory: Of the run.
        summary: Of the run.
        sham_loss: Loss of the sham by step, nats per token; empty without one.
        arm: Gives the colour.
    """
    with small_figure(path, 3) as (_, (rank, loss, recovery)):
        for ax, name, key in ((rank, "effective_rank", "rank"), (loss, "loss", "loss")):
            _measured_line(ax, trajectory, name, arm)
            _mark_states(
                ax,
                {"healthy": summary[f"original_{key}"], "collapsed": summary[f"collapsed_{key}"]},
            )
        rank.set_title(_from_to("effective rank", summary, "rank", "final_effective_rank"))
        loss.set_title(_from_to("loss (nats)", summary, "loss", "final_loss"))
        _knowing_less(loss, trajectory, summary["unigram_loss"], sham_loss)
        for ax in (rank, loss):
            _room_above(ax)
        for name, style in (("rank", "-"), ("loss", "--")):
            xs, ys = series(trajectory, f"{name}_recovery_pct")
            shade = arm_style(arm)[0] if name == "rank" else BLACK
            if ys:
                recovery.plot(xs, ys, style, color=shade, label=f"{name} {ys[-1]:.0f} %")
        has_any = bool(recovery.lines)
        verdict_zones(recovery)
        if has_any:
            recovery.legend(loc="best", fontsize=SMALL)
        recovery.set_title("recovery (%)" if has_any else "recovery undefined")
        recovery.set_xlabel("healing steps")


def attack_overview(
    path: pathlib.Path, trajectory: Trajectory, summary: Mapping[str, Any], arm: str
) -> None:
    """Attack at a glance: rank and loss against its steps, from the healthy value.

    Args:
        path: PNG to write, 690 × 190 pixels.
        trajectory: Of the run.
        summary: Of the run.
        arm: Gives the colour.
    """
    with small_figure(path, 2) as (_, (rank, loss)):
        for ax, name in ((rank, "effective_rank"), (loss, "loss")):
            _measured_line(ax, trajectory, name, arm)
            ax.set_xlabel("attack steps")
            _mark_states(ax, {"healthy": summary[f"healthy_{name}"]})
        for ax, what, name in (
            (rank, "effective rank", "effective_rank"),
            (loss, "loss (nats)", "loss"),
        ):
            begin, end = (quantity_text(summary[f"{s}_{name}"]) for s in ("healthy", "collapsed"))
            ax.set_title(f"{what} {begin} → {end}")
            _room_above(ax)


def _room_above(ax: Axes) -> None:
    """From 0, with room for the name of a line at the top."""
    ax.set_ylim(0, 1.12 * ax.get_ylim()[1])


def _from_to(what: str, summary: Mapping[str, Any], key: str, final: str) -> str:
    """``effective rank 26.3 → 30.0``."""
    begin, end = quantity_text(summary[f"collapsed_{key}"]), quantity_text(summary[final])
    return f"{what} {begin} → {end}"


def _mark_states(ax: Axes, values: Mapping[str, float]) -> None:
    """States' values as lines with their names: over the highest line, under the others."""
    known = {state: value for state, value in values.items() if math.isfinite(value)}
    for state, value in known.items():
        colour, line = STATE_STYLES[state]
        if state != "healthy" and value == known.get("healthy"):
            continue
        ax.axhline(value, color=colour, linestyle=line, linewidth=0.9)
        ax.annotate(
            f"{state} {quantity_text(value)}",
            (0.99, value),
            xytext=(0, 1.5 if value == max(known.values()) else -1.5),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom" if value == max(known.values()) else "top",
            fontsize=SMALL,
            color=text_colour(colour),
        )


def _knowing_less(
    ax: Axes, trajectory: Trajectory, unigram_loss: float, sham_loss: Mapping[int, float]
) -> None:
    """What a loss is to be read beside: token frequencies alone, and the sham at the same steps."""
    if math.isfinite(unigram_loss):
        ax.axhline(unigram_loss, color="#777777", linestyle=":", linewidth=1)
        ax.annotate(
            "unigram model",
            (0.99, unigram_loss),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="bottom",
            fontsize=SMALL,
            color="#555555",
        )
    steps = [step for step, _ in trajectory if step in sham_loss]
    if steps:
        values = [sham_loss[step] for step in steps]
        ax.plot(steps, values, color=BLUE, linewidth=1.1, linestyle=(0, (1, 1.5)))
        ax.annotate("sham", (steps[0], values[0]), xytext=(3, 3), textcoords="offset points",
                    va="bottom", fontsize=SMALL, color=text_colour(BLUE))  # fmt: skip


def _perplexity(loss: float) -> float:
    """exp(loss); infinite where that overflows."""
    return math.exp(loss) if loss < 700.0 else math.inf


def perplexity_recovery(
    path: pathlib.Path,
    trajectory: Trajectory,
    summary: Mapping[str, Any],
    arm: str,
    title: str,
    sham_loss: Mapping[int, float] = MappingProxyType({}),
) -> None:
    """Healing: perplexity on a log scale against steps, beside the states, the sham at the same
    steps and a model that knows token frequencies alone.
    """
    last = trajectory[-1][0]
    with figure(path) as (_, (ax,)):
        _measured_line(ax, trajectory, "perplexity", arm)
        for state, key in (
            ("healthy", "original_perplexity"),
            ("collapsed", "collapsed_perplexity"),
        ):
            if math.isfinite(summary[key]):
                reference_line(ax, summary[key], state, last)
        unigram = _perplexity(summary["unigram_loss"])
        if math.isfinite(unigram):
            ax.axhline(unigram, color="#777777", linestyle=":", linewidth=1)
            ax.annotate(f"unigram model {quantity_text(unigram)}", (last, unigram), ha="right",
                        va="bottom", fontsize=8, color="#555555")  # fmt: skip
        steps = [step for step, _ in trajectory if step in sham_loss]
        if steps:
            values = [_perplexity(sham_loss[step]) for step in steps]
            ax.plot(steps, values, color=BLUE, linestyle=(0, (1, 1.5)), linewidth=1.2)
            shade = text_colour(BLUE)
            ax.annotate("sham (dotted)", (steps[0], values[0]), xytext=(3, 6),
                        textcoords="offset points", fontsize=8, color=shade)  # fmt: skip
        ax.set(ylabel="perplexity on the probe (log scale)", yscale="log", title=title)
