"""Healing runs as the statistics see them, and which of them count.

Three rules are applied before anything is estimated: a run that repeats another (equal fingerprint)
counts once, a rank that the attack raised has no recovery, and a checkpoint's trajectory is the
mean over its replicates that have a defined recovery after step 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from healing.config.arm_tags import arm_label, arm_role
from healing.measurements.diagnosis import UNTRAINED
from healing.statistics.checkpoint_estimates import CheckpointTrajectory
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS

SHAM_ENDPOINTS = ("rank_recovery_sham_pct", "loss_recovery_sham_pct")
RANK_ENDPOINTS = ("rank_recovery_pct", "rank_recovery_sham_pct")
UNIGRAM = "unigram_loss_recovery_pct"
"""What a model that knows token frequencies alone would score on loss recovery."""
ENDPOINTS = (*PRIMARY_ENDPOINTS, "ppl_improvement_pct", *SHAM_ENDPOINTS, UNIGRAM)


@dataclass(frozen=True)
class HealRun:
    """One healing run as the statistics see it.

    Attributes:
        run_id: Where it is stored.
        name: What a person calls it.
        finished: Whether it ended well; otherwise it is ``running`` or ``failure`` says why not.
        model: Model size.
        arm: Attack method (arm).
        settings: Hash of everything but seed and replicate; runs of other settings are not pooled.
        checkpoint: The collapsed state: the independent unit.
        seed: Of the attack; pairs the arms.
        n_params: Parameters of the model.
        final: Endpoint → percent after the last step; NaN where undefined, absent where it was
            not asked for (the sham's).
        steps: Measured steps.
        trajectory: Endpoint → percent at each step.
        status: As :attr:`healing.measurements.diagnosis.Diagnosis.status`.
        spectral_state: ``collapsed``, ``inflated``, ``unchanged``, ``undefined``.
        undefined_reason: Why rank recovery is undefined; empty where defined.
        noise_match: What noise shares with the attack of its seed; empty for other arms.
        reference: The collapsed state that noise was matched to; empty where it was to none.
        failure: Why the run failed.
        fingerprint: Hash of all that determines the numbers; empty where unknown.
        tokens_per_step: Training tokens of one optimiser step; 0 where unknown.
        running: The store does not say that it ended.
        heard: When its process last said that it is under way, for people; empty where it did not.
        role: Of the arm (:data:`healing.registry.ROLES`), as the run says; empty = by its name.
        label: Of the arm, for people, as the run says; empty = by its name.
        rank_recovery_error: Standard error of measurement of its rank recovery, points; NaN where
            unknown.
        panel: Measure of :data:`healing.measurements.recovery.PANEL` → its recovery after the last
            step, percent.
        rank_reduction_pct: What the attack took of the healthy rank, percent of it.
        start_loss: Of the collapsed state, nats per token.
        final_loss: After the last step, nats per token.
        weight_change: ‖W−W₀‖/‖W₀‖ of the collapsed weights.
        healer: What healed it, for people: ``AdamW at 0.001``.
        healers_tried: Healers among which it was the strongest; 0 where none was searched.
    """

    run_id: str
    name: str
    finished: bool
    model: str = ""
    arm: str = ""
    settings: str = ""
    checkpoint: str = ""
    seed: str = ""
    n_params: int = 0
    final: Mapping[str, float] = field(default_factory=dict)
    steps: tuple[int, ...] = ()
    trajectory: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    status: str = "ok"
    spectral_state: str = ""
    undefined_reason: str = ""
    noise_match: str = ""
    reference: str = ""
    failure: str = ""
    fingerprint: str = ""
    tokens_per_step: int = 0
    running: bool = False
    heard: str = ""
    role: str = ""
    label: str = ""
    rank_recovery_error: float = math.nan
    panel: Mapping[str, float] = field(default_factory=dict)
    rank_reduction_pct: float = math.nan
    start_loss: float = math.nan
    final_loss: float = math.nan
    weight_change: float = math.nan
    healer: str = ""
    healers_tried: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "role", arm_role(self.arm, self.role))
        object.__setattr__(self, "label", arm_label(self.arm, self.label))


@dataclass(frozen=True)
class Repeat:
    """A finished run that is left out, because a newer one has the same fingerprint."""

    run: HealRun
    kept: HealRun

    @property
    def largest_difference(self) -> float:
        """Between their final numbers, points; infinite where one is defined and one is not."""
        return max(
            (_distance(v, self.kept.final.get(e, math.nan)) for e, v in self.run.final.items()),
            default=0.0,
        )

    @property
    def why(self) -> str:
        """What it repeats, and whether the numbers are the same, as they should be."""
        text = f"repeats {self.kept.name} ({self.kept.run_id}), which is counted"
        apart = self.largest_difference
        if apart == 0.0:
            return f"{text}; same final numbers"
        if math.isinf(apart):
            return f"{text}, but only one of the two has a defined recovery: not reproducible"
        return f"{text}, but their final numbers differ by up to {apart:.2g} points"


def _distance(a: float, b: float) -> float:
    if math.isnan(a) or math.isnan(b):
        return 0.0 if math.isnan(a) and math.isnan(b) else math.inf
    return 0.0 if a == b else abs(a - b)


def distinct_runs(runs: Sequence[HealRun]) -> tuple[list[HealRun], tuple[Repeat, ...]]:
    """The runs that count, and the repeats of them that do not.

    Equal fingerprints are equal configuration, weights, texts and code: the same numbers again,
    which is no replicate.

    Args:
        runs: Finished runs, oldest first; the last of those with one fingerprint is kept.
    """
    newest = {run.fingerprint: run for run in runs if run.fingerprint}
    kept = [run for run in runs if newest.get(run.fingerprint, run) is run]
    repeats = [
        Repeat(run, newest[run.fingerprint])
        for run in runs
        if newest.get(run.fingerprint, run) is not run
    ]
    return kept, tuple(repeats)


def without_raised_rank(run: HealRun) -> HealRun:
    """Rank recovery of a run whose attack raised the rank, undefined: a rank that was raised comes
    down again, which is no recovery from a collapse and is not averaged with one.
    """
    if run.spectral_state != "inflated":
        return run
    nan = {e: math.nan for e in RANK_ENDPOINTS if e in run.final}
    paths = {e: (math.nan,) * len(run.steps) for e in RANK_ENDPOINTS if e in run.trajectory}
    return replace(
        run,
        final={**run.final, **nan},
        trajectory={**run.trajectory, **paths},
        undefined_reason="the attack raised the effective rank: nothing had collapsed",
    )


def is_missing(run: HealRun, endpoint: str) -> bool:
    """Whether a run was damaged and has no recovery: it could not be trained, or its rank fell and
    what came back of it is not known. What the attack did not damage is not missing: it has nothing
    to recover.
    """
    if math.isfinite(run.final.get(endpoint, math.nan)):
        return False
    fell = endpoint in RANK_ENDPOINTS and run.spectral_state == "collapsed"
    return run.status in UNTRAINED or fell


def measurement_error(runs: Sequence[HealRun], endpoint: str) -> float:
    """Standard error of measurement that the checkpoints share, points: root mean square over the
    runs that know theirs; 0 where none does, and for the loss, whose error is not measured.
    """
    errors = [r.rank_recovery_error for r in runs if endpoint in RANK_ENDPOINTS]
    known = [e**2 for e in errors if math.isfinite(e)]
    return math.sqrt(sum(known) / len(known)) if known else 0.0


def defined_runs(runs: Sequence[HealRun], endpoint: str) -> list[HealRun]:
    """The runs with a defined value after step 0: one that could not be trained ends early, and its
    steps would cut those of the others short. All of them, where none has any.
    """
    found = [run for run in runs if any(map(math.isfinite, _after_start(run, endpoint)))]
    return found or list(runs)


def _after_start(run: HealRun, endpoint: str) -> list[float]:
    pairs = zip(run.steps, run.trajectory[endpoint], strict=True)
    return [value for step, value in pairs if step > 0]


def shared_steps(runs: Sequence[HealRun]) -> list[int]:
    """The steps that all of the runs measured, ascending."""
    return sorted(set.intersection(*(set(r.steps) for r in runs))) if runs else []


def values_at(run: HealRun, endpoint: str, steps: Sequence[int]) -> tuple[float, ...]:
    """An endpoint at some of a run's steps."""
    place = {step: i for i, step in enumerate(run.steps)}
    return tuple(run.trajectory[endpoint][place[step]] for step in steps)


def checkpoint_trajectories(runs: Sequence[HealRun], endpoint: str) -> list[CheckpointTrajectory]:
    """One per checkpoint: its replicates that are defined, at the steps that all of them measured.
    A checkpoint without any keeps what it has, so that it is counted as undefined.
    """
    replicates: dict[str, list[HealRun]] = {}
    for run in runs:
        replicates.setdefault(run.checkpoint, []).append(run)
    found = []
    for members in replicates.values():
        own = defined_runs(members, endpoint)
        steps = shared_steps(own)
        rows = tuple(values_at(run, endpoint, steps) for run in own)
        found.append(CheckpointTrajectory(tuple(steps), rows))
    return found


def tokens_per_step(runs: Sequence[HealRun]) -> int:
    """Training tokens of one step where all runs agree on it; otherwise 0, unknown."""
    known = {run.tokens_per_step for run in runs}
    return known.pop() if len(known) == 1 else 0
