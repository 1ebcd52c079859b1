"""Stage ``summarize``: pool stored healing runs into recovery statistics, figures and tables."""

from __future__ import annotations

import csv
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from healing.config.fingerprint import as_params
from healing.config.summarize import SummarizeConfig
from healing.errors import TrackingError
from healing.registry import SHAM
from healing.reporting import html as html_report
from healing.reporting import markdown as report
from healing.reporting import paper, plain_data, run_page, tables
from healing.reporting.contrasts import comparison_gaps, comparison_sentence, lead_sentences
from healing.reporting.escaping import csv_cell, one_line
from healing.reporting.phrases import group_label, headline_groups
from healing.reporting.plots import contrasts as contrasts_figure
from healing.reporting.plots import groups as groups_figures
from healing.reporting.plots.damage import recovery_against_damage
from healing.reporting.plots.style import COLUMN, SANS, figure_style, for_a_page
from healing.reporting.verdict_context import lead_sentence
from healing.reporting.verdict_sentences import verdict_heading, verdict_reason
from healing.stages.driver import Driver
from healing.stages.stage import upload
from healing.stages.summarize_inputs import read_runs
from healing.stages.terminal.console import Console
from healing.statistics.group import GroupSummary
from healing.statistics.heal_runs import HealRun
from healing.statistics.paired_tests import PRIMARY_ENDPOINTS
from healing.statistics.summary import Summary, sizes_of, summarize_runs
from healing.tracking import queries
from healing.tracking.git_version import checkout
from healing.tracking.output_folder import require_writable, run_folder, writing
from healing.tracking.page_text import whole_lines
from healing.tracking.queries import RunView
from healing.tracking.run import Run
from healing.tracking.run_files import write_json

HEAL_RUNS = "tags.stage = 'heal'"
LEGACY_TAG = ("legacy_metrics", "true")
"""On every run that was measured with another instrument: it is never pooled with other runs."""
BOOTSTRAP_SEED = 0
KEY_LENGTH = 150
"""Characters of a group in the name of a metric, which may have 250 in all."""


def is_legacy(view: RunView) -> bool:
    """Whether a stored run was measured with the predecessor's instrument."""
    name, value = LEGACY_TAG
    return view.tags.get(name) == value


def find_runs(config: SummarizeConfig) -> list[RunView]:
    """The healing runs of the query; parents of several runs are not runs themselves, and runs
    measured with the predecessor's instrument are never among them.

    Raises:
        TrackingError: No such experiment, a bad filter, or nothing matches.
    """
    experiment = queries.find_experiment(config.experiment)
    query = HEAL_RUNS + (f" and {config.filter}" if config.filter else "")
    found = queries.search(experiment, query, "--filter")
    views = [v for v in found if v.tags.get("role") != "parent" and not is_legacy(v)]
    if not views:
        raise TrackingError(
            f"no healing runs match {query!r} in experiment {config.experiment or experiment}: "
            "run the heal entry point first, or widen --filter"
        )
    return views


def _log_groups(run: Run, summary: Summary) -> None:
    """Final numbers per group, and mean trajectories with their bounds, as metrics."""
    history: list[tuple[int, Mapping[str, float]]] = []
    for group in summary.groups:
        prefix = _key(group, summary.groups, "-")
        numbers: dict[str, float] = {"runs": group.n_runs, "checkpoints": group.n_checkpoints}
        for endpoint, interval in group.intervals.items():
            numbers |= _bounds(endpoint, interval.point, interval.low, interval.high)
        history.append((0, {f"final/{prefix}/{k}": v for k, v in numbers.items()}))
        for endpoint, band in group.bands.items():
            for step, i in zip(band.steps, band.intervals, strict=True):
                values = _bounds(endpoint, i.point, i.low, i.high)
                history.append((step, {f"mean/{prefix}/{k}": v for k, v in values.items()}))
    run.history([(s, {k: v for k, v in row.items() if not math.isnan(v)}) for s, row in history])


def group_metrics(summary: Summary) -> list[tuple[int, dict[str, float]]]:
    """What compares summaries: means with their bounds by group, and by arm over model sizes.

    ``group/MODEL-ARM/ENDPOINT_mean`` is at step 0. ``size/ARM/ENDPOINT_mean`` has the number of
    parameters for its step, so that its chart is recovery against size; an arm is there where each
    of its sizes has one group.
    """
    points: list[tuple[int, dict[str, float]]] = []
    for group in summary.groups:
        prefix = f"group/{_key(group, summary.groups, '-')}"
        numbers: dict[str, float] = {f"{prefix}/checkpoints": group.n_checkpoints}
        points.append((0, numbers | _primary(group, prefix)))
    for arm in dict.fromkeys(g.arm for g in summary.groups):
        own, one_each = sizes_of(summary.groups, arm)
        if one_each:
            points += [(g.n_params, _primary(g, f"size/{_safe_name(arm)}")) for g in own]
    return points


