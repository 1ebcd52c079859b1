"""Tables of a summary: rows for CSV and JSON, Markdown for people."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from healing.config import CONTROL, TREATMENT
from healing.lockout import (
    DIVERGED,
    FORMAT_OVERFLOW,
    LOCKOUT,
    NONFINITE_STEPS,
    OPTIMISER_ARTIFACT,
)
from healing.pooling import SHAM_ENDPOINTS, Band, GroupSummary, HealRun, Summary
from healing.prospects import Approach, HalfTimes
from healing.stats import Interval
from healing.wording import (
    PLAN_NOTE,
    PROSPECTS_NOTE,
    group_label,
    headline_groups,
    interval_text,
    plan_rows,
    prospect_rows,
    verdict_text,
)

ENDPOINT_LABELS = {
    "rank_recovery_pct": "rank recovery (%)",
    "loss_recovery_pct": "loss recovery (%)",
    "ppl_improvement_pct": "perplexity improvement (%)",
    "rank_recovery_sham_pct": "rank recovery against the sham (%)",
    "loss_recovery_sham_pct": "loss recovery against the sham (%)",
    "unigram_loss_recovery_pct": "loss recovery of a unigram model (%)",
}
SHAM_NOTE = (
    "100·(now − collapsed)/(sham − collapsed), the sham being the healthy model after the same "
    "fine-tuning steps on the same batches."
)
EQUAL = {
    "norm": "equal weight change",
    "loss": "equal loss (damage-matched)",
    "rank": "equal effective rank (damage-matched)",
    "scale": "a fixed scale (not matched)",
}
STATUS_LABELS = {
    LOCKOUT: "locked out",
    FORMAT_OVERFLOW: "overflowed the format",
    OPTIMISER_ARTIFACT: "optimiser artefact",
    DIVERGED: "diverged",
    NONFINITE_STEPS: "with non-finite steps",
}
"""What the tables say of runs that are not simply ``ok``."""
STATEMENTS = {
    "superior": "HAEP damage recovers more than noise damage (superior)",
    "inferior": "HAEP damage recovers less than noise damage (inferior)",
    "equivalent": "Both recover alike within 10 points (equivalent)",
    "inconclusive": "The data do not decide (inconclusive)",
}
VERDICT_MEANING = (
    "Verdict by the interval of rank recovery: lower bound over 70 % is *acute structural failure* "
    "(it heals), upper bound under 20 % is *irreversible pathology* within this budget, an "
    "interval inside 20–70 % is *partial*, anything else *inconclusive*; *undefined* where the "
    "attack did not change the rank measurably."
)


def group_rows(summary: Summary) -> list[dict[str, Any]]:
    """One flat row per group, for CSV."""
    rows = []
    for group in summary.groups:
        row: dict[str, Any] = {
            "model": group.model,
            "arm": group.arm,
            "settings": group.settings,
            "n_params": group.n_params,
            "runs": group.n_runs,
            "checkpoints": group.n_checkpoints,
            "undefined": group.n_undefined,
            **{status: group.statuses.get(status, 0) for status in STATUS_LABELS},
            "verdict": group.verdict,
            "verdict_loss": group.verdict_loss,
        }
        for endpoint, interval in group.intervals.items():
            name = endpoint.removesuffix("_pct")
            row |= {
                f"{name}_mean_pct": interval.point,
                f"{name}_low_pct": interval.low,
                f"{name}_high_pct": interval.high,
            }
        for endpoint, interval in group.half_recovery.items():
            row[f"half_{endpoint.removesuffix('_pct')}_steps"] = interval.point
        rows.append(row)
    return rows


def _cells(group: GroupSummary, groups: Sequence[GroupSummary]) -> list[str]:
    states = ", ".join(f"{count} {state}" for state, count in group.spectral_states.items())
    unwell = [f"{group.statuses[s]} {t}" for s, t in STATUS_LABELS.items() if s in group.statuses]
    if unwell:
        states += f" ({', '.join(unwell)})"
    return [
        group.model,
        group_label(group, groups),
        f"{group.n_checkpoints} ({group.n_runs})",
        states,
        interval_text(group.intervals["rank_recovery_pct"]),
        interval_text(group.intervals["loss_recovery_pct"]),
        group.verdict,
    ]


def table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the main table."""
    level = f"{100 * summary.confidence:g} %"
    header = [
        "model",
        "arm",
        "checkpoints (runs)",
        "after the attack",
        f"rank recovery % [{level}]",
        f"loss recovery % [{level}]",
        "verdict",
    ]
    return header, [_cells(g, summary.groups) for g in summary.groups]


