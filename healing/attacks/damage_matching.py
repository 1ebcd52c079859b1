"""Damage matching: the strength at which an arm does a given attack's damage.

The comparison that answers "it is just noise injection" needs a control that hurts as much as the
attack, not one that moves the weights as far.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from healing.attacks.base import AttackRecord, StepOutcome
from healing.attacks.damage_target import TOLERANCE, DamageTarget, value_of
from healing.attacks.loop import diagnosed
from healing.attacks.noise import gaussian_noise, noise_draws
from healing.attacks.reference import reference_state
from healing.attacks.weight_change import WeightChange, snapshot
from healing.config.attack import RANK_AND_LOSS, AttackConfig
from healing.errors import MatchError
from healing.measurements.probe import Measurement, Probe
from healing.models.blocks import readout_parameters
from healing.models.loading import LoadedModel
from healing.progress import Safe, during

LARGEST_POWER = 8
"""Strengths from 2⁻⁸ to 2⁸ are searched for a loss."""

SCANNED = (*(2.0 ** (k / 2) for k in range(-8, 9)), *(2.0**k for k in range(5, LARGEST_POWER + 1)))
"""Strengths at which a rank is looked for, ascending: from 2⁻⁴ in steps of √2 to 2⁴, then of 2. The
rank is not monotone in the strength, so that neither end says what lies between.
"""

BISECTIONS = 24

HINTS = {
    "rank": "use --match loss, or an arm that lowers the rank",
    "loss": "use --match norm, or another arm",
}
"""What to do where nothing matches."""


Trial = tuple[float, Measurement]
"""A strength and what was measured there."""


class Strengths(Protocol):
    """What is matched (see :class:`healing.attacks.strength.StrengthArm`)."""

    change: WeightChange

    def place(self, strength: float) -> None:
        """Put the weights at a strength."""

    def diagnostics(self) -> dict[str, float]:
        """Numbers at the current weights."""

    def baselines_now(self) -> dict[str, float]:
        """What these are compared with."""


def measure_state(
    loaded: LoadedModel, state: Mapping[str, torch.Tensor], change: WeightChange, probe: Probe
) -> Measurement:
    """Measure other weights in the model's place; the healthy ones are back afterwards."""
    with change.replaced(loaded.model, state):
        return probe.measure(loaded.model)