def _primary(group: GroupSummary, prefix: str) -> dict[str, float]:
    found: dict[str, float] = {}
    for endpoint in PRIMARY_ENDPOINTS:
        i = group.intervals[endpoint]
        found |= _bounds(f"{prefix}/{endpoint}", i.point, i.low, i.high)
    return {name: value for name, value in found.items() if math.isfinite(value)}


MAIN_FIGURES = ("mean_recovery", "final_recovery", "recovery_against_parameters")
OVERVIEW = "overview.png"
"""The first of them as large as a page shows it."""


def show_summary(run: Run, summary: Summary, folder: pathlib.Path) -> None:
    """What a sweep's own run has of its summary: numbers, the table, the main figures.

    Args:
        run: Of the sweep.
        summary: Of its healing runs.
        folder: That holds the summary's files.
    """
    run.history(group_metrics(summary))
    _log_table(run, summary)
    paths = [folder / "figures" / f"{name}.png" for name in MAIN_FIGURES]
    for path, place in [*((path, "figures") for path in paths), (folder / OVERVIEW, None)]:
        if path.is_file():
            run.artifact(path, place)


def _log_table(run: Run, summary: Summary) -> None:
    table = tables.main_table(summary)
    if table.rows:
        cells = zip(*table.rows, strict=True)
        run.table("summary_table", dict(zip(table.header, map(list, cells), strict=True)))


def _bounds(name: str, point: float, low: float, high: float) -> dict[str, float]:
    return {f"{name}_mean": point, f"{name}_low": low, f"{name}_high": high}


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line per group; a column that some groups lack is empty there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(name for row in rows for name in row)) or ["model"]
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)


def write_summary(folder: pathlib.Path, summary: Summary) -> None:
    """All files of a summary: tables, report, figures, and what a paper reads.

    Where no run finished there is nothing to draw and the figures are missing.
    """
    write_json(folder / "summary.json", plain_data.as_json(summary))
    write_csv(folder / "summary.csv", plain_data.group_rows(summary))
    write_csv(folder / "budgets.csv", plain_data.budget_rows(summary))
    write_csv(folder / "measures.csv", plain_data.panel_rows(summary))
    (folder / "summary.md").write_text(report.markdown(summary), encoding="utf-8")
    figures = _draw(folder / "figures", summary)
    if "mean_recovery" in figures:
        for_a_page(figures["mean_recovery"], folder / OVERVIEW)
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
    return [g for g in summary.groups if g.role != SHAM] or list(summary.groups)


def description(summary: Summary, run_id: str = "", repeat: Sequence[str] = ()) -> str:
    """What came out, the main figure, and ``summary.md`` as far as whole lines fit in a tag.

    Args:
        summary: To describe.
        run_id: Of the run that holds the figure; empty = none does.
        repeat: Lines on how to summarize again.
    """
    first = f"{report.opening(summary)}\n\n" if summary.groups else ""
    image = f"![mean recovery](runs:/{run_id}/{OVERVIEW})\n\n" if run_id else ""
    text = first + image + "".join(f"{line}\n" for line in repeat) + report.markdown(summary)
    # The address grows where the store makes it one that the UI opens.
    return whole_lines(text, "`summary.md`", spare=200)


def repeat_lines(config: SummarizeConfig, run: Run) -> list[str]:
    """The command that summarizes the same runs of the same experiment."""
    style = "" if config.figure_style == SANS else config.figure_style
    experiment = config.experiment or run.experiment_id
    options = run_page.settings(config, experiment=experiment, figure_style=style)
    note = "It reads the runs that the store (MLFLOW_TRACKING_URI) holds then."
    return run_page.repeat("summarize", options, checkout(), note)


