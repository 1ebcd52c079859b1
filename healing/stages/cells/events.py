"""What a cell yields: where it begins, what it measured, and where it may be left."""

from __future__ import annotations

import pathlib
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from healing.progress import Safe

R = TypeVar("R")


@dataclass(frozen=True)
class Input:
    """One part of a corpus that a cell reads.

    Attributes:
        corpus: Its name.
        split: ``train``, ``attack`` or ``probe``.
        digest: Of its documents.
        context: What it is used for.
    """

    corpus: str
    split: str
    digest: str
    context: str


@dataclass(frozen=True)
class Begin:
    """Inputs are loaded and the cell has its name; nothing is computed yet.

    Attributes:
        fingerprint: Hash of what determines the result: a finished run with the same is the result.
        name: Name of the run's folder: one path component.
        config: Content of ``config.json``.
        total: Steps, for a progress bar.
        unit: What one step is called.
        tags: Of the run.
        counts: Numbers of parameters by the name they are logged under.
        inputs: What is read.
        warnings: Sentences for the person who started it.
        disk: Bytes of weights that the run's folder will hold.
    """

    fingerprint: str
    name: str
    config: Mapping[str, Any]
    total: int
    unit: str = "step"
    tags: Mapping[str, Any] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    inputs: tuple[Input, ...] = ()
    warnings: tuple[str, ...] = ()
    disk: int = 0


@dataclass(frozen=True)
class Record:
    """One measurement.

    Attributes:
        step: Optimiser steps done.
        metrics: Name → value; NaN is kept on disk and not logged.
        note: For a progress bar.
        write: Writes what belongs to this record into the run's folder (a usable model, say).
    """

    step: int
    metrics: Mapping[str, float]
    note: str = ""
    write: Callable[[pathlib.Path], None] | None = None


Events = Generator[Begin | Record | Safe, Any, R]
"""A cell under way. ``Begin`` comes first, and is answered with the state to go on from, or
``None``; the outcome is returned."""


def outcome_of(events: Events[R]) -> R:
    """Run a cell to its end for the outcome alone: no folder, no run, no bar."""
    while True:
        try:
            next(events)
        except StopIteration as end:
            outcome: R = end.value
            return outcome
