"""What a sweep says of its landscapes, and a healing of its recovery."""

from __future__ import annotations

import math

from healing.measurements.recovery import Verdict
from healing.stages import heal as heal_stage
from healing.stages.cells.sweep_plan import SweepCell
from healing.stages.launching.chain import CellResult
from healing.stages.sweep import basin_sentences
from healing.tracking.queries import RunView


def result(collapsed: str, healthy: str, gain: float, fall: float, own: float) -> CellResult:
    tags = {"collapsed_is_minimum": collapsed, "healthy_is_minimum": healthy}
    metrics = {
        "basin/collapsed/least_gain": gain,
        "basin/collapsed/best_probe_loss_drop": fall,
        "basin/healthy/best_probe_loss_drop": own,
        "basin/climb/collapsed_healed": 0.0,
        "basin/return_cosine": 0.125,
    }
    view = RunView("1", "n", "FINISHED", "0", {}, tags, metrics)
    return CellResult(SweepCell("nano", "haep", 0), basin=view)


def test_the_healthy_answer_stands_beside_the_collapsed_one():
    results = [
        result("no", "undetermined", 0.81, 12.0, -0.023),
        result("no", "flat within 0.01 nats", 0.5, 9.0, -0.02),
        result("undetermined", "undetermined", math.nan, math.nan, -0.02),
        CellResult(SweepCell("nano", "none", 0)),
    ]
    (line,) = basin_sentences(results)
    assert line == (
        "nano haep: collapsed state a minimum? no in 2, undetermined in 1 of 3 (healthy: "
        "undetermined in 2, flat within 0.01 nats in 1); a step along the gradient gains at least "
        "0.5 to 0.81 (undefined in 1) nats, descent on held-out text 9 to 12 (undefined in 1) "
        "(healthy: -0.023 to -0.02); climb on the straight path collapsed → healed 0 nats; "
        "cos(healing, −attack) 0.125."
    )


def test_a_healings_line_says_why_its_recovery_is_undefined():
    """Twice that it is, and nowhere why, helps nobody."""
    s = {
        "verdict": Verdict.UNDEFINED,
        "steps": 40,
        "rank_recovery_pct": math.nan,
        "loss_recovery_pct": 101.93,
        "rank_undefined_reason": "too little changed: --probe-tokens",
    }
    said = heal_stage._came_back(s)
    assert said == (
        "rank recovery undefined (too little changed: --probe-tokens), loss recovery 101.9 %"
    )
    defined = s | {
        "verdict": Verdict.PARTIAL,
        "rank_recovery_pct": 34.0,
        "rank_undefined_reason": "",
    }
    said = heal_stage._came_back(defined)
    assert "(rank recovery 34.0 %, loss recovery 101.9 %)" in said
    assert "undefined" not in said
