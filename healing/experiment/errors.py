"""Failures that are the user's to mend: shown as one line, without a traceback."""

from __future__ import annotations

from healing.attacks.matching import MatchError
from healing.checkpoints import CheckpointError
from healing.config import ConfigError
from healing.corpora import CorpusError
from healing.legacy import LegacyError
from healing.models import ModelError
from healing.tracking import TrackingError


class SweepError(RuntimeError):
    """Some cells of a sweep failed."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(f"{len(failures)} cell(s) failed; first: {failures[0]}")


EXPECTED = (
    ConfigError,
    CorpusError,
    ModelError,
    CheckpointError,
    MatchError,
    LegacyError,
    TrackingError,
    SweepError,
)
