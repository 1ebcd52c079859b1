"""Failures that are the user's to mend: shown as one line, without a traceback.

What derives from :class:`HealingError` says in its message what is wrong, where, and how to mend
it. Anything else that is raised is a defect of this project.
"""

from __future__ import annotations


class HealingError(Exception):
    """A failure that the message tells how to mend."""


class ConfigError(HealingError, ValueError):
    """A parameter is out of range, or two parameters contradict each other."""


class CorpusError(HealingError, RuntimeError):
    """Text cannot be loaded or is too small for what was asked."""


class ModelError(HealingError, RuntimeError):
    """A model cannot be loaded."""


class CheckpointError(HealingError, RuntimeError):
    """A checkpoint is missing, damaged, or not of the model it is loaded into."""


class MatchError(HealingError, RuntimeError):
    """No scale of the noise does the wanted damage."""


class MemoryLackError(HealingError, RuntimeError):
    """Memory ran out, of the machine or of an accelerator."""


class TrackingError(HealingError, RuntimeError):
    """The tracking store cannot be reached, or a run or artifact is not in it.

    Args:
        text: What a person reads.
        reason: Of it what the store said; empty = not told apart.
        cure: What to do about it, where that is known; empty otherwise.
    """

    def __init__(self, text: str = "", reason: str = "", cure: str = "") -> None:
        super().__init__(text)
        self.reason, self.cure = reason, cure


class OutageError(TrackingError):
    """The tracking store is away for now: what was to be stored may be stored later.

    Attributes:
        denied: Whether it waits for the user: a login that it takes, a library that reaches it.
    """

    denied = False

    def refusal(self) -> TrackingError:
        """The same of a store that never was there."""
        return TrackingError(str(self), self.reason, self.cure)


class ParallelError(HealingError, RuntimeError):
    """The processes that share a run's work cannot be started, or one of them ended."""


class OutputError(HealingError, RuntimeError):
    """The local folder for results cannot be written."""


class SweepError(HealingError, RuntimeError):
    """Some cells of a sweep failed."""

    def __init__(self, failures: list[str]) -> None:
        super().__init__(f"{len(failures)} cell(s) failed; first: {failures[0]}")
