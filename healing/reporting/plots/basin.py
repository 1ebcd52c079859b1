"""Figures of the basin stage: losses along paths, spectral densities, gradient and eigenvalues."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes

from healing.curvature.escape import SMALL_GAIN, STANDARD_ERRORS
from healing.curvature.loss_landscape import LossPath
from healing.curvature.minimum import Evidence
from healing.curvature.stochastic_lanczos import SpectralDensity
from healing.reporting.plots.style import BLACK, STATE_STYLES, figure, finite_points

_BROADENING = 0.25
"""Standard deviation of a node in units of asinh(λ/λ₀): a tenth of a decade, beyond λ₀."""


def loss_barriers(path: pathlib.Path, paths: Mapping[str, LossPath], title: str) -> None:
    """Loss on the probe along each straight path, with the line that barriers are measured from.

    Args:
        path: PNG to write.
        paths: ``start_end`` → path, in the order of drawing.
        title: Above the axes.
    """
    with figure(path, 1, len(paths), (3.9 * len(paths), 3.9)) as (fig, axes):
        for ax, (name, walked) in zip(axes, paths.items(), strict=True):
            start, end = name.split("_")
            _path_panel(ax, walked, start, end)
        axes[0].set_ylabel("loss on the probe (nats per token)")
        fig.suptitle(title)


def _path_panel(ax: Axes, walked: LossPath, start: str, end: str) -> None:
    percent = [100 * p for p in walked.positions]
    first, last = walked.losses[0], walked.losses[-1]
    ax.plot([0, 100], [first, last], color="#999999", linestyle=":", linewidth=1.2)
    xs, ys = finite_points(list(zip(percent, walked.losses, strict=True)))
    ax.plot(xs, ys, color=BLACK, marker="o", markersize=3)
    for x, y, state in ((0, first, start), (100, last, end)):
        ax.plot([x], [y], marker="s", markersize=8, color=STATE_STYLES[state][0], clip_on=False)
    if walked.barrier > 0:
        at = walked.positions.index(walked.barrier_position)
        top = walked.losses[at]
        ax.vlines(percent[at], top - walked.barrier, top, color=STATE_STYLES["collapsed"][0])
    barrier = f"{walked.barrier:.3g} nats" if walked.finite else "undefined"
    climb = f"{walked.climb:.3g} nats" if walked.finite else walked.reason
    ax.set_title(f"{start} → {end}\nbarrier {barrier}, climb {climb}", fontsize=9.5)
    ax.set(xlabel="position on the path (%)", xlim=(-4, 104))
    ax.set_xticks([0, 25, 50, 75, 100])
    if ys:
        low, high = min(ys), max(ys)
        margin = 0.08 * (high - low or 1.0)
        ax.set_ylim(low - margin, high + margin)


def spectral_density(
    path: pathlib.Path, densities: Mapping[str, SpectralDensity], scale: float, title: str
) -> None:
    """Spectral density of the Hessian at each state, per unit of asinh(λ/λ₀), on a log scale.

    asinh is linear below λ₀ = `scale` and logarithmic beyond: the bulk around zero and single
    outliers are both seen, and negative eigenvalues too.

    Args:
        path: PNG to write.
        densities: State → quadrature; one that is not finite is named and left out.
        scale: λ₀, in units of the eigenvalues.
        title: Above the axes.
    """
    with figure(path, size=(7.6, 4.2)) as (_, (ax,)):
        reach, lost, floor = 1.0, [], 1.0
        for state, density in densities.items():
            if not bool(torch.isfinite(density.nodes).all()):
                lost.append(state)
                continue
            bent = SpectralDensity(
                torch.asinh(density.nodes / scale), density.weights, density.dimension
            )
            reach = max(reach, bent.nodes.abs().max().item())
            floor = min(floor, 0.1 / density.dimension)
            grid = bent.grid(_BROADENING, 1024)
            colour, line = STATE_STYLES[state]
            values = bent.density(grid, _BROADENING).numpy()
            ax.plot(grid.numpy(), values, line, color=colour, label=state)
        ax.set_yscale("log")
        ax.set(
            xlabel=f"eigenvalue of the Hessian (asinh scale, linear within ±{scale:.2g})",
            ylabel="share of eigenvalues per unit of the axis",
            title=title,
            ylim=(floor, 5),
        )
        _eigenvalue_ticks(ax, scale, reach)
        if lost:
            ax.annotate(f"not finite: {', '.join(lost)}", (0.98, 0.96), ha="right", va="top",
                        xycoords="axes fraction", fontsize=9)  # fmt: skip
        if len(lost) < len(densities):
            ax.legend(loc="upper left")


def _eigenvalue_ticks(ax: Axes, scale: float, reach: float) -> None:
    """Decades of the eigenvalue as ticks of the asinh axis, zero in the middle."""
    largest = math.floor(math.log10(scale * math.sinh(reach)))
    decades = [10.0**k for k in range(math.ceil(math.log10(scale)), largest + 1)]
    values = [-d for d in reversed(decades)] + [0.0, *decades]
    ax.set_xticks([math.asinh(v / scale) for v in values])
    ax.set_xticklabels([f"{v:g}" for v in values])


def gradient_and_eigenvalues(
    path: pathlib.Path, evidence: Mapping[str, Evidence], title: str
) -> None:
    """Squared gradient norm with its error, extreme eigenvalues with residuals, and how far each
    descent lowers the held-out loss, by state.
    """
    names = list(evidence)
    colours = [STATE_STYLES[name][0] for name in names]
    places = np.arange(len(names))
    with figure(path, 1, 3, (12.8, 3.9)) as (fig, (left, right, last)):
        squared = [e.gradient.squared_norm for e in evidence.values()]
        errors = [e.gradient.standard_error for e in evidence.values()]
        for x, value, error, colour in zip(places, squared, errors, colours, strict=True):
            left.errorbar([x], [value], yerr=[3 * error], fmt="o", color=colour, capsize=5)
        left.axhline(0, color=BLACK, linewidth=0.8)
        smallest = [abs(v) for v in squared if math.isfinite(v) and v]
        bounds = [v + s * e for v, e in zip(squared, errors, strict=True) for s in (-3, 3)]
        _symlog(left, bounds, min(smallest, default=1.0))
        _state_axis(left, names, [f"SNR {e.gradient.snr:.3g}" for e in evidence.values()])
        left.set(ylabel="unbiased ‖gradient‖² (± 3 standard errors)",
                 title="gradient over batches")  # fmt: skip
        ends = [(e.curvature.largest, e.curvature.largest_residuals) for e in evidence.values()]
        lows = [(e.curvature.smallest, e.curvature.smallest_residuals) for e in evidence.values()]
        for marker, found in (("^", ends), ("v", lows)):
            for x, (values, residuals), colour in zip(places, found, colours, strict=True):
                _whiskers(right, float(x), values, residuals, marker, colour)
        right.axhline(0, color=BLACK, linewidth=0.8)
        _symlog(right, [v for values, _ in ends + lows for v in values], 1.0)
        tops = [f"{e.curvature.smallest[0]:.3g} … {e.curvature.largest[0]:.3g}"
                for e in evidence.values()]  # fmt: skip
        _state_axis(right, names, tops)
        right.set(ylabel="eigenvalues (± residual)", title="extreme eigenvalues of the Hessian")
        _heldout_panel(last, evidence, colours)
        fig.suptitle(title)


def _heldout_panel(ax: Axes, evidence: Mapping[str, Evidence], colours: Sequence[str]) -> None:
    """What each descent lowers the held-out loss by, with three standard errors."""
    reach = [SMALL_GAIN]
    for x, (found, colour) in enumerate(zip(evidence.values(), colours, strict=True)):
        tried = found.escape
        own = (tried.unperturbed,) if tried.unperturbed else ()
        kinds = (("o", own), ("s", tried.perturbed), ("D", tried.along))
        shown = [(marker, d) for marker, descents in kinds for d in descents if d.finite]
        for place, (marker, descent) in enumerate(shown):
            at = x + 0.12 * (place - (len(shown) - 1) / 2)
            error = 0.0 if math.isnan(descent.heldout_error) else descent.heldout_error
            ax.errorbar([at], [descent.heldout_drop], yerr=[STANDARD_ERRORS * error], fmt=marker,
                        color=colour, markersize=5, capsize=3)  # fmt: skip
            reach += [descent.heldout_drop + s * error for s in (-STANDARD_ERRORS, STANDARD_ERRORS)]
    ax.axhline(0, color=BLACK, linewidth=0.8)
    ax.axhline(SMALL_GAIN, color="#999999", linestyle=":", linewidth=1.2)
    _symlog(ax, reach, SMALL_GAIN)
    _state_axis(ax, list(evidence), ["" for _ in evidence])
    ax.set(ylabel="fall of the held-out loss (nats, ± 3 s.e.)",
           title="descent: o from the state, □ perturbed,\n◇ along the lowest curvature; dotted: "
           f"{SMALL_GAIN:g} nats")  # fmt: skip
    ax.title.set_fontsize(9)


def _symlog(ax: Axes, values: Sequence[float], threshold: float) -> None:
    """Symmetric log axis with room beyond the outermost values."""
    known = [v for v in values if math.isfinite(v)]
    ax.set_yscale("symlog", linthresh=threshold)
    low, high = min([0.0, *known]), max([0.0, *known])
    ax.set_ylim(3 * low - threshold, 3 * high + threshold)


def _state_axis(ax: Axes, names: Sequence[str], notes: Sequence[str]) -> None:
    ax.set_xticks(range(len(names)))
    ax.set_xticklabels([f"{name}\n{note}" for name, note in zip(names, notes, strict=True)])
    ax.set_xlim(-0.6, len(names) - 0.4)


def _whiskers(
    ax: Axes,
    x: float,
    values: Sequence[float],
    residuals: Sequence[float],
    marker: str,
    colour: str,
) -> None:
    at = [x] * len(values)
    ax.errorbar(at, values, yerr=residuals, fmt=marker, color=colour, markersize=6, capsize=3)
