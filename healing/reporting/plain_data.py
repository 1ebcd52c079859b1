"""A summary as rows for CSV and as plain data for JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from healing.reporting.cautions import all_notes
from healing.reporting.contrasts import catalyst_sentence
from healing.reporting.phrases import RANK
from healing.reporting.tables import STATUS_LABELS
from healing.reporting.verdict_sentences import verdict_claim
from healing.statistics.budgets import Persistence
from healing.statistics.checkpoint_estimates import HalfTimes
from healing.statistics.contrasts.plan import Contrast, Pair
from healing.statistics.fits.asymptotes import Asymptotes
from healing.statistics.group import Band, GroupSummary
from healing.statistics.heal_runs import HealRun
from healing.statistics.intervals import Interval, scale_interval
from healing.statistics.summary import Summary
from healing.statistics.verdicts import GroupVerdict

PRIMARY = "effective_rank"
"""The primary measure among those of the panel."""


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
        "claim": verdict_claim(group),
        "tokens_per_step": group.tokens_per_step or "",
    }
    row |= dataclasses.asdict(group.damage)
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


def budget_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row per group, endpoint and budget, for CSV."""
    return [
        {
            **_names(group),
            "endpoint": endpoint,
            "step": point.step,
            "tokens": point.tokens or "",
            **_verdict_cells(point.verdict),
        }
        for group in summary.groups
        for endpoint, points in group.by_budget.items()
        for point in points
    ]


def panel_rows(summary: Summary) -> list[dict[str, Any]]:
    """One row per group and measure, the primary one first, for CSV."""
    return [
        {**_names(group), "measure": measure, "primary": measure == PRIMARY, **_verdict_cells(v)}
        for group in summary.groups
        for measure, v in {PRIMARY: group.verdicts[RANK], **group.panel}.items()
    ]


def _names(group: GroupSummary) -> dict[str, str]:
    return {"model": group.model, "arm": group.arm, "settings": group.settings}


def _verdict_cells(found: GroupVerdict) -> dict[str, Any]:
    return {
        "n": found.n,
        **_bounds("recovery_{}_pct", found.interval, "mean"),
        "verdict": found.verdict,
        "side": found.side or "",
        "n_on_side": found.n_on_side,
        "others_at_most": found.others_at_most,
        "missing": found.n_missing,
    }


def _bounds(pattern: str, interval: Interval, point: str = "") -> dict[str, float]:
    """Three columns: ``half_rank_recovery_steps``, ``…_steps_low``, ``…_steps_high``."""
    low, high = ("low", "high") if point else ("_low", "_high")
    return {
        pattern.format(point): interval.point,
        pattern.format(low): interval.low,
        pattern.format(high): interval.high,
    }


GROUP_FIELDS = (
    "model", "arm", "settings", "noise_match", "n_params", "n_runs", "n_checkpoints",
    "n_undefined", "n_lockout", "verdict", "verdict_loss", "healer", "notes",
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


def _persistence(found: Persistence | None) -> dict[str, Any] | None:
    return None if found is None else {"holds": found.holds, **dataclasses.asdict(found)}


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
        "claim": verdict_claim(group),
        "verdicts": {e: dataclasses.asdict(v) for e, v in group.verdicts.items()},
        "panel": {measure: dataclasses.asdict(v) for measure, v in group.panel.items()},
        "by_budget": {
            endpoint: [dataclasses.asdict(point) for point in points]
            for endpoint, points in group.by_budget.items()
        },
        "persistence": _persistence(group.persistence),
        "damage": dataclasses.asdict(group.damage),
        "scratch": None if group.scratch is None else dataclasses.asdict(group.scratch),
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


def _pair_json(pair: Pair) -> dict[str, str]:
    return {
        "model": pair.model,
        "treatment": pair.treatment.arm,
        "control": pair.control.arm,
        "kind": pair.kind.name,
        "rank": pair.kind.rank,
        "family": pair.kind.family,
    }


def _contrast_json(found: Contrast) -> dict[str, Any]:
    half_recovery_test = {
        endpoint: dataclasses.asdict(test) for endpoint, test in found.half_recovery_test.items()
    }
    return {
        **_pair_json(found.pair),
        **dataclasses.asdict(found.comparison),
        "start_treatment": dataclasses.asdict(found.starts[0]),
        "start_control": dataclasses.asdict(found.starts[1]),
        "rank_reduction": {**dataclasses.asdict(found.reach), "reached": found.reach.reached},
        "pairs_needed": {e: dataclasses.asdict(n) for e, n in found.needed.items()},
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
        "catalyst": [
            {
                "model": answer.pair.model,
                "treatment": answer.pair.treatment.arm,
                "healing": answer.healing,
                "attack_reached_by": [c.pair.control.arm for c in answer.reached],
                "sentence": catalyst_sentence(answer),
            }
            for answer in summary.catalyst
        ],
        "contrasts": [_contrast_json(found) for found in summary.contrasts],
        "not_compared": [{**_pair_json(gap.pair), "why": gap.why} for gap in summary.gaps],
        "recovery_against_damage": {
            m: dataclasses.asdict(found) for m, found in summary.damage.items()
        },
        "scaling": {arm: dataclasses.asdict(s) for arm, s in summary.slopes.items()},
        "failed": _run_records((r, r.failure) for r in summary.failed),
        "running": _run_records((r, r.heard or "no end is stored") for r in summary.running),
        "repeats": [
            {**entry, "counted_run_id": r.kept.run_id}
            for entry, r in zip(
                _run_records((r.run, r.why) for r in summary.repeats), summary.repeats, strict=True
            )
        ],
        "undefined": _run_records((r, r.undefined_reason) for r in summary.undefined),
        "notes": [{"of": where, "note": note} for where, note in all_notes(summary)],
    }
