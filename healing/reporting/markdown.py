"""A summary as Markdown for people, and as rows and plain data for CSV and JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from healing.reporting.escaping import markdown as escape
from healing.reporting.phrases import (
    group_label,
    headline_groups,
    healer_note,
    interval_text,
    verdict_text,
)
from healing.reporting.tables import STATUS_LABELS, Table, main_table, secondary_tables
from healing.reporting.treatment_against_control import (
    comparison_gaps,
    contrast_sentences,
    pair_title,
)
from healing.statistics.checkpoint_estimates import Asymptotes, HalfTimes
from healing.statistics.heal_runs import HealRun
from healing.statistics.intervals import Interval, scale_interval
from healing.statistics.summary import Band, GroupSummary, Summary
from healing.statistics.treatment_against_control import Contrast

RUNNING_NOTE = (
    "The store does not say that these have ended: they are still running, or were killed so hard "
    "that nothing could be stored any more (MLflow keeps such a run RUNNING). They are not counted."
)
REPEATS_NOTE = (
    "Equal fingerprint: equal configuration, weights, texts and code. The newest finished run of "
    "each counts, the others are no replicates."
)


def group_rows(summary: Summary) -> list[dict[str, Any]]:
    """One flat row per group, for CSV."""
    return [_group_row(group) for group in summary.groups]


def _group_row(group: GroupSummary) -> dict[str, Any]:
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
        "tokens_per_step": group.tokens_per_step or "",
    }
    for endpoint, interval in group.intervals.items():
        name = endpoint.removesuffix("_pct")
        row |= {f"{name}_n": interval.n, **_bounds(f"{name}_{{}}_pct", interval, "mean")}
        row[f"{name}_undefined_checkpoints"] = group.undefined_checkpoints(endpoint)
        bca = group.bootstrap.get(endpoint)
        if bca is not None and bca.defined:
            row |= {f"{name}_bca_low_pct": bca.low, f"{name}_bca_high_pct": bca.high}
    for endpoint, interval in group.half_recovery.items():
        name = f"half_{endpoint.removesuffix('_pct')}"
        row |= _bounds(f"{name}_steps{{}}", interval)
        if endpoint in group.half_recovery_tokens:
            row |= _bounds(f"{name}_tokens{{}}", group.half_recovery_tokens[endpoint])
    for endpoint, found in group.variance.items():
        name = endpoint.removesuffix("_pct")
        row |= {
            f"{name}_variance_between": found.between,
            f"{name}_variance_within": found.within,
            f"{name}_icc": found.icc,
        }
    return row


def _bounds(pattern: str, interval: Interval, point: str = "") -> dict[str, float]:
    """Three columns: ``half_rank_recovery_steps``, ``…_steps_low``, ``…_steps_high``."""
    low, high = ("low", "high") if point else ("_low", "_high")
    return {
        pattern.format(point): interval.point,
        pattern.format(low): interval.low,
        pattern.format(high): interval.high,
    }


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def _section(table: Table) -> list[str]:
    divider = f"|{'---|' * len(table.header)}"
    rows = [_row(row) for row in table.rows]
    return [f"## {table.title}", "", _row(table.header), divider, *rows, "", table.note, ""]


def _bullets(sentences: Iterable[str]) -> list[str]:
    return [f"- {escape(sentence)}" for sentence in sentences]


def _listing(title: str, runs: Sequence[tuple[HealRun, str]], note: str = "") -> list[str]:
    if not runs:
        return []
    lines = _bullets(f"{r.name} ({r.run_id}){': ' if why else ''}{why}" for r, why in runs)
    return [f"## {title} ({len(runs)})", "", *([note, ""] if note else []), *lines, ""]


def markdown(summary: Summary) -> str:
    """The summary for people (``summary.md``)."""
    lines = ["# Recovery summary", ""]
    lines += _bullets(verdict_text(g, summary.groups) for g in headline_groups(summary))
    if not summary.groups:
        lines += ["No finished runs: nothing can be said."]
    if note := healer_note(summary):
        lines += ["", note]
    lines += ["", *_section(main_table(summary))[2:]]
    lines += [
        "Intervals are Student t over checkpoint means (replicates averaged first); none is given "
        "under three checkpoints. *n* counts the checkpoints that an interval rests on; those "
        "whose recovery is undefined are stated beside it. Recovery is unclamped: below 0 % the "
        "model moved away from the healthy value, above 100 % it went past it.",
        "",
    ]
    contrasts = _bullets([*contrast_sentences(summary), *comparison_gaps(summary)])
    if contrasts:
        lines += [f"## {escape(pair_title(summary))}", "", *contrasts, ""]
    if summary.slopes:
        slopes = _bullets(
            f"{arm}: {interval_text(slope.slope)} points per tenfold parameters"
            for arm, slope in summary.slopes.items()
        )
        lines += ["## Scaling with size", "", *slopes, ""]
    for table in secondary_tables(summary):
        lines += _section(table)
    lines += _listing("Failed runs", [(r, r.failure) for r in summary.failed])
    lines += _listing("Still running", [(r, "") for r in summary.running], RUNNING_NOTE)
    lines += _listing("Repeated runs", [(r.run, r.why) for r in summary.repeats], REPEATS_NOTE)
    undefined = [(r, r.undefined_reason) for r in summary.undefined]
    lines += _listing("Runs without a defined rank recovery", undefined)
    notes = all_notes(summary)
    if notes:
        lines += ["## What the data do not determine", ""]
        lines += [*_bullets(f"{where}: {what}" for where, what in notes), ""]
    return "\n".join(lines)


def all_notes(summary: Summary) -> list[tuple[str, str]]:
    """Of what the data do not determine something, and the named warning that says so."""
    own = [
        (f"{g.model} {group_label(g, summary.groups)}", note)
        for g in summary.groups
        for note in g.notes
    ]
    return [*own, *summary.notes]


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


def _half_times(half: HalfTimes, tokens_per_step: int) -> dict[str, Any]:
    record: dict[str, Any] = {
        "step": [h.time for h in half.times],
        "censored": [h.censored for h in half.times],
        "curve": {
            "step": half.curve.times.tolist(),
            "not_recovered": half.curve.probabilities.tolist(),
        },
        "geometric_mean_steps": dataclasses.asdict(half.geometric_mean),
    }
    if tokens_per_step:
        mean = scale_interval(half.geometric_mean, tokens_per_step)
        record["tokens"] = [h.time * tokens_per_step for h in half.times]
        record["geometric_mean_tokens"] = dataclasses.asdict(mean)
    return record


def _asymptotes(found: Asymptotes) -> dict[str, Any]:
    return {"converged": found.converged, **dataclasses.asdict(found)}


def _group_json(group: GroupSummary) -> dict[str, Any]:
    per_step = group.tokens_per_step
    return {
        **{name: getattr(group, name) for name in GROUP_FIELDS},
        "spectral_states": dict(group.spectral_states),
        "statuses": dict(group.statuses),
        "tokens_per_step": per_step or None,
        "checkpoint_means": {
            endpoint: dict(zip(map(str, means.labels), means.means.tolist(), strict=True))
            for endpoint, means in group.means.items()
        },
        "undefined_checkpoints": {e: group.undefined_checkpoints(e) for e in group.means},
        "intervals": _intervals(group.intervals),
        "bootstrap": _intervals(group.bootstrap),
        "variance_components": {e: dataclasses.asdict(v) for e, v in group.variance.items()},
        "half_recovery_steps": _intervals(group.half_recovery),
        "half_recovery_tokens": _intervals(group.half_recovery_tokens),
        "half_times": {e: _half_times(half, per_step) for e, half in group.half_times.items()},
        "approach": {e: _asymptotes(found) for e, found in group.asymptotes.items()},
        "required_checkpoints": {e: dataclasses.asdict(p) for e, p in group.plans.items()},
        "trajectory": {endpoint: _trajectory(band) for endpoint, band in group.bands.items()},
    }


def _contrast_json(found: Contrast) -> dict[str, Any]:
    half_recovery_test = {
        endpoint: dataclasses.asdict(test) for endpoint, test in found.half_recovery_test.items()
    }
    return {
        **dataclasses.asdict(found.comparison),
        "half_recovery_logrank": half_recovery_test,
        "notes": found.notes,
    }


def _run_records(runs: Iterable[tuple[HealRun, str]]) -> list[dict[str, str]]:
    return [{"run_id": run.run_id, "name": run.name, "why": why} for run, why in runs]


def as_json(summary: Summary) -> dict[str, Any]:
    """The summary as plain data (``summary.json``)."""
    return {
        "confidence": summary.confidence,
        "groups": [_group_json(group) for group in summary.groups],
        "haep_minus_gaussian_noise": {m: _contrast_json(c) for m, c in summary.contrasts.items()},
        "not_compared": {m: gap.why for m, gap in summary.gaps.items()},
        "scaling": {arm: dataclasses.asdict(s) for arm, s in summary.slopes.items()},
        "failed": _run_records((r, r.failure) for r in summary.failed),
        "running": _run_records((r, "no end is stored") for r in summary.running),
        "repeats": [
            {**entry, "counted_run_id": r.kept.run_id}
            for entry, r in zip(
                _run_records((r.run, r.why) for r in summary.repeats), summary.repeats, strict=True
            )
        ],
        "undefined": _run_records((r, r.undefined_reason) for r in summary.undefined),
        "notes": [{"of": where, "note": note} for where, note in all_notes(summary)],
    }
