"""Stage ``summarize``: pool stored healing runs into recovery statistics, figures and tables."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from healing import html_report, paper, report, tracking
from healing.config import SHAM, as_params
from healing.experiment.attack import open_run, upload
from healing.experiment.console import Console
from healing.experiment.files import write_json
from healing.experiment.stored_runs import read_runs
from healing.experiment.summarize_legacy import is_legacy, summarize_imported
from healing.legacy_summary import LegacySummary
from healing.plots import groups as groups_figures
from healing.plots.style import COLUMN
from healing.pooling import GroupSummary, HealRun, Summary, summarize_runs
from healing.stage_config import SummarizeConfig
from healing.tracking import RunLogger, RunView, TrackingError
from healing.wording import group_label

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
        prefix = f"{group.model}-{group_label(group, summary.groups).replace(' #', '-')}"
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


def write_summary(folder: pathlib.Path, summary: Summary) -> None:
    """All files of a summary: tables, report, figures, and what a paper reads.

    Where no run finished there is nothing to draw and the figures are missing.
    """
    write_json(folder / "summary.json", report.as_json(summary))
    write_csv(folder / "summary.csv", report.group_rows(summary))
    (folder / "summary.md").write_text(report.markdown(summary))
    figures = _draw(folder / "figures", summary)
    (folder / "report.html").write_text(html_report.render(summary, figures), encoding="utf-8")
    place = folder / "paper"
    place.mkdir(exist_ok=True)
    (place / "recovery_table.tex").write_text(paper.table_file(summary), encoding="ascii")
    (place / "recovery_macros.tex").write_text(paper.macros_file(summary), encoding="ascii")
    subsection = paper.subsection_file(summary)
    (place / "addressing_irreversibility.tex").write_text(subsection, encoding="ascii")
    if summary.groups:
        groups_figures.mean_recovery(place / "fig_recovery", _drawn(summary), COLUMN)


def _drawn(summary: Summary) -> list[GroupSummary]:
    """The groups that figures show: a sham has no recovery by design, it would be a label alone."""
    return [g for g in summary.groups if g.arm != SHAM] or list(summary.groups)


def description(summary: Summary) -> str:
    """``summary.md`` as far as whole lines of it fit in a tag of MLflow."""
    return tracking.whole_lines(report.markdown(summary), "`summary.md`")


def _draw(folder: pathlib.Path, summary: Summary) -> dict[str, pathlib.Path]:
    """The figures that the summary allows: name → PNG."""
    drawn, groups = [], _drawn(summary)
    if groups:
        groups_figures.mean_recovery(folder / "mean_recovery", groups)
        groups_figures.final_recovery(folder / "final_recovery", groups)
        groups_figures.half_recovery(folder / "half_recovery", groups)
        groups_figures.recovery_against_parameters(folder / "recovery_against_parameters", groups)
        drawn += ["mean_recovery", "final_recovery", "half_recovery", "recovery_against_parameters"]
    if summary.comparisons:
        groups_figures.haep_against_noise(folder / "haep_against_noise", summary.comparisons)
        drawn.append("haep_against_noise")
    return {name: folder / f"{name}.png" for name in drawn}


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
        write_summary(folder, summary)
        upload(run, folder)
        run.tags(
            {"runs": len(runs), "failed_runs": len(summary.failed), **_verdicts(summary.groups)}
        )
        run.describe(description(summary))
        console.say("\n" + report.text_table(summary))
        for model in summary.comparisons:
            console.say(report.comparison_sentence(model, summary))
        for line in report.comparison_gaps(summary):
            console.say(line)
        for lost in summary.failed:
            console.say(f"failed: {lost.name}: {lost.failure}")
        console.say(f"summary → {folder}")
    return summary


def _verdicts(groups: Sequence[GroupSummary]) -> dict[str, str]:
    return {
        f"verdict.{g.model}.{group_label(g, groups).replace(' #', '-')}": g.verdict for g in groups
    }


def summarize_stage(config: SummarizeConfig) -> Summary | LegacySummary:
    """The entry point: this project's runs, or the predecessor's imported ones; never both."""
    return summarize_imported(config) if config.legacy else summarize(config)
