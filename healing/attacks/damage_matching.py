"""Damage-matched noise: one scale for all tensors at which the noise does a given damage.

The comparison that answers "it is just noise injection" needs noise that hurts as much as the
attack, not noise that moves the weights as far.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from healing.attacks.base import AttackRecord, StepOutcome
from healing.attacks.noise import NoiseArm
from healing.attacks.weight_change import WeightChange
from healing.errors import MatchError
from healing.measurements.probe import Measurement, Probe
from healing.measurements.recovery import RELATIVE_CHANGE
from healing.models.loading import LoadedModel
from healing.progress import Safe, during

TOLERANCE = 0.02
"""Largest difference from the target that counts as equal, over the target and over the damage."""

LARGEST_POWER = 8
"""Scales from 2⁻⁸ to 2⁸ times the reference's weight change are searched."""

BISECTIONS = 24


@dataclass(frozen=True)
class DamageTarget:
    """What the noise has to reach.

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
            MatchError: The reference's own value is not finite.
        """
        target = cls(name, _value(name, reference), _value(name, healthy))
        if not math.isfinite(target.value) or reference.nonfinite_tokens:
            raise MatchError(
                f"the {name} of the reference attack is {target.value} with "
                f"{reference.nonfinite_tokens} tokens that cannot be computed, which no noise can "
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
        return (_value(self.name, measurement) - self.value) / scale

    def beyond(self, measurement: Measurement) -> bool:
        """Whether a state is past the target, seen from the healthy model; one that cannot be
        computed is.
        """
        if measurement.nonfinite_tokens:
            return True
        return not (_value(self.name, measurement) - self.value) * (self.healthy - self.value) > 0


def _value(name: str, measurement: Measurement) -> float:
    return measurement.loss if name == "loss" else measurement.effective_rank


def measure_state(
    loaded: LoadedModel, state: Mapping[str, torch.Tensor], change: WeightChange, probe: Probe
) -> Measurement:
    """Measure other weights in the model's place; the healthy ones are back afterwards."""
    with change.replaced(loaded.model, state):
        return probe.measure(loaded.model)


class _Search:
    """The scales tried so far, each measured once and turned into a record."""

    def __init__(
        self, loaded: LoadedModel, arm: NoiseArm, probe: Probe, target: DamageTarget
    ) -> None:
        self.loaded, self.arm, self.probe, self.target = loaded, arm, probe, target
        self.tried: list[tuple[float, Measurement]] = []

    def at(self, scale: float) -> Iterator[AttackRecord | Safe]:
        """Put the noise in at a scale and measure."""
        with during("measuring a noise scale"):
            self.arm.place(scale)
            measurement = self.probe.measure(self.loaded.model)
            self.tried.append((scale, measurement))
            numbers = {
                "noise_scale": scale,
                "match_error_pct": 100.0 * self.target.error(measurement),
                **self.arm.diagnostics(),
            }
            moved = self.arm.change.relative(self.loaded.model)
        yield AttackRecord(len(self.tried), measurement, StepOutcome(), moved, numbers)
        yield Safe(len(self.tried))

    @property
    def matched(self) -> bool:
        """Whether the scale tried last does the wanted damage."""
        return abs(self.target.error(self.tried[-1][1])) <= TOLERANCE

    def failure(self) -> MatchError:
        """How close it came."""
        finite = [(abs(self.target.error(m)), s, m) for s, m in self.tried]
        finite = [found for found in finite if math.isfinite(found[0])]
        wish = f"the {self.target.name} {self.target.value:.4g} of the reference"
        if not finite:
            return MatchError(f"no noise scale gave a finite {self.target.name} to match {wish}")
        error, scale, measurement = min(finite, key=lambda found: found[0])
        reached = _value(self.target.name, measurement)
        other = "loss" if self.target.name == "rank" else "norm"
        return MatchError(
            f"gaussian_noise does not reach {wish} within {100 * TOLERANCE:g} %: closest was "
            f"{reached:.4g} ({100 * error:.1f} % off) at {scale:.4g} times the reference's weight "
            f"change, in {len(self.tried)} scales tried (healthy {self.target.healthy:.4g}): "
            f"use --match {other}"
        )


def match_damage(
    loaded: LoadedModel, arm: NoiseArm, probe: Probe, healthy: Measurement, target: DamageTarget
) -> Iterator[AttackRecord | Safe]:
    """Scale the noise until the damage is the target's within :data:`TOLERANCE`.

    W = W₀ + s·E with E the norm-matched noise. Powers of two from s = 1 bracket the target (upwards
    while the damage falls short of it, else downwards), then the exponent is bisected. Every scale
    tried is a record and a safe point; its step is the number of the trial.

    Args:
        loaded: The healthy model; left at the matched scale.
        arm: The noise.
        probe: Clean probe.
        healthy: Measurement of the healthy model.
        target: The damage to reach.

    Raises:
        MatchError: After the last record, saying how close it came.
    """
    search = _Search(loaded, arm, probe, target)
    yield AttackRecord(0, healthy, StepOutcome(), 0.0, arm.diagnostics())
    yield from search.at(1.0)
    if search.matched:
        return
    direction = -1 if target.beyond(search.tried[-1][1]) else 1
    for power in range(1, LARGEST_POWER + 1):
        yield from search.at(2.0 ** (direction * power))
        if search.matched:
            return
        if target.beyond(search.tried[-1][1]) == (direction > 0):
            break
    else:
        raise search.failure()
    low, high = sorted(math.log2(scale) for scale, _ in search.tried[-2:])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        yield from search.at(2.0**middle)
        if search.matched:
            return
        low, high = (low, middle) if target.beyond(search.tried[-1][1]) else (middle, high)
    raise search.failure()
