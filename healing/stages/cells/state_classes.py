"""What the states and records of cells are made of: all that a snapshot on disk may hold."""

from __future__ import annotations

from healing.attacks.base import AttackRecord, StepOutcome
from healing.attacks.catalyst_search import SearchState
from healing.curvature.escape import Descent, Direction, Escape
from healing.curvature.gradient_noise import GradientStatistics
from healing.curvature.lanczos import Eigenpairs, LanczosResult, LanczosStatus
from healing.curvature.loss_landscape import LossPath
from healing.curvature.minimum import Curvature
from healing.curvature.stochastic_lanczos import QuotientsSoFar, SpectralDensity
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
    SearchState,
    QuotientsSoFar,
    LanczosResult,
    Eigenpairs,
    LanczosStatus,
    GradientStatistics,
    Curvature,
    Direction,
    SpectralDensity,
    Descent,
    Escape,
    LossPath,
)
"""Beside tensors and plain values."""
