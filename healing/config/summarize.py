"""Configuration of the ``summarize`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import option, validate_fields


@dataclass(frozen=True, kw_only=True)
class SummarizeConfig:
    """Which healing runs to pool, and how."""

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
    output_dir: str = option("./experiments/results", "Local folder for results.")
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)
