"""Configuration of the ``import_results`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import option, validate_fields


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """Recorded results of the predecessor to read into MLflow."""

    folder: str = option("", "Folder of the predecessor's results, searched at any depth.")
    output_dir: str = option("./experiments/results", "Local folder for the report.")
    verbosity: str = option(
        "normal", "quiet, normal or verbose.", choices=("quiet", "normal", "verbose")
    )

    def __post_init__(self) -> None:
        validate_fields(self)
