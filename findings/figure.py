"""The figures of docs/findings.md and README: recovery against steps, every checkpoint a line."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from findings.estimates import Group, Run, group, sham_of
from findings.protocol import SCRATCH_ARM, STRONG
from healing.config.arm_tags import SHAM_ARM, arm_label, arm_role
from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE
from healing.registry import DAMAGE_CONTROL, TREATMENT
from healing.reporting.plots.style import STYLE, arm_style, figure

INK = "#0d1117"
DARK: dict[Any, Any] = {
    "text.color": "#e6edf3",
    "axes.labelcolor": "#e6edf3",
    "axes.edgecolor": "#8b949e",
    "xtick.color": "#c9d1d9",
    "ytick.color": "#c9d1d9",
    "grid.color": "#30363d",
    "figure.facecolor": INK,
    "axes.facecolor": INK,
    "savefig.facecolor": INK,
}
"""Of a page with light type on dark ground, as GitHub's."""


def _steps(runs: Sequence[Run]) -> list[int]:
    """Steps at which all of them were measured."""
    return sorted(set.intersection(*({s for s in run.states if s >= 0} for run in runs)))


def _drawn(ax: Axes, runs: Sequence[Run], values: Sequence[Sequence[float]], arm: str) -> None:
    steps, (colour, _) = _steps(runs), arm_style(arm)
    for line in values:
        ax.plot(steps, line, color=colour, alpha=0.25, linewidth=0.8)
    # Two arms are green: what is matched to HAEP is dashed.
    style = "--" if arm_role(arm) == DAMAGE_CONTROL else "-"
    mean, label = np.mean(values, axis=0), arm_label(arm)
    # The treatment lies below and is wider, so that a control that runs along it hides it not.
    width = 2 if arm_role(arm) != TREATMENT else 3.6
    ax.plot(steps, mean, style, color=colour, label=label, linewidth=width)


def _rank(ax: Axes, found: Sequence[Group]) -> None:
    for own in found:
        if own.runs[0].arm == SCRATCH_ARM:
            continue  # an untrained model was not collapsed: it has nothing to recover
        values = [[r.recovery("effective_rank", s) for s in _steps(own.runs)] for r in own.runs]
        _drawn(ax, own.runs, values, own.runs[0].arm)
    for limit in (IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE):
        ax.axhline(limit, color="#888888", linewidth=0.8, linestyle="--")
    ax.set_ylabel("rank recovery (%)")


def _loss(ax: Axes, found: Sequence[Group], sham: Group) -> None:
    for own in found:
        values = []
        for run in own.runs:
            shams = [[s.states[step]["loss"] for s in sham.runs] for step in _steps(own.runs)]
            losses = [run.states[step]["loss"] for step in _steps(own.runs)]
            values.append([a - float(np.mean(b)) for a, b in zip(losses, shams, strict=True)])
        _drawn(ax, own.runs, values, own.runs[0].arm)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set_ylabel("loss above the sham's (nats)")


def draw(runs: Sequence[Run], models: Sequence[str], path: pathlib.Path) -> None:
    """One row per model: rank recovery, and loss above the sham's; saved as PNG.

    Args:
        runs: Of the tables.
        models: Which, in this order.
        path: Of the file; the same runs give the same bytes.
    """
    with figure(path, len(models), 2, (9.0, 3.1 * len(models))) as (_, axes):
        for left, right, model in zip(axes[::2], axes[1::2], models, strict=True):
            found, sham = _groups(runs, model)
            _rank(left, found)
            if sham:
                _loss(right, found, sham)
            for ax in (left, right):
                ax.set_title(_title(model, found))
                ax.set_xlabel("healing step")
            (right if sham else left).legend(fontsize=8)


def _groups(runs: Sequence[Run], model: str) -> tuple[list[Group], Group | None]:
    """A model's arms at the end of the budget, and its sham."""
    own = [r for r in runs if r.model == model and r.healer == STRONG]
    last = max(r.last for r in own)
    arms = list(dict.fromkeys(r.arm for r in own if r.arm != SHAM_ARM))
    found = [g for arm in arms if (g := group(own, model, arm, STRONG, last))]
    return found, sham_of(own, model, STRONG, last)


def _title(model: str, found: Sequence[Group]) -> str:
    counts = sorted({own.n for own in found if own.runs[0].arm != SCRATCH_ARM})
    number = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    return f"{model}, {number} checkpoint{'' if counts == [1] else 's'} per arm"


def draw_first_screen(
    runs: Sequence[Run], models: Sequence[str], path: pathlib.Path, *, dark: bool = False
) -> None:
    """Rank recovery alone, a panel per model: what README begins with; saved as PNG.

    Args:
        runs: Of the tables.
        models: Which, in this order.
        path: Of the file; the same runs give the same bytes.
        dark: For a page with light type on dark ground.
    """
    theme: dict[Any, Any] = STYLE | (DARK if dark else {})
    with rc_context(theme):
        fig = Figure(figsize=(3.3 * len(models), 3.3))
        panels = fig.subplots(1, len(models), squeeze=False)[0]
        labelled: dict[str, Any] = {}
        for ax, model in zip(panels, models, strict=True):
            found, _ = _groups(runs, model)
            _rank(ax, found)
            ax.set_title(_title(model, found), fontsize=10)
            ax.set_xlabel("healing step")
            ax.set_ylabel("rank recovery (%)" if ax is panels[0] else "")
            low = min(-5.0, ax.get_ylim()[0])
            ax.set_ylim(max(low, -150.0), 105.0)
            handles, labels = ax.get_legend_handles_labels()
            labelled |= dict(zip(labels, handles, strict=True))
        fig.legend(
            list(labelled.values()), list(labelled), loc="lower center", ncols=len(labelled),
            fontsize=9,
        )  # fmt: skip
        fig.tight_layout(rect=(0.0, 0.09, 1.0, 1.0))
        drawn = io.BytesIO()
        fig.savefig(drawn, dpi=100)
        # A palette: half the bytes of a page that everybody loads.
        with Image.open(drawn) as picture:
            picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
