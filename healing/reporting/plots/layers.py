"""What single blocks do along a run: their spectra as pictures by step, their ranks as a map."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray
from PIL import Image

from healing.reporting.plots.style import BLACK, SMALL, bare_figure, small_figure

PICTURES = 10
"""At most so many steps are drawn: the first, the last, and what lies evenly between."""
COLOURS = 32
"""Of a picture's palette: its file is a third of one with all colours, and looks the same."""
_MAP = colormaps["viridis"]

Spectra = NDArray[np.float64]
"""(blocks, hidden): singular values, descending."""


def chosen(steps: Sequence[int]) -> list[int]:
    """Places of the steps that are drawn."""
    if len(steps) <= PICTURES:
        return list(range(len(steps)))
    return sorted({round(i) for i in np.linspace(0, len(steps) - 1, PICTURES)})


def spectra_by_step(
    steps: Sequence[int], spectra: Sequence[Spectra], healthy: Spectra
) -> list[tuple[int, Any]]:
    """Spectra of all blocks at up to :data:`PICTURES` steps, on the same axes: one line per block,
    over its largest value, the healthy ones behind them.

    The axes are drawn once and every picture is put on a copy of them: ten take as long as one and
    a half figures.

    Args:
        steps: Of the records.
        spectra: One per record.
        healthy: Of the untouched model.

    Returns:
        (step, PIL picture of 520 × 320 pixels in at most :data:`COLOURS` colours).
    """
    with bare_figure((5.2, 3.2)) as (fig, ax):
        _axes(ax, healthy, min(map(_lowest, (healthy, *spectra))))
        canvas: Any = fig.canvas
        canvas.draw()
        behind = canvas.copy_from_bbox(fig.bbox)
        found = []
        for place in chosen(steps):
            canvas.restore_region(behind)
            lines = _lines(ax, spectra[place], "-", 1.4)
            title = ax.text(0.99, 1.03, f"step {steps[place]}", transform=ax.transAxes,
                            ha="right", fontsize=10, color=BLACK)  # fmt: skip
            for artist in (*lines, title):
                ax.draw_artist(artist)
                artist.remove()
            pixels = np.asarray(canvas.buffer_rgba())[:, :, :3]
            found.append((steps[place], Image.fromarray(pixels.copy()).quantize(COLOURS)))
    return found


def _lowest(spectra: Spectra) -> float:
    """The smallest share that is drawn; at least a millionth."""
    shares = np.array([_relative(values) for values in spectra])
    known = shares[np.isfinite(shares)]
    return max(1e-6, float(known.min())) if len(known) else 0.1


def _axes(ax: Axes, healthy: Spectra, lowest: float) -> None:
    ax.set(
        xlabel="singular value index",
        ylabel="singular value / largest of its block",
        yscale="log",
        ylim=(0.7 * lowest, 1.5),
        xlim=(0, healthy.shape[1] + 1),
    )
    ax.set_title("blocks: dark first, light last; grey: healthy", fontsize=9, loc="left")
    for line in _lines(ax, healthy, "-", 0.9):
        line.set_color("#C8C8C8")


def _lines(ax: Axes, spectra: Spectra, style: str, width: float) -> list[Any]:
    index = np.arange(1, spectra.shape[1] + 1)
    shares = np.linspace(0.0, 0.85, len(spectra))
    return [
        ax.plot(index, _relative(values), style, color=_MAP(share), linewidth=width)[0]
        for values, share in zip(spectra, shares, strict=True)
    ]


def _relative(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Over the largest; what is not positive is not drawn."""
    shown = np.where(np.isfinite(values) & (values > 0), values, np.nan)
    largest = shown[0]
    return shown / largest


def rank_map(
    path: pathlib.Path, steps: Sequence[int], ranks: NDArray[np.float64], axis: str, title: str
) -> None:
    """Effective rank of every block at every measured step, over the block's healthy rank.

    Args:
        path: PNG to write.
        steps: Of the records.
        ranks: (records, blocks): rank over that of the healthy block; NaN is left white.
        axis: What the steps are.
        title: Above the axes.
    """
    with small_figure(path, 1, (6.9, 2.6)) as (fig, (ax,)):
        edges = np.array([*steps, 2 * steps[-1] - steps[-2] if len(steps) > 1 else steps[0] + 1])
        blocks = np.arange(ranks.shape[1] + 1) - 0.5
        drawn = ax.pcolormesh(edges, blocks, 100.0 * ranks.T, cmap="viridis", vmin=0, vmax=100)
        ax.set(xlabel=f"{axis} (a cell begins at its measurement)", ylabel="block", title=title)
        ax.set_yticks(range(0, ranks.shape[1], max(1, ranks.shape[1] // 8)))
        ax.grid(visible=False)
        bar = fig.colorbar(drawn, ax=ax, pad=0.015, extend="max")
        bar.set_label("effective rank (% of healthy)", fontsize=SMALL)
