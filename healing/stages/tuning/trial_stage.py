"""Stage ``trial``: one healer on every selection checkpoint, as a child of its search."""

from __future__ import annotations

import math
import pathlib
from collections.abc import Sequence
from typing import Any

from healing.config.fingerprint import as_params
from healing.reporting.phrases import percent_text
from healing.stages.cells.events import Record
from healing.stages.cells.inputs import use_threads
from healing.stages.cells.trial import TrialCell, TrialOutcome, trial_cell
from healing.stages.stage import Report, StageDefaults, Tools
from healing.statistics.healer_trials import COMPLETE, DIVERGED, PRUNED
from healing.tracking.run_files import write_json


def state_of(outcome: TrialOutcome) -> str:
    """``complete``, ``pruned`` or ``diverged``."""
    if outcome.diverged:
        return DIVERGED
    return PRUNED if outcome.pruned else COMPLETE


class TrialStage(StageDefaults):
    """From a proposal to its mean final loss."""

    name = "trial"

    def title(self, cell: TrialCell) -> str:
        """``trial 7 nano``."""
        return f"trial {cell.number} {cell.config.label}"

    def tags(self, cell: TrialCell) -> dict[str, Any]:
        """What trials are found by."""
        arms = dict.fromkeys(healing.config.arm for healing in cell.cells)
        return {"model": cell.config.label, "trial": cell.number, "selection_arms": ",".join(arms)}

    def params(self, cell: TrialCell) -> dict[str, Any]:
        """The healer, and what was proposed."""
        proposed = {f"value_{name}": value for name, value in cell.values.items()}
        return {**as_params(cell.config), **proposed, "number": cell.number}

    def output_dir(self, cell: TrialCell) -> str:
        """As configured."""
        return cell.config.output_dir

    def prepare(self, cell: TrialCell, tools: Tools) -> TrialCell:
        """It is resolved already."""
        use_threads(cell.config)
        return cell

    cell = staticmethod(trial_cell)

    def store(
        self,
        outcome: TrialOutcome,
        records: Sequence[Record],
        folder: pathlib.Path,
        run_id: str,
    ) -> Report:
        """What it came to, per checkpoint and as means."""
        state = state_of(outcome)
        means = {
            "loss": outcome.loss,
            "rank_recovery_pct": outcome.rank_recovery_pct,
            "loss_recovery_pct": outcome.loss_recovery_pct,
        }
        summary = {
            **means,
            "state": state,
            "tokens": outcome.tokens,
            "losses": outcome.losses,
            "rank_recoveries_pct": outcome.rank_recoveries,
            "loss_recoveries_pct": outcome.loss_recoveries,
        }
        write_json(folder / "trial_summary.json", summary)
        loss = f"{outcome.loss:.3f} nats" if math.isfinite(outcome.loss) else "not finite"
        line = f"{state}: loss {loss}, rank recovery {percent_text(outcome.rank_recovery_pct)}"
        points = [(outcome.tokens, {f"summary/{name}": value for name, value in means.items()})]
        text = f"**{line}** over {len(outcome.losses)} checkpoint(s), {outcome.tokens:,} tokens."
        return Report(points, {"trial_state": state}, text, line, detail=True, result=outcome)


TRIAL = TrialStage()