@dataclass
class _Trials:
    """The strengths tried so far, each measured once and turned into a record.

    Attributes:
        loaded: The model.
        arm: Whose numbers a record holds.
        config: Says how often its baselines are taken.
        probe: Clean probe.
        target: The damage to reach.
        place: Puts the weights at a strength.
        subject: What is scaled, for messages.
        hint: What to do where nothing matches.
        names: Of the metrics that hold strength and error.
        known: Numbers that every record holds beside these.
        reference: Measurement of the attack that is matched to; goes into the state that is kept.
        before: Strengths of an earlier search of the same attack, with their measurements.
        again: Strengths that an earlier process tried, with their measurements: they are neither
            measured nor yielded again.
    """

    loaded: LoadedModel
    arm: Strengths
    config: AttackConfig
    probe: Probe
    target: DamageTarget
    place: Callable[[float], None]
    subject: str
    hint: str
    names: tuple[str, str] = ("noise_scale", "match_error_pct")
    known: Mapping[str, float] = field(default_factory=dict)
    reference: Measurement | None = None
    before: tuple[Trial, ...] = ()
    again: deque[Trial] = field(default_factory=deque)
    tried: list[Trial] = field(default_factory=list)

    def at(self, strength: float) -> Iterator[AttackRecord | Safe]:
        """Put the weights at a strength and measure."""
        if self.again:
            self._as_before(strength)
            return
        with during("measuring a strength"):
            measurement = self._measured(strength)
            self.tried.append((strength, measurement))
            tried = (*self.before, *self.tried)
            step = len(tried)
            found = (strength, 100.0 * self.target.error(measurement))
            numbers = {
                **self.known,
                **dict(zip(self.names, found, strict=True)),
                **diagnosed(self.arm, self.config, step, last=self.matched),
            }
            moved = self.arm.change.relative(self.loaded.model)
        yield AttackRecord(step, measurement, StepOutcome(), moved, numbers)
        state = {"reference": self.reference, "tried": tried}
        yield Safe(step, state=lambda: state, parts=lambda: step)

    def _measured(self, strength: float) -> Measurement:
        self.place(strength)
        return self.probe.measure(self.loaded.model)

    def _as_before(self, strength: float) -> None:
        """Take a strength as an earlier process measured it."""
        trial = self.again.popleft()
        assert trial[0] == strength, "the same measurements lead to the same strengths"
        self.tried.append(trial)
        if self.matched or not self.again:  # the next one begins from these weights
            self.place(strength)

    @property
    def last(self) -> Measurement:
        """At the strength tried last."""
        return self.tried[-1][1]

    @property
    def matched(self) -> bool:
        """Whether the strength tried last does the wanted damage."""
        return self.target.reached(self.last)

    @property
    def beyond(self) -> bool:
        """Whether the strength tried last does more."""
        return self.target.beyond(self.last)

    def failure(self) -> MatchError:
        """How close it came, and between which values it stayed."""
        name = self.target.name
        finite = [(s, m) for s, m in self.tried if math.isfinite(self.target.error(m))]
        if not finite:
            return MatchError(
                f"no strength of {self.subject} gave a finite {name} to match {self.target.wish}"
            )
        values = [value_of(name, m) for _, m in finite]
        closest, at = min(finite, key=lambda found: abs(self.target.error(found[1])))
        return MatchError(
            f"{self.subject} does not reach {self.target.wish} within {100 * TOLERANCE:g} %: the "
            f"{name} stays between {min(values):.4g} and {max(values):.4g} for strengths from "
            f"{min(s for s, _ in finite):.3g} to {max(s for s, _ in finite):.3g}, closest was "
            f"{value_of(name, at):.4g} ({100 * abs(self.target.error(at)):.1f} % off) at "
            f"{closest:.4g}, in {len(self.tried)} tried (healthy {self.target.healthy:.4g}): "
            f"{self.hint}"
        )


def match_damage(
    loaded: LoadedModel,
    arm: Strengths,
    config: AttackConfig,
    probe: Probe,
    healthy: Measurement,
    target: DamageTarget,
    subject: str = "the noise",
) -> Iterator[AttackRecord | Safe]:
    """Find the strength at which the damage is the target's within :data:`TOLERANCE`.

    Every strength tried is a record; its step is the number of the trial. A loss grows with the
    strength: powers of two from 1 bracket it (upwards while the damage falls short of it, else
    downwards). A rank does not fall all the way: strengths are tried in ascending order
    (:data:`SCANNED`) until one is past the target. The bracket's exponent is then bisected.

    Args:
        loaded: The healthy model; left at the matched strength.
        arm: What is scaled.
        config: Resolved configuration.
        probe: Clean probe.
        healthy: Measurement of the healthy model.
        target: The damage to reach.
        subject: Name of the arm, for messages.

    Raises:
        MatchError: After the last record, saying what was reached.
    """
    yield AttackRecord(0, healthy, StepOutcome(), 0.0, diagnosed(arm, config, 0, last=False))
    hint = HINTS[target.name]
    yield from _search(_Trials(loaded, arm, config, probe, target, arm.place, subject, hint))


def _search(trials: _Trials) -> Iterator[AttackRecord | Safe]:
    yield from (_smallest if trials.target.name == "rank" else _from_one)(trials)


def _from_one(trials: _Trials) -> Iterator[AttackRecord | Safe]:
    """The strength at which a growing damage is the target's."""
    yield from trials.at(1.0)
    if trials.matched:
        return
    direction = -1 if trials.beyond else 1
    for power in range(1, LARGEST_POWER + 1):
        yield from trials.at(2.0 ** (direction * power))
        if trials.matched:
            return
        if trials.beyond == (direction > 0):
            yield from _between(trials)
            return
    raise trials.failure()


