"""The figure of docs/findings.md: rank and loss against steps, every checkpoint a line."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from findings.estimates import Group, Run, group, sham_of
from findings.protocol import SCRATCH_ARM, STRONG
from healing.config.arm_tags import SHAM_ARM, arm_label, arm_role
from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE
from healing.registry import DAMAGE_CONTROL
from healing.reporting.plots.style import arm_style, figure


def _steps(runs: Sequence[Run]) -> list[int]:
    return sorted(step for step in runs[0].states if step >= 0)


def _drawn(ax: Axes, runs: Sequence[Run], values: Sequence[Sequence[float]], arm: str) -> None:
    steps, (colour, _) = _steps(runs), arm_style(arm)
    for line in values:
        ax.plot(steps, line, color=colour, alpha=0.25, linewidth=0.8)
    # Two arms are green: what is matched to HAEP is dashed.
    style = "--" if arm_role(arm) == DAMAGE_CONTROL else "-"
    mean, label = np.mean(values, axis=0), arm_label(arm)
    ax.plot(steps, mean, style, color=colour, label=label, linewidth=2)


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
            own = [r for r in runs if r.model == model and r.healer == STRONG]
            last = max(r.last for r in own)
            arms = list(dict.fromkeys(r.arm for r in own if r.arm != SHAM_ARM))
            found = [g for arm in arms if (g := group(own, model, arm, STRONG, last))]
            sham = sham_of(own, model, STRONG, last)
            _rank(left, found)
            if sham:
                _loss(right, found, sham)
            for ax in (left, right):
                ax.set_title(f"{model}, {found[0].n} checkpoints per arm")
                ax.set_xlabel("healing step")
            right.legend(fontsize=8)
