"""What a damage control has to reach: the loss or the rank that an attack left."""

from __future__ import annotations

import math
from dataclasses import dataclass

from healing.errors import MatchError
from healing.measurements.probe import Measurement
from healing.measurements.recovery import RELATIVE_CHANGE

TOLERANCE = 0.02
"""Largest difference from the target that counts as equal, over the target and over the damage."""


@dataclass(frozen=True)
class DamageTarget:
    """What the control has to reach.

    Attributes:
        name: ``loss`` (nats per token) or ``rank`` (effective rank).
        value: Of the reference attack's state, on the probe.
        healthy: Of the healthy model.
    """

    name: str
    value: float
    healthy: float

    @classmethod
    def of(cls, name: str, reference: Measurement, healthy: Measurement) -> DamageTarget:
        """The target by its name.

        Raises:
            MatchError: The reference's own value is not finite, or no damage.
        """
        target = cls(name, value_of(name, reference), value_of(name, healthy))
        if not math.isfinite(target.value) or reference.nonfinite_tokens:
            raise MatchError(
                f"the {name} of the reference attack is {target.value} with "
                f"{reference.nonfinite_tokens} tokens that cannot be computed, which nothing can "
                "be matched to: use --match norm"
            )
        if abs(target.value - target.healthy) < RELATIVE_CHANGE * target.healthy:
            raise MatchError(
                f"the reference attack left the {name} at {target.value:.4g} (healthy "
                f"{target.healthy:.4g}), which is no damage to match: use --match norm, or a "
                "stronger attack"
            )
        return target

    def error(self, measurement: Measurement) -> float:
        """(value − target) over the target or over its damage, whichever is smaller: within 2 % of
        a slightly raised loss could be no damage at all. NaN where a token cannot be computed.
        """
        scale = min(abs(self.value), abs(self.value - self.healthy))
        if measurement.nonfinite_tokens or not scale:
            return math.nan
        return (value_of(self.name, measurement) - self.value) / scale

    def reached(self, measurement: Measurement) -> bool:
        """Whether a state has the wanted damage."""
        return abs(self.error(measurement)) <= TOLERANCE

    def beyond(self, measurement: Measurement) -> bool:
        """Whether a state is past the target, seen from the healthy model; one that cannot be
        computed is.
        """
        if measurement.nonfinite_tokens:
            return True
        return not (value_of(self.name, measurement) - self.value) * (self.healthy - self.value) > 0

    @property
    def wish(self) -> str:
        """For messages."""
        return f"the {self.name} {self.value:.4g} of the reference"


def value_of(name: str, measurement: Measurement) -> float:
    """What is matched, of one state: ``loss`` (nats per token) or ``rank`` (effective rank)."""
    return measurement.loss if name == "loss" else measurement.effective_rank