def _smallest(trials: _Trials) -> Iterator[AttackRecord | Safe]:
    """The smallest strength at which the target is met, to the resolution of what is tried."""
    for strength in SCANNED:
        yield from trials.at(strength)
        if trials.matched:
            return
        if trials.last.nonfinite_tokens:  # what cannot be computed brackets no rank
            break
        if not trials.beyond:
            continue
        if len(trials.tried) == 1:
            yield from trials.at(strength / 2.0**LARGEST_POWER)
            if trials.matched:
                return
            if trials.beyond:
                break
        yield from _between(trials)
        return
    raise trials.failure()


def _between(trials: _Trials) -> Iterator[AttackRecord | Safe]:
    """Bisect the exponent between the last two strengths tried."""
    low, high = sorted(math.log2(strength) for strength, _ in trials.tried[-2:])
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        yield from trials.at(2.0**middle)
        if trials.matched:
            return
        low, high = (low, middle) if trials.beyond else (middle, high)
    raise trials.failure()


def matched(
    loaded: LoadedModel,
    arm: Strengths,
    config: AttackConfig,
    probe: Probe,
    healthy: Measurement,
    change: WeightChange,
    kept: Mapping[str, Any] | None = None,
) -> Iterator[AttackRecord | Safe]:
    """Match an arm to the reference of its configuration, in what ``match`` names.

    Args:
        loaded: The healthy model; left matched.
        arm: What is scaled.
        config: Names the reference, ``loss``, ``rank`` or ``rank+loss``, and the random stream.
        probe: Clean probe.
        healthy: Measurement of the healthy model.
        change: Snapshot of the healthy model.
        kept: State of a safe point to go on from: strengths that were tried are not measured again.

    Raises:
        MatchError: The damage cannot be reached.
    """
    both = config.match == RANK_AND_LOSS
    if kept is None:
        state = reference_state(config, change, loaded.digest)
        with during("measuring the reference"):
            damaged = measure_state(loaded, state, change, probe)
    else:
        damaged = kept["reference"]
    target = DamageTarget.of("rank" if both else config.match, damaged, healthy)
    loss = DamageTarget.of("loss", damaged, healthy) if both else None  # before any search
    hint = HINTS[target.name]
    trials = _Trials(
        loaded,
        arm,
        config,
        probe,
        target,
        arm.place,
        config.arm,
        hint,
        reference=damaged,
        again=deque(kept["tried"] if kept else ()),
    )
    if kept is None:
        yield AttackRecord(0, healthy, StepOutcome(), 0.0, diagnosed(arm, config, 0, last=False))
    yield from _search(trials)
    if loss is not None and not loss.reached(trials.last):
        yield from _search(_readout_trials(trials, loss, config, change))


def _readout_trials(
    done: _Trials, loss: DamageTarget, config: AttackConfig, change: WeightChange
) -> _Trials:
    """What brings a state of the wanted rank to the wanted loss: Gaussian noise on the output
    matrix, where it is its own, else on the final norm's gain and bias, of t times the norm of each
    healthy tensor. No block's output depends on them, so that the rank stays to the last bit.

    Raises:
        MatchError: The loss is above already.
    """
    strength, reached = done.tried[-1]
    if reached.nonfinite_tokens or reached.loss > loss.value:
        raise MatchError(
            f"{config.arm} reaches {done.target.wish} at a loss of {reached.loss:.4g}, above "
            f"{loss.wish.removeprefix('the loss ')}: noise on the readout can only add to it; use "
            "--match rank"
        )
    readout = readout_parameters(done.loaded.model)
    readout = {n: p for n, p in readout.items() if p.ndim == 2} or readout
    healthy = {name: change.healthy[name] for name in readout}
    norms = {name: float(w.norm()) for name, w in healthy.items()}
    noise = gaussian_noise(healthy, norms, noise_draws(config, "readout"))
    start = snapshot(readout)

    @torch.no_grad()
    def place(amount: float) -> None:
        for name, parameter in readout.items():
            parameter.copy_(start[name] + amount * noise[name])

    return _Trials(
        done.loaded,
        done.arm,
        config,
        done.probe,
        loss,
        place,
        f"noise on {' and '.join(readout)}",
        "use --match rank",
        ("readout_scale", "readout_match_error_pct"),
        {"noise_scale": strength, "match_error_pct": 100.0 * done.target.error(reached)},
        done.reference,
        tuple(done.tried),
        done.again,
    )
