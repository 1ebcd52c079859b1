"""Laws of approach from 0 to 1: their shape, its gradient, and when half of it is reached."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from healing.statistics.intervals import FloatArray

Law = Literal["exponential", "power law"]


@dataclass(frozen=True)
class ApproachLaw:
    """Shape of an approach from 0 to 1, by the logarithms of its positive parameters."""

    approach: Callable[[FloatArray, FloatArray], FloatArray]
    """Of times and log parameters; parameters of shape (n_shape, m, 1) give m rows."""
    log_half_life: Callable[[FloatArray], tuple[float, FloatArray]]
    """Logarithm of the half-life and its gradient in the log parameters."""
    gradient: Callable[[FloatArray, FloatArray], FloatArray]
    """Of the approach in the log parameters, shape ``(measurements, n_shape)``."""
    n_shape: int


def _exponential(t: FloatArray, log_shape: FloatArray) -> FloatArray:
    fraction: FloatArray = -np.expm1(-t / np.exp(log_shape[0]))
    return fraction


def _power_law(t: FloatArray, log_shape: FloatArray) -> FloatArray:
    tau, b = np.exp(log_shape)
    fraction: FloatArray = -np.expm1(-b * np.log1p(t / tau))
    return fraction


def _exponential_gradient(t: FloatArray, log_shape: FloatArray) -> FloatArray:
    scaled = t / np.exp(log_shape[0])
    gradient: FloatArray = (-scaled * np.exp(-scaled))[:, None]
    return gradient


def _power_law_gradient(t: FloatArray, log_shape: FloatArray) -> FloatArray:
    tau, b = np.exp(log_shape)
    scaled, log_growth = t / tau, np.log1p(t / tau)
    left = b * np.exp(-b * log_growth)
    gradient: FloatArray = np.column_stack([-left * scaled / (1.0 + scaled), left * log_growth])
    return gradient


def _exponential_half_life(log_shape: FloatArray) -> tuple[float, FloatArray]:
    return float(log_shape[0]) + math.log(math.log(2.0)), np.array([1.0])


def _power_law_half_life(log_shape: FloatArray) -> tuple[float, FloatArray]:
    halvings = math.log(2.0) / math.exp(log_shape[1])  # ln(2)/b
    value = float(log_shape[0]) + math.log(math.expm1(halvings))
    return value, np.array([1.0, halvings / math.expm1(-halvings)])


LAWS: dict[Law, ApproachLaw] = {
    "exponential": ApproachLaw(_exponential, _exponential_half_life, _exponential_gradient, 1),
    "power law": ApproachLaw(_power_law, _power_law_half_life, _power_law_gradient, 2),
}