def text_table(summary: Summary) -> str:
    """The main table for a terminal."""
    header, rows = table(summary)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [header, *rows]
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    divider = ["---"] * len(header)
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in [header, divider, *rows]]


def _cell(text: str) -> str:
    """Text that cannot end a table cell, start HTML or break the line."""
    safe = " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")
    return safe.replace("<", "&lt;")


def comparison_sentence(model: str, summary: Summary) -> str:
    """HAEP against noise for one model, in one line."""
    comparison = summary.comparisons[model]
    parts = []
    for endpoint in comparison.endpoints:
        difference = endpoint.superiority.interval
        label = ENDPOINT_LABELS[endpoint.endpoint].replace(" (%)", "")
        unit = "" if math.isnan(difference.point) else " points"
        pairs = "" if math.isnan(difference.point) else f" ({difference.n} pairs)"
        parts.append(f"{label} {interval_text(difference)}{unit}{pairs}")
    return (
        f"{model}: HAEP minus Gaussian noise of {noise_kind(model, summary)}, paired by seed: "
        f"{'; '.join(parts)}. {STATEMENTS[comparison.statement]}."
    )


def comparison_gaps(summary: Summary) -> list[str]:
    """Models with HAEP and noise that are not compared, and why, one line each."""
    lines = []
    for model in dict.fromkeys(g.model for g in summary.groups):
        counts = {
            arm: sum((g.model, g.arm) == (model, arm) for g in summary.groups)
            for arm in (TREATMENT, CONTROL)
        }
        if all(counts.values()) and model not in summary.comparisons:
            several = max(counts.values()) > 1
            why = (
                "an arm has several settings (narrow the query with --filter)"
                if several
                else "no noise run shares a seed with the attack that it was matched to"
            )
            lines.append(f"{model}: HAEP and Gaussian noise are not compared: {why}.")
    return lines


def noise_kind(model: str, summary: Summary) -> str:
    """What the noise of a model's comparison shares with its attacks."""
    kinds = {g.noise_match for g in summary.groups if (g.model, g.arm) == (model, CONTROL)}
    return ", ".join(EQUAL.get(kind, "unknown match") for kind in sorted(kinds))


