"""Configuration of the ``import_results`` stage."""

from __future__ import annotations

from dataclasses import dataclass

from healing.config.options import option
from healing.config.shared import OutputOptions


@dataclass(frozen=True, kw_only=True)
class ImportConfig(OutputOptions):
    """Recorded results of the predecessor to read into MLflow."""

    order = ("folder", ...)

    folder: str = option("", "Folder of the predecessor's results, searched at any depth.")
