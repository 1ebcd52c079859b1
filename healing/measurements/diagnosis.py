"""What became of a healing run that could not compute: origins, statuses, sentences.

Standard library only; the observations come from :mod:`healing.training.nonfinite` and
:mod:`healing.training.healing_loop`.
"""

from __future__ import annotations

from dataclasses import dataclass

FORWARD, GRADIENT, UPDATE, WEIGHTS, NONE = "forward", "gradient", "update", "weights", "none"
"""Where the first number that is not finite appeared: in a module's output or the loss; in a
gradient while the loss was finite; in a weight after a step whose loss and gradients were finite;
in a weight before any step; nowhere."""

OK, NONFINITE_STEPS, LOCKOUT, FORMAT_OVERFLOW, OPTIMISER_ARTIFACT, DIVERGED = (
    "ok",
    "nonfinite_steps",
    "lockout",
    "format_overflow",
    "optimiser_artifact",
    "diverged",
)

UNTRAINED = (LOCKOUT, FORMAT_OVERFLOW, OPTIMISER_ARTIFACT, DIVERGED)
"""Statuses of runs that have no recovery to speak of, whatever they measured before they failed."""

MAX_REPLAY_STEPS = 20
"""Steps that the healthy model takes at most in the replay of a run that failed."""


@dataclass(frozen=True)
class Failure:
    """The first step that could not be taken.

    Attributes:
        step: Counted from 1; 0 = before the first step.
        origin: :data:`FORWARD`, :data:`GRADIENT`, :data:`UPDATE` or :data:`WEIGHTS`.
        module: First module in order of execution whose output is not finite (or ``loss``, or
            ``probe``: only there); else the first parameter in order of the backward pass whose
            gradient is not finite (or ``gradient norm``, where every gradient is finite); else
            the first parameter that is not finite, in order of registration.
    """

    step: int
    origin: str
    module: str

    def __str__(self) -> str:
        place = {
            FORWARD: "the output of {}",
            GRADIENT: "the gradient of {}",
            UPDATE: "{} after the update",
            WEIGHTS: "{} to begin with",
        }[self.origin].format(self.module)
        return f"{place} is not finite"


@dataclass(frozen=True)
class HealthyReplay:
    """The healthy model through the same first steps: batches, precision and optimiser.

    Attributes:
        steps: Steps it was to take.
        failure: Its first step that could not be taken; ``None`` = it took them all.
    """

    steps: int
    failure: Failure | None

    @property
    def origin(self) -> str:
        """Of its failure, or :data:`NONE`."""
        return self.failure.origin if self.failure else NONE


@dataclass(frozen=True)
class Diagnosis:
    """Everything that the status of a healing run rests on.

    Attributes:
        precision: Of the run, as people say it: ``fp32``, ``pure fp16``, ``bf16 autocast`` …
        in_float32: What the collapsed model cannot compute in float32 before any step, if so.
        failure: First step of the run that could not be taken, if any.
        stalled: Training could not go on.
        healthy_replay: Only where the run stalled and the collapsed model computes in float32.
        nonfinite_steps: Steps that were not taken since loss or gradient was not finite.
        scaler_skipped_steps: Steps that the gradient scaler skipped while it looked for its scale.
        steps: Steps tried.
    """

    precision: str
    in_float32: Failure | None
    failure: Failure | None
    stalled: bool
    healthy_replay: HealthyReplay | None
    nonfinite_steps: int
    scaler_skipped_steps: int
    steps: int

    @property
    def status(self) -> str:
        """``lockout``: the collapsed model cannot compute in float32. ``optimiser_artifact``: it
        can, training could not go on, and the healthy model fails with the same origin.
        ``format_overflow``: as before, but the healthy model does not, and the run was not in
        float32. ``diverged``: the same in float32. ``nonfinite_steps``: some steps were not taken
        and training went on. ``ok``: none of this.
        """
        if self.in_float32:
            return LOCKOUT
        if not self.stalled:
            return NONFINITE_STEPS if self.nonfinite_steps else OK
        replay = self.healthy_replay
        if self.failure and replay and replay.origin == self.failure.origin:
            return OPTIMISER_ARTIFACT
        return DIVERGED if self.precision == "fp32" else FORMAT_OVERFLOW

    @property
    def first(self) -> Failure | None:
        """The failure that decides the status: in float32 before any step, else of the run."""
        return self.in_float32 or self.failure

    @property
    def sentence(self) -> str:
        """What happened, in one sentence."""
        if self.in_float32:
            return f"The collapsed model cannot compute in fp32: {self.in_float32}."
        if self.stalled and self.failure:
            return (
                f"The collapsed model computes in fp32, but {self.precision} training could not "
                f"go on: at step {self.failure.step} {self.failure}; {self._replay_words()}."
            )
        sentence = f"{self.steps - self.nonfinite_steps - self.scaler_skipped_steps} of "
        sentence += f"{self.steps} steps were taken"
        if self.scaler_skipped_steps:
            sentence += (
                f"; the gradient scaler skipped {self.scaler_skipped_steps} to lower its scale"
            )
        if self.nonfinite_steps and self.failure:
            sentence += (
                f"; {self.nonfinite_steps} were not finite: at step {self.failure.step} "
                f"{self.failure}"
            )
        return sentence + "."

    def _replay_words(self) -> str:
        if self.healthy_replay is None:
            return "the healthy model was not tried"
        if self.healthy_replay.failure is None:
            short = self.failure is not None and self.healthy_replay.steps < self.failure.step
            limit = ", and further it was not tried" if short else ""
            return f"the healthy model takes the same {self.healthy_replay.steps} steps{limit}"
        at = self.healthy_replay.failure
        alike = "the same way" if self.status == OPTIMISER_ARTIFACT else "differently"
        return f"the healthy model fails {alike}: at step {at.step} {at}"

    def summary(self) -> dict[str, object]:
        """As stored in ``healing_summary.json``; an empty text and NaN stand for *none*."""
        first, replay = self.first, self.healthy_replay
        missing = float("nan")
        return {
            "status": self.status,
            "status_reason": self.sentence,
            "nonfinite_origin": first.origin if first else NONE,
            "nonfinite_module": first.module if first else "",
            "nonfinite_step": first.step if first else missing,
            "control_steps": replay.steps if replay else missing,
            "control_origin": replay.origin if replay else "",
            "control_module": replay.failure.module if replay and replay.failure else "",
            "control_step": replay.failure.step if replay and replay.failure else missing,
            "nonfinite_steps": self.nonfinite_steps,
            "scaler_skipped_steps": self.scaler_skipped_steps,
        }
