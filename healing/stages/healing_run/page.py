"""The page of a healing run: its description, and what the model says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from healing.config.arm_tags import SHAM_ARM, arm_label
from healing.measurements.continuations import NOT_COMPUTED
from healing.reporting import run_page
from healing.reporting.phrases import percent_text, quantity_text
from healing.reporting.verdict_sentences import run_outcome
from healing.stages.cells.heal_outcome import HealOutcome
from healing.stages.cells.inputs import device_kind
from healing.tracking.git_version import checkout


def describe(outcome: HealOutcome, run_id: str) -> str:
    """Markdown description of a healing run."""
    s, config, made = outcome.summary(), outcome.cell.config, outcome.checkpoint.config
    why = s["rank_undefined_reason"]
    rank = f"undefined ({why})" if why else f"**{s['rank_recovery_pct']:.1f} %**"
    loss = s["loss_undefined_reason"]
    loss = f"undefined ({loss})" if loss else f"{s['loss_recovery_pct']:.1f} %"
    what = run_outcome(s["verdict"], s["steps"])
    arm = arm_label(made.get("arm", "unknown"))
    rows = (
        ("effective rank", "original_rank", "collapsed_rank", "final_effective_rank"),
        ("loss (nats per token)", "original_loss", "collapsed_loss", "final_loss"),
        ("perplexity", "original_perplexity", "collapsed_perplexity", "final_perplexity"),
    )
    return run_page.page(
        f"**{what[:1].upper()}{what[1:]}**: {config.label} after {arm}, seed {config.seed}. Rank "
        f"recovery {rank}, loss recovery {loss}.",
        run_id,
        [
            "| | healthy | collapsed | healed |",
            "|---|---|---|---|",
            *(f"| {name} | {' | '.join(quantity_text(s[k]) for k in keys)} |"
              for name, *keys in rows),
        ],
        _repeat(outcome),
        run_page.PART_OF,
        run_page.links(
            "Comes from",
            [
                ("the attack", run_page.run_link(made.get("attack_run_id", ""))),
                ("the sham that it is compared with", run_page.run_link(outcome.cell.sham_run_id)),
            ],
        ),
        run_page.links("Then", _children(outcome, run_id)),
        _sham_line(s),
        [
            f"Spectral state before healing: {s['spectral_state']}. Status: **{s['status']}**. "
            f"{s['status_reason']}"
        ],
        alt="effective rank, loss and recovery against healing steps",
    )  # fmt: skip


def _repeat(outcome: HealOutcome) -> list[str]:
    """The command that heals the same state in the same way."""
    cell, made = outcome.cell, outcome.checkpoint.config
    attack_run_id = made.get("attack_run_id", "")
    also: dict[str, Any] = {
        "attack_run_id": attack_run_id,
        "collapsed_checkpoint": "" if attack_run_id else cell.checkpoint,
        "arm": "",
        "device": device_kind(cell.config),
        "healer": cell.config.healer,
    }
    notes = []
    if attack_run_id:
        notes.append("It reads the attack's checkpoint from this store (MLFLOW_TRACKING_URI).")
    if not cell.checkpoint:
        also["arm"] = SHAM_ARM
        notes.append("It leaves the weights as they are, and heals those.")
    if cell.replicate:
        also["num_runs"] = cell.replicate + 1
        notes.append(f"Its run {cell.replicate + 1} is this one.")
    options = run_page.settings(cell.config, **also)
    return run_page.repeat("heal", options, checkout(), " ".join(notes))


def _children(outcome: HealOutcome, run_id: str) -> list[tuple[str, str]]:
    """What may be made of a healing run, as searches: they find what comes later, too."""
    if not outcome.cell.checkpoint:
        return [("runs that are compared with it", run_page.search_link("sham_run_id", run_id))]
    return [
        ("its loss landscapes", run_page.search_link("heal_run_id", run_id)),
        ("attacks on the healed weights", run_page.search_link("start_run_id", run_id)),
    ]


def _sham_line(summary: Mapping[str, Any]) -> list[str]:
    if "rank_recovery_sham_pct" not in summary:
        return []
    rank = percent_text(summary["rank_recovery_sham_pct"])
    loss = percent_text(summary["loss_recovery_sham_pct"])
    return [f"Against the sham (the healthy model at the same step): rank {rank}, loss {loss}.", ""]


def tables(outcome: HealOutcome, tokenizer: Any) -> dict[str, dict[str, list[str]]]:
    """What the three states make of the same openings, a row each, where that is wanted.

    Args:
        outcome: Of the run.
        tokenizer: Decodes.
    """
    found = outcome.said
    if found is None:
        return {}
    columns = {"opening": found.openings, "the text goes on": found.true, **found.by_state}

    def text(tokens: list[int]) -> str:
        known = [token for token in tokens if token != NOT_COMPUTED]
        words = str(tokenizer.decode(known))
        return words if len(known) == len(tokens) else f"{words} (not computable)".strip()

    return {"text": {name: [text(row) for row in c.tolist()] for name, c in columns.items()}}
