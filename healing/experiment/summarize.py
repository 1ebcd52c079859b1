"""Stage ``summarize``: pool stored healing runs into recovery statistics, figures and tables."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from healing import report, tracking
from healing.config import SummarizeConfig, as_params
from healing.experiment.attack import open_run
from healing.experiment.console import Console
from healing.experiment.files import write_json
from healing.experiment.stored_runs import read_runs
from healing.experiment.summarize_legacy import is_legacy, summarize_imported
from healing.legacy_summary import LegacySummary
from healing.plots import groups as groups_figures
from healing.pooling import GroupSummary, HealRun, Summary, summarize_runs
from healing.tracking import RunLogger, RunView, TrackingError

HEAL_RUNS = "tags.stage = 'heal'"
BOOTSTRAP_SEED = 0


def find_runs(config: SummarizeConfig) -> list[RunView]:
    """The healing runs of the query; parents of several runs are not runs themselves, and runs
    measured with the predecessor's instrument are never among them.

    Raises:
        TrackingError: No such experiment, a bad filter, or nothing matches.
    """
    experiment = tracking.find_experiment(config.experiment)
    query = HEAL_RUNS + (f" and {config.filter}" if config.filter else "")
    found = tracking.search(experiment, query)
    views = [v for v in found if v.tags.get("role") != "parent" and not is_legacy(v)]
    if not views:
        raise TrackingError(
            f"no healing runs match {query!r} in experiment {config.experiment or experiment}: "
            "run the heal entry point first, or widen --filter"
        )
    return views


def _log_groups(run: RunLogger, summary: Summary) -> None:
    """Final numbers per group, and mean trajectories with their bounds, as metrics."""
    history: list[tuple[int, Mapping[str, float]]] = []
    for group in summary.groups:
        prefix = f"{group.model}-{report.group_label(group, summary.groups).replace(' #', '-')}"
        numbers: dict[str, float] = {"runs": group.n_runs, "checkpoints": group.n_checkpoints}
        for endpoint, interval in group.intervals.items():
            numbers |= _bounds(endpoint, interval.point, interval.low, interval.high)
        history.append((0, {f"final/{prefix}/{k}": v for k, v in numbers.items()}))
        for endpoint, band in group.bands.items():
            for step, i in zip(band.steps, band.intervals, strict=True):
                values = _bounds(endpoint, i.point, i.low, i.high)
                history.append((step, {f"mean/{prefix}/{k}": v for k, v in values.items()}))
    run.history([(s, {k: v for k, v in row.items() if not math.isnan(v)}) for s, row in history])


def _bounds(name: str, point: float, low: float, high: float) -> dict[str, float]:
    return {f"{name}_mean": point, f"{name}_low": low, f"{name}_high": high}


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per group."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]) if rows else ["model"])
        writer.writeheader()
        writer.writerows(rows)


def _write(folder: pathlib.Path, summary: Summary) -> list[pathlib.Path]:
    write_json(folder / "summary.json", report.as_json(summary))
    write_csv(folder / "summary.csv", report.group_rows(summary))
    (folder / "summary.md").write_text(report.markdown(summary))
    if summary.groups:
        groups_figures.mean_recovery(folder / "mean_recovery.png", summary.groups)
        groups_figures.final_recovery(folder / "final_recovery.png", summary.groups)
        groups_figures.recovery_against_parameters(
            folder / "recovery_against_parameters.png", summary.groups
        )
    return sorted(p for p in folder.iterdir() if p.is_file())


def summarize(
    config: SummarizeConfig,
    *,
    views: list[RunView] | None = None,
    failed: Sequence[HealRun] = (),
    parent: RunLogger | None = None,
    console: Console | None = None,
) -> Summary:
    """Pool healing runs, log and store the result as a run of its own.

    Args:
        config: Query and confidence level.
        views: The runs to pool; ``None`` = those of the query.
        failed: What should have become a run and did not; listed with the failed runs.
        parent: The run that the summary is a child of.
        console: Where to print; ``None`` = by the configured verbosity.
    """
    console = console or Console(config.verbosity)
    with open_run(parent, "summary", {"stage": "summarize"}) as run:
        run.params("summarize", as_params(config))
        runs = read_runs(find_runs(config) if views is None else views, console.say)
        runs += failed
        summary = summarize_runs(runs, config.confidence, np.random.default_rng(BOOTSTRAP_SEED))
        folder = pathlib.Path(config.output_dir).expanduser().resolve() / "summaries" / run.run_id
        folder.mkdir(parents=True, exist_ok=True)
        _log_groups(run, summary)
        for path in _write(folder, summary):
            run.artifact(path)
        run.tags(
            {"runs": len(runs), "failed_runs": len(summary.failed), **_verdicts(summary.groups)}
        )
        run.describe(report.markdown(summary))
        console.say("\n" + report.text_table(summary))
        for model in summary.comparisons:
            console.say(report.comparison_sentence(model, summary))
        for lost in summary.failed:
            console.say(f"failed: {lost.name}: {lost.failure}")
        console.say(f"summary → {folder}")
    return summary


def _verdicts(groups: Sequence[GroupSummary]) -> dict[str, str]:
    return {
        f"verdict.{g.model}.{report.group_label(g, groups).replace(' #', '-')}": g.verdict
        for g in groups
    }


def summarize_stage(config: SummarizeConfig) -> Summary | LegacySummary:
    """The entry point: this project's runs, or the predecessor's imported ones; never both."""
    return summarize_imported(config) if config.legacy else summarize(config)
