"""The part of ``summarize`` that reads the predecessor's imported runs, and those alone."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Callable, Sequence

from healing.config.fingerprint import as_params
from healing.config.summarize import SummarizeConfig
from healing.errors import TrackingError
from healing.predecessor import summary as legacy_summary
from healing.predecessor.records import LARGEST, SOURCE
from healing.predecessor.summary import LegacyResult, LegacySummary, summarize_legacy
from healing.reporting.escaping import csv_cell
from healing.stages.summarize import LEGACY_TAG, repeat_lines
from healing.stages.terminal.console import Console
from healing.tracking import open_runs, queries
from healing.tracking.output_folder import require_writable, run_folder, writing
from healing.tracking.queries import RunView
from healing.tracking.run_files import write_json
from healing.tracking.run_logger import RunLogger
from healing.tracking.store import MlflowStore

LEGACY_TAGS = {"source": SOURCE, LEGACY_TAG[0]: LEGACY_TAG[1]}
"""On every imported run; what carries the second is never pooled with other runs."""

LEGACY_RUNS = " and ".join(f"tags.{name} = '{value}'" for name, value in LEGACY_TAGS.items())


def read_result(view: RunView) -> LegacyResult:
    """An imported run as its summary sees it: from tags and metrics, no artifact is needed."""
    tags, metrics = view.tags, view.metrics
    return LegacyResult(
        run_id=view.run_id,
        name=view.name,
        kind=tags["kind"],
        model=tags["model"],
        arm=tags["arm"],
        optimizer=tags.get("optimizer", ""),
        precision=tags.get("precision", ""),
        results=tags["results_digest"],
        healthy_rank=metrics["legacy/healthy_rank"],
        collapsed_rank=metrics["legacy/collapsed_rank"],
        change_pct=metrics["legacy/rank_change_pct"],
        rederived_change_pct=metrics.get("rederived/rank_change_pct", math.nan),
        published_recovery_pct=metrics.get("legacy/rank_recovery_pct", math.nan),
        recovery_pct=metrics.get("legacy/unclamped_recovery_pct", math.nan),
        undefined_reason=tags.get("rank_undefined_reason", ""),
    )


def read_results(views: Sequence[RunView], note: Callable[[str], None]) -> list[LegacyResult]:
    """Imported runs; one that is not what an import leaves is told of and left out."""
    found = []
    for view in views:
        try:
            result = read_result(view)
        except KeyError as error:
            note(f"failed: {view.name}: it lacks the tag or metric {error}")
            continue
        required = (result.healthy_rank, result.collapsed_rank, result.change_pct)
        numbers = (*required, result.rederived_change_pct, result.published_recovery_pct)
        if any(map(math.isnan, required)) or any(abs(x) > LARGEST for x in numbers):
            note(f"failed: {view.name}: its ranks are missing, infinite or beyond {LARGEST:g}")
        else:
            found.append(result)
    return found


def find_results(
    config: SummarizeConfig, note: Callable[[str], None] = lambda _: None
) -> list[LegacyResult]:
    """The imported runs of the query.

    Raises:
        TrackingError: No such experiment, a bad filter, or nothing matches.
    """
    experiment = queries.find_experiment(config.experiment)
    query = LEGACY_RUNS + (f" and {config.filter}" if config.filter else "")
    found = queries.search(experiment, query, "--filter")
    # Summaries of imported runs carry the same tags, but no kind.
    views = [v for v in found if v.status == "FINISHED" and "kind" in v.tags]
    if not views:
        raise TrackingError(
            f"no imported runs match {query!r} in experiment {config.experiment or experiment}: "
            "run the import_results entry point first, or widen --filter"
        )
    return read_results(views, note)


def _log(run: RunLogger, summary: LegacySummary) -> None:
    numbers: dict[str, float] = {}
    for row in legacy_summary.group_rows(summary):
        name = "-".join(row[k] for k in ("model", "arm", "optimizer", "precision"))
        own = {k: v for k, v in row.items() if not isinstance(v, str) and not math.isnan(v)}
        numbers |= {f"legacy/{name}/{k}": v for k, v in own.items()}
    run.metrics(numbers)


def _write(folder: pathlib.Path, summary: LegacySummary) -> None:
    write_json(folder / "legacy_summary.json", legacy_summary.as_json(summary))
    (folder / "legacy_summary.md").write_text(legacy_summary.markdown(summary))
    rows = legacy_summary.group_rows(summary)
    if rows:
        with (folder / "legacy_summary.csv").open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows({k: csv_cell(v) for k, v in row.items()} for row in rows)


def summarize_imported(config: SummarizeConfig) -> LegacySummary:
    """Summarize the predecessor's imported runs; logged and stored as a run of its own.

    Raises:
        TrackingError: Nothing to summarize.
    """
    console = Console(config.verbosity)
    with open_runs.start("legacy summary", {"stage": "summarize", **LEGACY_TAGS}) as run:
        run.params("summarize", as_params(config))
        require_writable(config.output_dir)
        summary = summarize_legacy(find_results(config, console.say), config.confidence)
        folder = run_folder(config.output_dir, "summaries", run.run_id)
        with writing(folder):
            _write(folder, summary)
        for path in sorted(folder.iterdir()):
            run.artifact(path)
        _log(run, summary)
        run.describe("\n".join([*repeat_lines(config, run), legacy_summary.markdown(summary)]))
        console.say("\n" + legacy_summary.text(summary))
        console.say(f"files: {folder}")
    console.link(MlflowStore().page_of(run))
    return summary
