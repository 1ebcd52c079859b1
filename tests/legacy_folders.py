"""Folders as the predecessor wrote them, with numbers of the test's own."""

from __future__ import annotations

import json
import pathlib
from typing import Any

CONFIG = {
    "model": {"name": "pythia-70m", "use_quantization": False, "quantization_bits": 4},
    "attack": {"num_steps": 100, "learning_rate": 1e-4},
}
BEFORE = [0.4, 0.2, 0.1, *[0.003] * 100]
AFTER = [0.5, 0.1, 0.1, *[0.003] * 100]


def stamp(second: int) -> str:
    return f"2026-01-02T03:04:{second:02d}.500000"


def attack_rows(
    before: float = 2.0,
    after: float = 2.5,
    prefix: str = "treatment",
    second: int = 0,
    values: tuple[list[float], list[float]] = (BEFORE, AFTER),
) -> list[dict[str, Any]]:
    def state(name: str, rank: float, perplexity: float, sigma: list[float]) -> dict[str, Any]:
        return {
            f"{name}_perplexity": perplexity, f"{name}_effective_rank": rank,
            f"{name}_spectral_gap": 7.0, f"{name}_singular_values": sigma,
        }  # fmt: skip

    return [
        {"step": 0, "timestamp": stamp(second), **state("baseline", before, 50.0, values[0])},
        {"step": 10, "timestamp": stamp(second + 1), f"{prefix}_effective_rank": 2.2,
         f"{prefix}_iteration": 10},
        {"step": 100, "timestamp": stamp(second + 2), "final_catalyst_tokens": [[1, 2]]},
        {"step": 101, "timestamp": stamp(second + 3),
         **state("post_attack", after, 900.0, values[1])},
    ]  # fmt: skip


def heal_rows(second: int = 0) -> list[dict[str, Any]]:
    return [
        {"step": 10 * i, "timestamp": stamp(second + i), "healing_step": 10 * i,
         "healing_effective_rank": 1.7 - 0.001 * i, "healing_perplexity": 1000.0,
         "healing_loss": 1e10 if i == 0 else 11.0, "healing_recovery_pct": 0.0}
        for i in range(3)
    ]  # fmt: skip


def healing_summary(original: float = 1.6, collapsed: float = 1.7, final: float = 1.698):
    return {
        "rank_recovery_pct": 0.0, "ppl_improvement_pct": 0.1, "final_effective_rank": final,
        "final_perplexity": 999.0, "original_rank": original, "collapsed_rank": collapsed,
        "original_perplexity": 50.0, "collapsed_perplexity": 1000.0,
    }  # fmt: skip


def write_run(
    folder: pathlib.Path,
    rows: list[dict[str, Any]],
    config: dict[str, Any] = CONFIG,
    summary: dict[str, Any] | None = None,
) -> pathlib.Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if summary is not None:
        (folder / "healing_summary.json").write_text(json.dumps(summary))
    return folder
