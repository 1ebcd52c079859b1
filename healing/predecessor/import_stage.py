"""Stage ``import_results``: the predecessor's recorded runs into MLflow, as runs of their own."""

from __future__ import annotations

import math
import pathlib
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from healing.config.fingerprint import as_params
from healing.config.import_results import ImportConfig
from healing.config.paths import local_path
from healing.errors import TrackingError
from healing.predecessor import records as legacy
from healing.predecessor.records import LegacyError, LegacyRun
from healing.predecessor.summarize_stage import LEGACY_RUNS, LEGACY_TAGS
from healing.stages.terminal.console import Console
from healing.tracking import open_runs, queries
from healing.tracking.output_folder import require_writable, run_folder, writing
from healing.tracking.run_files import write_json
from healing.tracking.run_logger import RunLogger
from healing.tracking.store import MlflowStore

STAGE = "import_results"


@dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        new: Runs read into MLflow.
        known: Runs that were there before.
        skipped: One line for each recorded run that could not be read.
    """

    new: tuple[LegacyRun, ...]
    known: tuple[LegacyRun, ...]
    skipped: tuple[str, ...]


def derive_numbers(run: LegacyRun) -> dict[str, float]:
    """Numbers of a run that follow from its records, logged once under their own names."""
    damage = run.damage
    numbers = {
        "legacy/healthy_rank": damage.healthy.effective_rank,
        "legacy/collapsed_rank": damage.collapsed.effective_rank,
        "legacy/rank_change_pct": run.rank_change_pct,
        "rederived/rank_change_pct": run.rederived_change_pct,
        "legacy/unclamped_recovery_pct": run.unclamped_recovery_pct,
        **{f"legacy/{name}": value for name, value in run.summary.items()},
    }
    for state, prefix in legacy.STATES.items():
        stored = getattr(run, state)
        if stored:
            found = asdict(legacy.rederive(stored))
            numbers |= {f"rederived/{state}_{name}": value for name, value in found.items()}
            recorded = run.recorded(f"{prefix}_effective_rank")
            difference = legacy.legacy_effective_rank(stored) / recorded - 1.0
            numbers[f"rederived/{state}_formula_difference"] = difference
    return {name: value for name, value in numbers.items() if not math.isnan(value)}


def tags_of(run: LegacyRun) -> dict[str, Any]:
    """Tags that mark an imported run and say what it is."""
    return {
        **LEGACY_TAGS,
        "stage": STAGE,
        "kind": run.kind,
        "model": run.model,
        "arm": run.arm,
        "optimizer": run.optimizer,
        "precision": run.precision,
        "study": run.study,
        "folder": run.folder.name,
        "fingerprint": run.fingerprint,
        "results_digest": run.results,
        **({"rank_undefined_reason": run.undefined_reason} if run.undefined_reason else {}),
    }


def describe(run: LegacyRun) -> str:
    """Markdown description of an imported run."""
    damage = run.damage
    rows = [f"| effective rank, as recorded | {damage.healthy.effective_rank:.4f} | "
            f"{damage.collapsed.effective_rank:.4f} | {run.rank_change_pct:+.2f} % |"]  # fmt: skip
    if run.healthy and run.collapsed:
        healthy, collapsed = (
            legacy.rederive(v).effective_rank for v in (run.healthy, run.collapsed)
        )
        rows.append(
            f"| effective rank, all singular values | {healthy:.2f} | {collapsed:.2f} | "
            f"{run.rederived_change_pct:+.2f} % |"
        )
    rows.append(
        f"| perplexity, as recorded | {damage.healthy.perplexity:.4g} | "
        f"{damage.collapsed.perplexity:.4g} | |"
    )
    lines = [
        f"Recorded by NeuroEntropy, imported from `{run.name}`; not comparable with runs of this "
        "project.",
        "",
        "| | before the attack | after | change |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    if run.kind == "heal":
        why = f"undefined: {run.undefined_reason}" if run.undefined_reason else "defined"
        lines += [
            f"Rank recovery: {run.summary['rank_recovery_pct']:.2f} % as recorded (clamped), "
            f"{run.unclamped_recovery_pct:.2f} % by the formula; {why}.",
            "",
        ]
    lines.append("What these records do not determine:")
    lines += [f"- {what}: {why}" for what, why in legacy.NOT_REDERIVABLE.items()]
    return "\n".join(lines)


def import_run(parent: RunLogger, run: LegacyRun) -> None:
    """One recorded run as a child, with its own times, numbers and files."""
    with open_runs.child(
        parent, run.name, tags_of(run), start_ms=run.start_ms, end_ms=run.end_ms
    ) as logger:
        logger.params("legacy", {**run.params, "model": run.model, "arm": run.arm})
        points = [
            (p.step, p.time_ms, {f"legacy/{name}": v for name, v in p.metrics.items()})
            for p in run.points
        ]
        last = max(p.step for p in run.points)
        logger.recorded([*points, (last, run.end_ms, derive_numbers(run))])
        logger.describe(describe(run))
        for name in (legacy.CONFIG, legacy.METRICS, legacy.SUMMARY):
            if (run.folder / name).is_file():
                logger.artifact(run.folder / name)
        if run.healthy or run.collapsed:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder) / "singular_values.json"
                logger.artifact(
                    write_json(path, {"healthy": run.healthy, "collapsed": run.collapsed})
                )


def read_all(root: pathlib.Path) -> tuple[list[LegacyRun], list[str]]:
    """Every recorded run below a folder, and one line for each that cannot be read.

    Raises:
        LegacyError: No such folder, or nothing in it.
    """
    runs, skipped = [], []
    for folder in legacy.find_folders(root):
        try:
            run = legacy.read_run(folder, root)
            names = {f"legacy/{name}" for point in run.points for name in point.metrics}
            params = {f"legacy.{name}": value for name, value in run.params.items()}
            if refused := queries.refused_by_stores([*names, *derive_numbers(run)], params):
                raise LegacyError(f"{folder}: MLflow takes no {refused}")
            describe(run)
        except LegacyError as error:
            skipped.append(str(error))
        except (ArithmeticError, ValueError) as error:
            skipped.append(f"{folder}: its numbers cannot be computed with ({error})")
        else:
            runs.append(run)
    return runs, skipped


def counts(runs: Sequence[LegacyRun]) -> list[str]:
    """One line per kind, model, arm, optimiser and precision."""
    found = Counter((r.kind, r.model, r.arm, r.optimizer, r.precision) for r in runs)
    return [f"{n} {' '.join(key)}" for key, n in sorted(found.items())]


def report(root: pathlib.Path, done: Imported) -> str:
    """What was imported, as Markdown."""
    all_runs = (*done.new, *done.known)
    lines = [
        f"{len(done.new)} recorded runs imported from `{root.name}`, {len(done.known)} were "
        f"there before, {len(done.skipped)} skipped.",
        "",
        f"{len(all_runs)} runs record {len({r.results for r in all_runs})} different sets of "
        "numbers.",
        "",
        *(f"- {line}" for line in counts(all_runs)),
    ]
    if done.skipped:
        lines += ["", "Skipped:", "", *(f"- {line}" for line in done.skipped)]
    return "\n".join(lines) + "\n"


def import_results(config: ImportConfig) -> Imported:
    """Read every recorded run below a folder into MLflow; what is there already is left alone.

    Raises:
        LegacyError: No such folder, nothing in it, or some recorded runs could not be read; the
            last is raised after all others were imported.
    """
    console = Console(config.verbosity)
    if not config.folder:
        raise LegacyError("--folder is empty: name the folder of the predecessor's results")
    root = local_path(config.folder, "--folder")
    with open_runs.start("import neuroentropy", {"stage": STAGE, "role": "parent"}) as parent:
        parent.params(STAGE, as_params(config))
        require_writable(config.output_dir)
        runs, skipped = read_all(root)
        stored = queries.search(parent.experiment_id, LEGACY_RUNS)
        present = {v.tags.get("fingerprint") for v in stored if v.status == "FINISHED"}
        new: dict[str, LegacyRun] = {}
        with console.bar(len(runs), "importing", unit="run") as bar:
            for run in runs:
                if run.fingerprint not in present and run.fingerprint not in new:
                    try:
                        import_run(parent, run)
                    except TrackingError as error:  # a name or value that the store refuses
                        skipped.append(f"{run.folder}: {error}")
                    else:
                        new[run.fingerprint] = run
                bar.update(1)
        stored_now = present | new.keys()
        known = tuple(
            r for r in runs if r.fingerprint in stored_now and new.get(r.fingerprint) is not r
        )
        done = Imported(tuple(new.values()), known, tuple(skipped))
        text = report(root, done)
        folder = run_folder(config.output_dir, "imports", parent.run_id)
        with writing(folder):
            folder.mkdir(parents=True)
            (folder / "import.md").write_text(text)
        parent.artifact(folder / "import.md")
        parent.describe(text)
        parent.tags({"runs": len(new), "known_runs": len(known), "skipped_runs": len(skipped)})
        console.say(text.rstrip())
        if skipped:
            raise LegacyError(
                f"{len(skipped)} of {len(new) + len(known) + len(skipped)} recorded runs skipped; "
                f"first: {skipped[0]}"
            )
        console.say(f"files: {folder}")
    console.link(MlflowStore().page_of(parent))
    return done