def sham_table(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the recoveries referred to the sham; no rows where there was none."""
    header = ["model", "arm", *(ENDPOINT_LABELS[e] for e in SHAM_ENDPOINTS)]
    rows = [
        [g.model, group_label(g, summary.groups)]
        + [interval_text(g.intervals[e]) for e in SHAM_ENDPOINTS]
        for g in summary.groups
        if set(SHAM_ENDPOINTS) <= g.intervals.keys()
    ]
    return header, rows


def _run_lines(runs: Sequence[HealRun], reason: str) -> list[str]:
    return [_inline(f"- `{run.name}` ({run.run_id}): {getattr(run, reason)}") for run in runs]


def markdown(summary: Summary) -> str:
    """The summary for people (``summary.md``)."""
    header, rows = table(summary)
    lines = ["# Recovery summary", ""]
    for group in headline_groups(summary):
        lines += [f"- {_inline(verdict_text(group, summary.groups))}"]
    if not summary.groups:
        lines += ["No finished runs: nothing can be said."]
    lines += ["", *_markdown_table(header, rows), "", VERDICT_MEANING, ""]
    lines += [
        "Intervals are Student t over checkpoint means (replicates averaged first); none is given "
        "under three checkpoints. Recovery is unclamped: below 0 % the model moved away from the "
        "healthy value, above 100 % it went past it.",
        "",
    ]
    sham_header, sham_rows = sham_table(summary)
    if sham_rows:
        lines += [
            "## Recovery against the sham",
            "",
            SHAM_NOTE,
            "",
            *_markdown_table(sham_header, sham_rows),
            "",
        ]
    lines += [line + "\n" for line in comparison_gaps(summary)]
    if summary.comparisons:
        lines += ["## HAEP against Gaussian noise", ""]
        lines += [_inline(f"- {comparison_sentence(m, summary)}") for m in summary.comparisons] + [
            ""
        ]
    if summary.slopes:
        lines += ["## Scaling with size", ""]
        lines += [
            f"- {arm}: {interval_text(slope.slope)} points per tenfold parameters"
            for arm, slope in summary.slopes.items()
        ]
        lines.append("")
    lines += _section("Where recovery is heading", prospect_rows(summary), PROSPECTS_NOTE)
    lines += _section("What would decide", plan_rows(summary), PLAN_NOTE)
    lines += _listing("Failed runs", summary.failed, "failure")
    lines += _listing("Runs without a defined rank recovery", summary.undefined, "undefined_reason")
    notes = [(g, n) for g in summary.groups for n in g.notes]
    if notes:
        lines += ["## What the data do not determine", ""]
        lines += [
            _inline(f"- {g.model} {group_label(g, summary.groups)}: {n}") for g, n in notes
        ] + [""]
    return "\n".join(lines)


def _inline(text: str) -> str:
    """Text that is one line and starts no HTML."""
    return " ".join(text.split()).replace("<", "&lt;")


def _section(title: str, table: tuple[list[str], list[list[str]]], note: str) -> list[str]:
    header, rows = table
    return [f"## {title}", "", *_markdown_table(header, rows), "", note, ""] if rows else []


def _listing(title: str, runs: Sequence[HealRun], reason: str) -> list[str]:
    return [f"## {title} ({len(runs)})", "", *_run_lines(runs, reason), ""] if runs else []


GROUP_FIELDS = (
    "model", "arm", "settings", "noise_match", "n_params", "n_runs", "n_checkpoints",
    "n_undefined", "n_lockout", "verdict", "verdict_loss", "notes",
)  # fmt: skip


def _intervals(found: Mapping[str, Interval]) -> dict[str, Any]:
    return {endpoint: dataclasses.asdict(interval) for endpoint, interval in found.items()}


def _trajectory(band: Band) -> dict[str, list[float]]:
    return {
        "step": [float(step) for step in band.steps],
        "mean": [i.point for i in band.intervals],
        "low": [i.low for i in band.intervals],
        "high": [i.high for i in band.intervals],
    }


def _half_times(half: HalfTimes) -> dict[str, Any]:
    return {
        "step": [h.time for h in half.times],
        "censored": [h.censored for h in half.times],
        "curve": {
            "step": half.curve.times.tolist(),
            "not_recovered": half.curve.probabilities.tolist(),
        },
    }


def _approach(found: Approach) -> dict[str, Any]:
    return {"converged": found.converged, **dataclasses.asdict(found)}


def _group_json(group: GroupSummary) -> dict[str, Any]:
    return {
        **{name: getattr(group, name) for name in GROUP_FIELDS},
        "spectral_states": dict(group.spectral_states),
        "statuses": dict(group.statuses),
        "checkpoint_means": {
            endpoint: dict(zip(map(str, means.labels), means.means.tolist(), strict=True))
            for endpoint, means in group.means.items()
        },
        "intervals": _intervals(group.intervals),
        "bootstrap": _intervals(group.bootstrap),
        "half_recovery_steps": _intervals(group.half_recovery),
        "half_times": {endpoint: _half_times(half) for endpoint, half in group.half_times.items()},
        "approach": {e: _approach(found) for e, found in group.approaches.items()},
        "required_checkpoints": {e: dataclasses.asdict(p) for e, p in group.plans.items()},
        "trajectory": {endpoint: _trajectory(band) for endpoint, band in group.bands.items()},
    }


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain data (``summary.json``)."""
    return {
        "confidence": summary.confidence,
        "groups": [_group_json(group) for group in summary.groups],
        "haep_minus_gaussian_noise": {
            m: dataclasses.asdict(c) for m, c in summary.comparisons.items()
        },
        "scaling": {arm: dataclasses.asdict(s) for arm, s in summary.slopes.items()},
        "failed": [{"run_id": r.run_id, "name": r.name, "why": r.failure} for r in summary.failed],
        "undefined": [
            {"run_id": r.run_id, "name": r.name, "why": r.undefined_reason}
            for r in summary.undefined
        ],
    }
