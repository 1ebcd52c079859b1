"""A search for the strongest healer in words and tables."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from healing.config.healer import Healer
from healing.reporting.escaping import csv_cell
from healing.reporting.phrases import percent_text
from healing.statistics.healer_trials import COMPLETE, Trial


def value_text(value: Any) -> str:
    """One value of an axis: numbers short, switches as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def healer_sentence(healer: Healer) -> str:
    """What won, by how much, and on what."""
    gain = healer.default_loss - healer.loss
    counted = (
        f"strongest of {healer.tried} healers tried within {healer.token_budget:,} tokens on "
        f"{healer.model} ({', '.join(healer.arms)}; selection seeds "
        f"{', '.join(map(str, healer.seeds))})"
    )
    if not gain > 0:
        return f"The default healer is the {counted}: final loss {healer.loss:.3f} nats."
    by = (
        f"{gain:.3f} nats below the default healer's"
        if math.isfinite(gain)
        else ("and the default healer diverged")
    )
    return (
        f"Trial {healer.trial} is the {counted}: final loss {healer.loss:.3f} nats, {by}; rank "
        f"recovery {percent_text(healer.rank_recovery_pct)} (default "
        f"{percent_text(healer.default_rank_recovery_pct)})."
    )


def _loss_text(trial: Trial) -> str:
    if not math.isfinite(trial.loss):
        return "–"
    return f"{trial.loss:.3f}" if trial.state == COMPLETE else f"({trial.loss:.3f})"


def tuning_markdown(
    healer: Healer, trials: Sequence[Trial], importances: Mapping[str, float]
) -> str:
    """The winner, its settings, importances, and every trial, best first.

    Args:
        healer: The winner.
        trials: In their order; the first is the default healer.
        importances: Axis → share of the variance; empty where it is not known.
    """
    names = list(trials[0].values)
    lines = [f"**{healer_sentence(healer)}**", "", "| setting | value |", "|---|---|"]
    lines += [f"| `{name}` | {value_text(v)} |" for name, v in healer.settings.items()]
    if importances:
        shares = ", ".join(f"{name} {100 * share:.0f} %" for name, share in importances.items())
        lines += ["", f"Share of the final loss's variance among those that went through (fANOVA): "
                  f"{shares}."]  # fmt: skip
    lines += [
        "",
        f"| trial | state | loss (nats) | rank recovery | {' | '.join(names)} |",
        "|---" * (4 + len(names)) + "|",
    ]
    ranked = sorted(trials, key=lambda t: (t.state != COMPLETE, t.loss, t.number))
    for trial in ranked:
        values = " | ".join(value_text(trial.values[name]) for name in names)
        rank = percent_text(trial.rank_recovery_pct) if trial.state == COMPLETE else "–"
        lines.append(
            f"| {trial.number} | {trial.state} | {_loss_text(trial)} | {rank} | {values} |"
        )
    lines += ["", "In brackets: where a healer was ended early; not comparable with final losses."]
    return "\n".join(lines)


def trials_csv(trials: Sequence[Trial]) -> str:
    """One row per trial, in their order; settings as they were used."""
    rows = []
    for trial in trials:
        facts = dict(trial.facts)
        settings = facts.pop("settings", {})
        losses = " ".join(f"{loss:.6f}" for loss in facts.pop("losses", ()))
        head = {"trial": trial.number, "state": trial.state, "loss": trial.loss, "losses": losses}
        rows.append({**head, **facts, **settings})
    out = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()