def _draw(folder: pathlib.Path, summary: Summary) -> dict[str, pathlib.Path]:
    """The figures that the summary allows: name → PNG."""
    drawn, groups = [], _drawn(summary)
    if groups:
        groups_figures.mean_recovery(folder / "mean_recovery", groups)
        groups_figures.final_recovery(folder / "final_recovery", groups)
        groups_figures.half_recovery(folder / "half_recovery", groups)
        groups_figures.recovery_against_parameters(folder / "recovery_against_parameters", groups)
        drawn += ["mean_recovery", "final_recovery", "half_recovery", "recovery_against_parameters"]
    if summary.contrasts:
        contrasts_figure.contrasts(folder / "contrasts", summary.contrasts)
        drawn.append("contrasts")
    if summary.damage:
        recovery_against_damage(folder / "recovery_against_damage", summary.damage)
        drawn.append("recovery_against_damage")
    return {name: folder / f"{name}.png" for name in drawn}


def summarize(config: SummarizeConfig, **options: Any) -> Summary:
    """As :func:`summarized`, for the summary alone."""
    return summarized(config, **options)[0]


def summarized(
    config: SummarizeConfig,
    *,
    views: list[RunView] | None = None,
    failed: Sequence[HealRun] = (),
    parent: Run | None = None,
    driver: Driver | None = None,
) -> tuple[Summary, pathlib.Path, str]:
    """Pool healing runs, log and store the result as a run of its own.

    Args:
        config: Query and confidence level.
        views: The runs to pool; ``None`` = those of the query.
        failed: What should have become a run and did not; listed with the failed runs.
        parent: The run that the summary is a child of.
        driver: Where to print and to log; ``None`` = by the configured verbosity, to MLflow.

    Returns:
        The summary, the folder of its files, and the id of its run.
    """
    driver = driver or Driver(Console(config.verbosity))
    console = driver.console
    title, tags = "summary", {"stage": "summarize"}
    opened = (
        driver.process(title, tags, config.output_dir)
        if parent is None
        else driver.store.child(parent, title, tags)
    )
    with opened as run:
        run.params("summarize", as_params(config))
        require_writable(config.output_dir)
        with console.waiting("reading the healing runs"):
            if views is None:
                driver.store.catch_up()
            found = find_runs(config) if views is None else views
            runs = read_runs(found, console.say, driver.store)
        runs += failed
        with console.waiting(f"statistics of {len(runs)} runs"):
            draws = np.random.default_rng(BOOTSTRAP_SEED)
            summary = summarize_runs(runs, config.confidence, draws)
        folder = run_folder(config.output_dir, "summaries", run.run_id)
        with console.waiting("tables, figures and a report"), writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _log_groups(run, summary)
            run.history([(step, row) for step, row in group_metrics(summary) if step])
            with figure_style(config.figure_style):
                write_summary(folder, summary)
        with console.waiting("uploading"):
            upload(run, folder)
            _log_table(run, summary)
        run.tags(
            {
                "runs": len(runs),
                "failed_runs": len(summary.failed),
                "running_runs": len(summary.running),
                "repeated_runs": len(summary.repeats),
                **_verdicts(summary.groups),
            }
        )
        repeat = repeat_lines(config, run) if parent is None and views is None else ()
        run.describe(description(summary, run.run_id if summary.groups else "", repeat))
        console.say("\n" + tables.text_table(summary))
        for group in headline_groups(summary):
            console.say(
                one_line(f"{verdict_heading(group, summary.groups)}: {verdict_reason(group)}.")
            )
        if lead := lead_sentence(summary):
            console.say(one_line(lead))
        said = map(comparison_sentence, summary.contrasts)
        for line in (*lead_sentences(summary), *said, *comparison_gaps(summary)):
            console.say(one_line(line))
        for line in _left_out(summary):
            console.say(one_line(line))
        console.say(f"files: {folder}")
    return summary, folder, run.run_id


def _where(run: HealRun) -> str:
    return f"{run.run_id}, {run.heard}" if run.heard else run.run_id


def _left_out(summary: Summary) -> list[str]:
    return [
        *(f"failed: {run.name}: {run.failure}" for run in summary.failed),
        *(f"still running, or killed: {run.name} ({_where(run)})" for run in summary.running),
        *(f"not counted: {r.run.name} ({r.run.run_id}) {r.why}" for r in summary.repeats),
    ]


def _verdicts(groups: Sequence[GroupSummary]) -> dict[str, str]:
    return {f"verdict.{_key(g, groups, '.')}": g.verdict for g in groups}


def _key(group: GroupSummary, groups: Sequence[GroupSummary], between: str) -> str:
    """Model and arm in characters that MLflow takes in the name of a metric or tag."""
    text = f"{group.model}{between}{group_label(group, groups).replace(' #', '-')}"
    return _safe_name(text)


def _safe_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]", "_", text)[:KEY_LENGTH]
