"""Configuration of the ``summarize`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import option
from healing.config.shared import OutputOptions

FIGURE_STYLES = ("sans", "serif")
"""Types that the figures of a summary are set in."""


@dataclass(frozen=True, kw_only=True)
class SummarizeConfig(OutputOptions):
    """Which healing runs to pool, and how."""

    order = (..., "output_dir", "verbosity")

    experiment: str = option(
        "", "MLflow experiment (name or id) that holds the healing runs; empty = the current one."
    )
    filter: str = option(
        "", "MLflow filter string added to the query, e.g. \"tags.model = 'nano'\"."
    )
    legacy: bool = option(
        False, "Summarize the predecessor's imported runs; they are never pooled with others."
    )
    confidence: float = option(
        0.95, "Confidence level of the intervals.", minimum=0.5, maximum=0.999
    )
    figure_style: str = option(
        "sans",
        "Type of the figures: sans, or serif for a paper set in Times, letters and mathematics.",
        choices=FIGURE_STYLES,
        determines=False,
    )
