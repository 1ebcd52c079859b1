"""One healer on every selection checkpoint, as a pure function: its mean final loss."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

from healing.config.fingerprint import as_params, fingerprint
from healing.config.heal import HealConfig
from healing.config.presets import model_slug
from healing.measurements.diagnosis import UNTRAINED
from healing.progress import Safe
from healing.stages.cells.events import Begin, Events, Record
from healing.stages.cells.heal import heal_cell, heal_code
from healing.stages.cells.heal_outcome import HealCell


def never(rung: int, loss: float) -> bool:
    """Ends no healer early."""
    return False


@dataclass(frozen=True)
class TrialCell:
    """One healer and what it is tried on.

    Attributes:
        number: In its study.
        values: Axis → value: what was proposed.
        config: Resolved configuration of its healing, of the first checkpoint.
        cells: Its healing of each checkpoint; they differ in checkpoint and seed alone.
        checkpoint_ids: Digests of the checkpoints' weights.
        judge: Asked with the rung (from 1, the same tokens for every healer) and the mean loss so
            far, nats per token; says whether the trial ends there.
    """

    number: int
    values: Mapping[str, Any]
    config: HealConfig
    cells: tuple[HealCell, ...]
    checkpoint_ids: tuple[str, ...]
    judge: Callable[[int, float], bool] = field(default=never, compare=False)

    @property
    def tokens_per_step(self) -> int:
        """Training tokens of one optimiser step."""
        return int(self.config.batch_size) * self.config.sequence_length

    @property
    def tokens(self) -> int:
        """Training tokens per checkpoint."""
        return int(self.config.healing_steps) * self.tokens_per_step


@dataclass(frozen=True)
class TrialOutcome:
    """What one healer came to.

    Attributes:
        losses: On the probe, nats per token, last of each checkpoint that it healed; infinite where
            training could not go on.
        rank_recoveries: Percent, of the same; NaN where undefined.
        loss_recoveries: Percent, of the same.
        pruned: Whether it was ended early.
        tokens: Training tokens that it used over all checkpoints.
    """

    losses: tuple[float, ...] = ()
    rank_recoveries: tuple[float, ...] = ()
    loss_recoveries: tuple[float, ...] = ()
    pruned: bool = False
    tokens: int = 0

    @property
    def loss(self) -> float:
        """Mean over the checkpoints, nats per token."""
        return sum(self.losses) / len(self.losses)

    @property
    def diverged(self) -> bool:
        """Whether it could not go on somewhere."""
        return not math.isfinite(self.loss)

    @property
    def rank_recovery_pct(self) -> float:
        """Mean over the checkpoints; NaN where one has none."""
        return sum(self.rank_recoveries) / len(self.rank_recoveries)

    @property
    def loss_recovery_pct(self) -> float:
        """Mean over the checkpoints; NaN where one has none."""
        return sum(self.loss_recoveries) / len(self.loss_recoveries)


def trial_fingerprint(cell: TrialCell) -> str:
    """Hash of what determines a trial's numbers."""
    configs = [(c.config.seed, c.config.arm) for c in cell.cells]
    return fingerprint(
        "trial", cell.number, cell.config, configs, cell.checkpoint_ids, heal_code(cell.config)
    )


def trial_cell(cell: TrialCell) -> Events[TrialOutcome]:
    """Heal every checkpoint in turn, one model in memory at a time, and say the mean final loss.

    A record's step is the number of training tokens so far, over all checkpoints, so that healers
    of any batch size are compared at the same steps. Judged is the first checkpoint at each rung
    and, from then on, the mean at the end of each checkpoint but the last: what is compared has
    always seen the same checkpoints for the same tokens.
    """
    print_ = trial_fingerprint(cell)
    yield Begin(
        print_,
        f"{model_slug(cell.config.label)}_trial{cell.number:03d}_{print_[:8]}",
        {**as_params(cell.config), "trial": cell.number, "values": dict(cell.values)},
        cell.tokens * len(cell.cells),
        unit="token",
    )
    outcome = TrialOutcome()
    for index in range(len(cell.cells)):
        outcome = yield from _healed(cell, index, outcome)
        if outcome.pruned or outcome.diverged:
            break
    return outcome


def _healed(
    cell: TrialCell, index: int, before: TrialOutcome
) -> Generator[Record | Safe, Any, TrialOutcome]:
    """One more checkpoint; what came out so far with it."""
    healing, last = cell.cells[index], Record(0, {})
    interval = healing.config.measurement_interval
    rungs = int(healing.config.healing_steps) // interval
    start = index * cell.tokens

    def so_far(loss: float, *, pruned: bool = False) -> TrialOutcome:
        return TrialOutcome(
            (*before.losses, loss),
            (*before.rank_recoveries, last.metrics["rank_recovery_pct"]),
            (*before.loss_recoveries, last.metrics["loss_recovery_pct"]),
            pruned,
            start + last.step * cell.tokens_per_step,
        )

    with contextlib.closing(heal_cell(healing)) as events:
        while True:
            try:
                event = next(events)
            except StopIteration as end:
                found, _ = end.value
                loss = math.inf if found.status in UNTRAINED else last.metrics["loss"]
                return so_far(loss if math.isfinite(loss) else math.inf)
            if isinstance(event, Safe):
                yield Safe(start + event.done * cell.tokens_per_step, event.note)
            elif isinstance(event, Record):
                last = event
                if not event.step:
                    continue  # the collapsed state: of the attack, not of the healer
                tokens = start + event.step * cell.tokens_per_step
                yield Record(tokens, event.metrics, f"loss {event.metrics['loss']:.3f}")
                rung, rest = divmod(event.step, interval)
                at_end, is_last = rung == rungs, index == len(cell.cells) - 1
                if rest or (at_end and is_last) or (index and not at_end):
                    continue
                now = so_far(event.metrics["loss"], pruned=True)
                if cell.judge(rung + index, now.loss):
                    return now
