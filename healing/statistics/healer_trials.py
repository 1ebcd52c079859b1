"""Healers that were tried, and which of them won."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

COMPLETE, PRUNED, DIVERGED = "complete", "pruned", "diverged"


@dataclass(frozen=True)
class Trial:
    """One healer that was tried.

    Attributes:
        number: In the study; trials that were interrupted have numbers too.
        values: Axis → value.
        state: ``complete``, ``pruned`` (ended early) or ``diverged`` (could not go on).
        loss: Final loss, mean over the selection checkpoints, nats per token; of a pruned one the
            last that was judged; infinite where it diverged.
        facts: What was measured beside, and the run that holds it.
    """

    number: int
    values: Mapping[str, Any]
    state: str
    loss: float
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rank_recovery_pct(self) -> float:
        """Mean over the checkpoints that it healed; NaN where undefined."""
        return float(self.facts.get("rank_recovery_pct", math.nan))


def winner(trials: Sequence[Trial]) -> Trial | None:
    """The lowest loss of those that went through, the first of equals; ``None`` where none did."""
    through = [trial for trial in trials if trial.state == COMPLETE]
    return min(through, key=lambda trial: (trial.loss, trial.number), default=None)


def best_so_far(trials: Sequence[Trial]) -> list[float]:
    """Lowest final loss up to each trial, in nats per token; NaN before one went through."""
    found, best = [], math.nan
    for trial in trials:
        if trial.state == COMPLETE and not trial.loss >= best:
            best = trial.loss
        found.append(best)
    return found
