"""Stage ``heal``: fine-tune collapsed checkpoints on clean text and measure the recovery."""

from __future__ import annotations

import contextlib
import math
import pathlib
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from healing.config.fingerprint import as_params
from healing.config.heal import HealConfig
from healing.config.presets import model_slug
from healing.config.shared import SHAM
from healing.errors import CheckpointError, HealingError
from healing.measurements.recovery import State
from healing.models.checkpoints import (
    HEALED_KIND,
    HEALED_NAME,
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from healing.models.loading import LoadedModel
from healing.reporting.phrases import percent_text
from healing.reporting.plots import runs as runs_figures
from healing.reporting.plots.style import arm_label
from healing.stages.attack import (
    attack,
    log_corpora,
    open_run,
    raw_data_folder,
    upload,
    warn_of_few_rows,
)
from healing.stages.cells.heal import (
    HealCell,
    HealOutcome,
    heal_cell,
    heal_fingerprint,
    resolve_from_checkpoint,
    settings_of,
    sham_checkpoint,
)
from healing.stages.cells.inputs import input_digests, use_threads
from healing.stages.console import Console
from healing.stages.heal_inputs import find_checkpoints, fresh_attack_config, local_checkpoint
from healing.tracking import queries, run_logger
from healing.tracking.run_files import JsonLines, read_jsonl, start_folder, write_json
from healing.tracking.run_logger import RunLogger
from healing.training.healing_loop import HealRecord
from healing.training.methods.lora import n_trainable, require


def heal_name(cell: HealCell, checkpoint: Checkpoint, mark: str) -> str:
    """Folder and run name of a healing run."""
    config, arm = cell.config, checkpoint.config.get("arm", "unknown")
    slug = model_slug(config.label)
    return f"{slug}_{arm}_seed{config.seed}_run{cell.replicate + 1:02d}_{mark[:8]}"


def describe(outcome: HealOutcome) -> str:
    """Markdown description of a healing run."""
    s, config = outcome.summary(), outcome.cell.config
    why = s["rank_undefined_reason"]
    rank = f"undefined ({why})" if why else f"**{s['rank_recovery_pct']:.1f} %**"
    loss = s["loss_undefined_reason"]
    loss = f"undefined ({loss})" if loss else f"{s['loss_recovery_pct']:.1f} %"
    return "\n".join(
        [
            f"**{s['verdict']}**: rank recovery {rank}, loss recovery {loss} "
            f"after {s['steps']} steps on {config.label}.",
            "",
            "| | healthy | collapsed | healed |",
            "|---|---|---|---|",
            f"| effective rank | {s['original_rank']:.2f} | {s['collapsed_rank']:.2f} | "
            f"{s['final_effective_rank']:.2f} |",
            f"| perplexity | {s['original_perplexity']:.4g} | {s['collapsed_perplexity']:.4g} | "
            f"{s['final_perplexity']:.4g} |",
            "",
            *_sham_line(s),
            f"Spectral state before healing: {s['spectral_state']}. Status: **{s['status']}**. "
            f"{s['status_reason']}",
        ]
    )


def _sham_line(summary: Mapping[str, Any]) -> list[str]:
    if "rank_recovery_sham_pct" not in summary:
        return []
    rank = percent_text(summary["rank_recovery_sham_pct"])
    loss = percent_text(summary["loss_recovery_sham_pct"])
    return [f"Against the sham (the healthy model at the same step): rank {rank}, loss {loss}.", ""]


def stored_config(outcome: HealOutcome) -> dict[str, Any]:
    """Content of ``config.json``: the configuration, the checkpoint and what made it."""
    return {
        **as_params(outcome.cell.config),
        "checkpoint": outcome.cell.checkpoint,
        "replicate": outcome.cell.replicate,
        "fingerprint": outcome.fingerprint,
        "attack": outcome.checkpoint.config,
    }


def _store(
    outcome: HealOutcome, folder: pathlib.Path, rows: list[tuple[int, dict[str, float]]]
) -> None:
    config, s = outcome.cell.config, outcome.summary()
    arm = outcome.checkpoint.config.get("arm", "unknown")
    write_json(folder / "healing_summary.json", s)
    spectra = {
        "healthy": outcome.healthy.mean_spectrum(),
        "collapsed": outcome.records[0].measurement.mean_spectrum(),
        "healed": outcome.records[-1].measurement.mean_spectrum(),
    }
    write_json(folder / "spectra.json", spectra)
    title = f"{config.label}, {arm_label(arm)}, seed {config.seed}"
    runs_figures.recovery_trajectory(
        folder / "plots" / "recovery_trajectory.png", rows, s, arm, title
    )
    runs_figures.perplexity_recovery(
        folder / "plots" / "perplexity_recovery.png", rows, s, arm, title
    )
    runs_figures.spectral_decay(folder / "plots" / "spectral_decay_three_state.png", spectra, title)


def _save_healed(
    run: RunLogger, outcome: HealOutcome, healed: LoadedModel, folder: pathlib.Path
) -> None:
    """The healed weights, with what the basin stage needs to check that states belong together."""
    made, step = outcome.checkpoint.config, outcome.records[-1].step
    arm = made.get("arm", "unknown")
    config = {
        **stored_config(outcome),
        "arm": arm,
        "heal_run_id": run.run_id,
        "attack_run_id": made.get("attack_run_id", ""),
        "healthy_digest": outcome.healthy_digest,
        "model_commit": healed.commit,
        "collapsed_digest": outcome.checkpoint.digest,
        "corpus_digests": outcome.digests,
    }
    text = f"{outcome.cell.config.label} healed for {step} steps after {arm}"
    path = folder / "checkpoints" / HEALED_NAME
    save_checkpoint(path, healed.model, step, text, config, HEALED_KIND)


def _lineage(checkpoint: Checkpoint) -> dict[str, Any]:
    made = checkpoint.config
    return {
        "checkpoint_id": made.get("fingerprint") or checkpoint.digest,
        "attack_run_id": made.get("attack_run_id", ""),
        "attack_seed": made.get("seed", ""),
        "noise_match": made.get("noise_match", ""),
        "reference_checkpoint_id": made.get("reference_fingerprint", ""),
    }


def sham_trajectory(
    cell: HealCell, parent: RunLogger, console: Console
) -> tuple[dict[int, State], str]:
    """Step → state of the sham that a cell is referred to, and its run id.

    It is healed once per store, seed, replicate and settings; a finished one is found again.
    """
    unit = cell.sham_cell()
    marks = input_digests(unit.config)
    healthy = sham_checkpoint(marks.healthy_digest, unit.config)
    mark = heal_fingerprint(unit, healthy, marks.identity, marks.corpus_digests)
    done = queries.find_finished(parent.experiment_id, mark)
    if done is None:
        heal_one(unit, console, parent=parent)
        done = queries.find_finished(parent.experiment_id, mark)
        assert done is not None, "a run that just finished is in its own store"
    rows = read_jsonl(queries.download(f"runs:/{done.run_id}/metrics.jsonl"))
    states = {
        int(row["step"]): State(
            float(row["effective_rank"]), float(row["loss"]), float(row["perplexity"])
        )
        for row in rows
    }
    return states, done.run_id


def _finish(run: RunLogger, outcome: HealOutcome) -> None:
    s = outcome.summary()
    numbers = {f"summary/{k}": v for k, v in s.items() if isinstance(v, (int, float))}
    run.metrics(numbers, outcome.records[-1].step)
    names = (
        "verdict",
        "verdict_loss",
        "spectral_state",
        "status",
        "rank_undefined_reason",
        "loss_undefined_reason",
        "status_reason",
        "nonfinite_origin",
        "nonfinite_module",
        "control_origin",
        "control_module",
    )
    run.tags({name: s[name] for name in names if s[name]})
    if not math.isnan(s["nonfinite_step"]):
        run.tags({"nonfinite_step": s["nonfinite_step"]})
    run.describe(describe(outcome))


def heal_one(
    cell: HealCell,
    console: Console,
    *,
    parent: RunLogger | None = None,
    run: RunLogger | None = None,
) -> HealOutcome:
    """Run, log and store one healing run: in a given run, else as a child of the parent."""
    config, arm = cell.config, SHAM
    if cell.checkpoint:
        arm = read_checkpoint(pathlib.Path(cell.checkpoint)).config.get("arm", "unknown")
    title = f"heal {config.label} {arm} seed {config.seed} run {cell.replicate + 1}"
    own = {"checkpoint": cell.checkpoint, "replicate": cell.replicate}
    tags = {"stage": "heal", "arm": arm, "model": config.label, **own}
    use_threads(config)
    if run is None:
        with open_run(parent, title, tags) as fresh:
            return _heal_in(fresh, cell, title, arm, console)
    run.tags({**tags, "mlflow.runName": title})
    return _heal_in(run, cell, title, arm, console)


def _heal_in(run: RunLogger, cell: HealCell, title: str, arm: str, console: Console) -> HealOutcome:
    config, begin = cell.config, time.perf_counter()
    if config.sham:
        reference, sham_run_id = sham_trajectory(cell, run, console)
        cell = replace(cell, sham=reference)
        run.tags({"sham_run_id": sham_run_id})
    run.params("heal", {**as_params(config), "arm": arm, "replicate": cell.replicate})
    rows: list[tuple[int, dict[str, float]]] = []
    files: dict[str, Any] = {}
    with console.bar(config.healing_steps, title) as bar:

        def on_start(outcome: HealOutcome, loaded: LoadedModel) -> None:
            name = heal_name(cell, outcome.checkpoint, outcome.fingerprint)
            files["folder"] = raw_data_folder(config.output_dir, name)
            start_folder(files["folder"], stored_config(outcome))
            files["lines"] = JsonLines(files["folder"] / "metrics.jsonl")
            run.rescue(files["folder"] / "config.json", files["lines"].path)
            run.n_params(loaded.n_params)
            run.n_params(n_trainable(loaded.model, config), "n_trainable_params")
            warn_of_few_rows(console, config, loaded)
            settings = settings_of(cell, outcome.checkpoint, outcome.digests)
            marks = {"fingerprint": outcome.fingerprint, "settings": settings}
            run.tags({**loaded.tags, **_lineage(outcome.checkpoint), **marks})
            log_corpora(run, config, outcome.digests, {"train": "training", "probe": "probe"})

        def on_record(outcome: HealOutcome, record: HealRecord) -> None:
            values = {**record.metrics(), **outcome.recovery(record)}
            logged = {k: v for k, v in values.items() if not math.isnan(v)}
            run.metrics(logged, record.step)
            files["lines"].append(
                {"step": record.step, "seconds": time.perf_counter() - begin, **values}
            )
            rows.append((record.step, values))
            bar.set_postfix_str(
                f"rank {values['effective_rank']:.1f}, perplexity {values['perplexity']:.3g}"
            )
            bar.update(record.step - bar.n)

        outcome, healed = heal_cell(cell, on_start, on_record)
    _store(outcome, files["folder"], rows)
    if config.save_healed:
        _save_healed(run, outcome, healed, files["folder"])
    del healed
    _finish(run, outcome)
    upload(run, files["folder"])
    s = outcome.summary()
    console.say(
        f"{title}: {s['verdict']} (rank recovery {percent_text(s['rank_recovery_pct'])}, loss "
        f"recovery {percent_text(s['loss_recovery_pct'])}) → {files['folder']}"
    )
    return outcome


def _fresh_attack(run: RunLogger, config: HealConfig, console: Console) -> pathlib.Path:
    return attack(fresh_attack_config(config), parent=run, console=console)[1]


def _cells(config: HealConfig, path: pathlib.Path, replicates: int) -> list[HealCell]:
    resolved = resolve_from_checkpoint(config, read_checkpoint(path), path)
    return [HealCell(resolved, str(path), replicate) for replicate in range(replicates)]


def heal(config: HealConfig) -> list[HealOutcome]:
    """Heal one checkpoint, every checkpoint below a folder, or a fresh attack.

    One checkpoint healed once is one run; otherwise a parent run holds a child per healing run.
    A child that fails does not stop the others; the parent then fails at the end.

    Raises:
        CheckpointError: Nothing to heal, or not a checkpoint of the model.
        ConfigError: Parameters contradict each other.
    """
    console = Console(config.verbosity)
    with run_logger.start("heal", {"stage": "heal"}) as run:
        require(config)
        if config.checkpoint_dir:
            paths = find_checkpoints(config.checkpoint_dir)
            replicates = config.runs_per_checkpoint
        else:
            paths = [local_checkpoint(config) or _fresh_attack(run, config, console)]
            replicates = config.num_runs
        if len(paths) == 1 and replicates == 1:
            (cell,) = _cells(config, paths[0], 1)
            return [heal_one(cell, console, run=run)]
        return _heal_children(run, config, paths, replicates, console)


def _record_failure(parent: RunLogger, path: pathlib.Path, error: Exception) -> None:
    """A checkpoint that cannot be healed has a FAILED run of its own, where it has none yet."""
    if any(v.tags.get("checkpoint") == str(path) for v in queries.children(parent)):
        return
    with (
        contextlib.suppress(HealingError),
        run_logger.child(parent, f"heal {path}", {"stage": "heal", "checkpoint": path}),
    ):
        raise error


def _heal_children(
    run: RunLogger,
    config: HealConfig,
    paths: list[pathlib.Path],
    replicates: int,
    console: Console,
) -> list[HealOutcome]:
    total = len(paths) * replicates
    run.tags({"role": "parent", "mlflow.runName": f"heal {total} runs", "arm": "", "model": ""})
    run.params("heal", as_params(config))
    outcomes, failures = [], []
    with console.bar(total, "healing runs", unit="run") as bar:
        for path in paths:
            try:
                for cell in _cells(config, path, replicates):
                    outcomes.append(heal_one(cell, console, parent=run))
                    bar.update(1)
            except HealingError as error:
                failures.append(str(error))
                console.say(f"failed: {error}")
                _record_failure(run, path, error)
    run.describe(f"{len(outcomes)} of {total} healing runs done.")
    if failures:
        raise CheckpointError(f"{len(failures)} of {len(paths)} checkpoints failed: {failures[0]}")
    return outcomes
