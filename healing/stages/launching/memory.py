"""What memory a cell is predicted to take."""

from __future__ import annotations

from healing.config.heal import HealConfig
from healing.errors import HealingError
from healing.stages.dry_run.stage import predictions


def predicted_bytes(config: HealConfig) -> int:
    """At the peak of a cell, its attack or its healing; 0 where it cannot be predicted, as for arms
    that refer to another attack and for plug-ins.
    """
    try:
        found = predictions(config)
    except HealingError:
        return 0
    return max(prediction.peak_bytes for _, prediction in found.values())
