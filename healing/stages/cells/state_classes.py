"""What the states and records of cells are made of: all that a snapshot on disk may hold."""

from __future__ import annotations

from healing.attacks.base import AttackRecord, StepOutcome
from healing.measurements.diagnosis import Failure
from healing.measurements.probe import Measurement
from healing.measurements.spectrum import Spectrum
from healing.stages.cells.events import Record
from healing.training.healing_loop import HealRecord
from healing.training.pretraining import PretrainRecord

STATE_CLASSES = (
    Record,
    Measurement,
    Spectrum,
    Failure,
    HealRecord,
    AttackRecord,
    StepOutcome,
    PretrainRecord,
)
"""Beside tensors and plain values."""
