"""Stage ``heal``: fine-tune collapsed checkpoints on clean text and measure the recovery."""

from __future__ import annotations

import math
import pathlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from healing import plots, tracking
from healing.config import (
    AUTO,
    DEFAULT_MODEL,
    NOT_DETERMINING,
    AttackConfig,
    ConfigError,
    HealConfig,
    as_params,
    fingerprint,
    resolve,
)
from healing.experiment.attack import (
    attack,
    log_corpora,
    open_run,
    raw_data_folder,
    state_of,
    upload,
)
from healing.experiment.console import Console
from healing.experiment.files import JsonLines, write_json
from healing.experiment.loading import code_digest, load_inputs, training_windows, use_threads
from healing.models import (
    CHECKPOINT_NAME,
    Checkpoint,
    CheckpointError,
    LoadedModel,
    load_state,
    read_checkpoint,
    state_digest,
)
from healing.probe import Measurement
from healing.randomness import named_generator
from healing.recovery import Damage, verdict_of
from healing.sft import HealRecord
from healing.sft import heal as heal_steps
from healing.survival import half_recovery_time
from healing.tracking import RunLogger


@dataclass(frozen=True)
class HealCell:
    """One healing run: everything that decides its numbers, picklable.

    Attributes:
        config: Resolved configuration.
        checkpoint: Path of the collapsed checkpoint.
        replicate: Number of the run among those of the same checkpoint and seed.
    """

    config: HealConfig
    checkpoint: str
    replicate: int = 0


@dataclass(frozen=True)
class HealOutcome:
    """What a healing cell leaves.

    Attributes:
        cell: What was run.
        fingerprint: Hash of what determined the result.
        checkpoint: The collapsed state it started from.
        loaded: The model, now healed.
        healthy: Measurement of the untouched model.
        records: The trajectory, from step 0.
        digests: Corpus digests by split.
    """

    cell: HealCell
    fingerprint: str
    checkpoint: Checkpoint
    loaded: LoadedModel
    healthy: Measurement
    records: tuple[HealRecord, ...]
    digests: dict[str, str]

    @property
    def damage(self) -> Damage:
        """Healthy and collapsed state."""
        return Damage(state_of(self.healthy), state_of(self.records[0].measurement))

    @property
    def status(self) -> str:
        """``ok``; ``lockout``: the collapsed model could not compute in float32 and healing ended;
        ``nonfinite_steps``: some steps could not be taken, healing went on.
        """
        if self.records[-1].nonfinite_steps == 0:
            return "ok"
        ended = self.records[-1].step < self.cell.config.healing_steps
        return "lockout" if ended else "nonfinite_steps"

    def recovery(self, record: HealRecord) -> dict[str, float]:
        """Recovery numbers of one record, in percent."""
        return self.damage.recovery(state_of(record.measurement))

    def half_recovery(self, name: str) -> tuple[float, bool]:
        """Steps until half of a recovery is reached, and whether the run ended before (censored).

        (NaN, True) where the recovery is undefined.
        """
        values = [self.recovery(r)[name] for r in self.records]
        if not any(math.isfinite(v) for v in values):
            return math.nan, True
        found = half_recovery_time([float(r.step) for r in self.records], values)
        return found.time, found.censored

    def summary(self) -> dict[str, Any]:
        """Final numbers, as stored in ``healing_summary.json``."""
        damage, last = self.damage, self.records[-1]
        final = state_of(last.measurement)
        recovery = self.recovery(last)
        rank_time, rank_censored = self.half_recovery("rank_recovery_pct")
        loss_time, loss_censored = self.half_recovery("loss_recovery_pct")
        return {
            **recovery,
            "verdict": verdict_of(recovery["rank_recovery_pct"]),
            "verdict_loss": verdict_of(recovery["loss_recovery_pct"]),
            "spectral_state": damage.spectral_state,
            "rank_undefined_reason": damage.rank_reason,
            "loss_undefined_reason": damage.loss_reason,
            "status": self.status,
            "original_rank": damage.healthy.effective_rank,
            "collapsed_rank": damage.collapsed.effective_rank,
            "final_effective_rank": final.effective_rank,
            "original_perplexity": damage.healthy.perplexity,
            "collapsed_perplexity": damage.collapsed.perplexity,
            "final_perplexity": final.perplexity,
            "original_loss": damage.healthy.loss,
            "collapsed_loss": damage.collapsed.loss,
            "final_loss": final.loss,
            "rank_reduction_pct": damage.rank_reduction_pct,
            "rank_change_threshold": damage.rank_threshold,
            "half_recovery_steps_rank": rank_time,
            "half_recovery_censored_rank": rank_censored,
            "half_recovery_steps_loss": loss_time,
            "half_recovery_censored_loss": loss_censored,
            "steps": last.step,
            "nonfinite_steps": last.nonfinite_steps,
        }


def decide_model(config: HealConfig, checkpoint: Checkpoint | None, path: object) -> HealConfig:
    """Resolve ``auto``: the checkpoint's model, unless the user names one.

    Raises:
        CheckpointError: The user names another model than the checkpoint.
    """
    named = checkpoint.model_name if checkpoint else None
    if named and config.model not in (AUTO, named):
        raise CheckpointError(
            f"{path} is a checkpoint of model {named}, --model says {config.model}: "
            "leave --model out or name the same"
        )
    model = named or (DEFAULT_MODEL if config.model == AUTO else config.model)
    return resolve(replace(config, model=model))


def heal_fingerprint(
    cell: HealCell, checkpoint: Checkpoint, healthy_digest: str, digests: dict[str, str]
) -> str:
    """Fingerprint of a healing run; the checkpoint counts by its weights, not by its path."""
    bare = replace(cell.config, collapsed_checkpoint="", arm="none")
    weights = state_digest(checkpoint.state)
    return fingerprint(
        "heal", bare, cell.replicate, weights, healthy_digest, digests, code_digest()
    )


def heal_cell(
    cell: HealCell,
    on_start: Callable[[HealOutcome], None] = lambda _: None,
    on_record: Callable[[HealOutcome, HealRecord], None] = lambda *_: None,
) -> HealOutcome:
    """One healing run as a function of its cell; neither files nor MLflow are touched.

    Args:
        cell: What to heal and how.
        on_start: Called with the outcome so far (step 0) before the first step.
        on_record: Called with the outcome so far and every record as it is made.
    """
    config = cell.config
    checkpoint = read_checkpoint(pathlib.Path(cell.checkpoint))
    corpus, loaded, probe = load_inputs(config)
    healthy = probe.measure(loaded.model, named_generator(config.seed, "bootstrap"))
    mark = heal_fingerprint(cell, checkpoint, loaded.digest, corpus.digests)
    load_state(loaded, checkpoint, cell.checkpoint)
    windows = training_windows(config, corpus, loaded)
    collapsed = probe.measure(loaded.model, named_generator(config.seed, "bootstrap"))
    if config.gradient_checkpointing:
        loaded.model.activation_checkpointing_enable()
    order = named_generator(config.seed, "sft", cell.replicate)
    outcome = HealOutcome(
        cell, mark, checkpoint, loaded, healthy, (HealRecord(0, 0, collapsed),), corpus.digests
    )
    on_start(outcome)
    for record in heal_steps(loaded, config, windows, probe, collapsed, order):
        known = outcome.records if record.step else ()
        outcome = replace(outcome, records=(*known, record))
        on_record(outcome, record)
    return outcome


def heal_name(cell: HealCell, checkpoint: Checkpoint, mark: str) -> str:
    """Folder and run name of a healing run."""
    arm = checkpoint.config.get("arm", "unknown")
    config = cell.config
    return f"{config.model}_{arm}_seed{config.seed}_run{cell.replicate + 1:02d}_{mark[:8]}"


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
            f"after {s['steps']} steps on {config.model}.",
            "",
            "| | healthy | collapsed | healed |",
            "|---|---|---|---|",
            f"| effective rank | {s['original_rank']:.2f} | {s['collapsed_rank']:.2f} | "
            f"{s['final_effective_rank']:.2f} |",
            f"| perplexity | {s['original_perplexity']:.4g} | {s['collapsed_perplexity']:.4g} | "
            f"{s['final_perplexity']:.4g} |",
            "",
            f"Spectral state before healing: {s['spectral_state']}. Status: {s['status']}.",
        ]
    )


def _store(
    outcome: HealOutcome, folder: pathlib.Path, rows: list[tuple[int, dict[str, float]]]
) -> None:
    config, s = outcome.cell.config, outcome.summary()
    arm = outcome.checkpoint.config.get("arm", "unknown")
    write_json(
        folder / "config.json",
        {
            **as_params(config),
            "checkpoint": outcome.cell.checkpoint,
            "replicate": outcome.cell.replicate,
            "fingerprint": outcome.fingerprint,
            "attack": outcome.checkpoint.config,
        },
    )
    write_json(folder / "healing_summary.json", s)
    spectra = {
        "healthy": outcome.healthy.mean_spectrum(),
        "collapsed": outcome.records[0].measurement.mean_spectrum(),
        "healed": outcome.records[-1].measurement.mean_spectrum(),
    }
    write_json(folder / "spectra.json", spectra)
    title = f"{config.model}, {plots.arm_label(arm)}, seed {config.seed}"
    plots.recovery_trajectory(folder / "plots" / "recovery_trajectory.png", rows, s, arm, title)
    plots.perplexity_recovery(folder / "plots" / "perplexity_recovery.png", rows, s, arm, title)
    plots.spectral_decay(folder / "plots" / "spectral_decay_three_state.png", spectra, title)


SEEDED = ("seed", "collapsed_checkpoint", "arm")
NOT_SETTINGS = frozenset(
    {"seed", "fingerprint", "attack_run_id", "reference_checkpoint", "output_dir", "verbosity"}
)


def settings_of(cell: HealCell, checkpoint: Checkpoint) -> str:
    """Hash of the healing and attack parameters without seeds and paths: what may be pooled."""
    healing = {
        k: v for k, v in as_params(cell.config).items() if k not in (*NOT_DETERMINING, *SEEDED)
    }
    attacked = {k: v for k, v in checkpoint.config.items() if k not in NOT_SETTINGS}
    return fingerprint(healing, attacked)


def _lineage(cell: HealCell, checkpoint: Checkpoint) -> dict[str, Any]:
    made = checkpoint.config
    return {
        "settings": settings_of(cell, checkpoint),
        "checkpoint": cell.checkpoint,
        "checkpoint_id": made.get("fingerprint") or state_digest(checkpoint.state),
        "attack_run_id": made.get("attack_run_id", ""),
        "attack_seed": made.get("seed", ""),
        "replicate": cell.replicate,
    }


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
    )
    run.tags({name: s[name] for name in names if s[name]})
    run.describe(describe(outcome))


def heal_one(
    cell: HealCell,
    console: Console,
    *,
    parent: RunLogger | None = None,
    run: RunLogger | None = None,
) -> HealOutcome:
    """Run, log and store one healing run: in a given run, else as a child of the parent."""
    config = cell.config
    checkpoint = read_checkpoint(pathlib.Path(cell.checkpoint))
    arm = checkpoint.config.get("arm", "unknown")
    title = f"heal {config.model} {arm} seed {config.seed} run {cell.replicate + 1}"
    tags = {"stage": "heal", "arm": arm, "model": config.model, **_lineage(cell, checkpoint)}
    use_threads(config)
    if run is None:
        with open_run(parent, title, tags) as fresh:
            return _heal_in(fresh, cell, title, arm, console)
    run.tags({**tags, "mlflow.runName": title})
    return _heal_in(run, cell, title, arm, console)


def _heal_in(run: RunLogger, cell: HealCell, title: str, arm: str, console: Console) -> HealOutcome:
    config, begin = cell.config, time.perf_counter()
    run.params("heal", {**as_params(config), "arm": arm, "replicate": cell.replicate})
    rows: list[tuple[int, dict[str, float]]] = []
    files: dict[str, Any] = {}
    with console.bar(config.healing_steps, title) as bar:

        def on_start(outcome: HealOutcome) -> None:
            name = heal_name(cell, outcome.checkpoint, outcome.fingerprint)
            files["folder"] = raw_data_folder(config.output_dir, name)
            files["lines"] = JsonLines(files["folder"] / "metrics.jsonl")
            run.params("model", {"n_params": outcome.loaded.n_params})
            run.tags({"fingerprint": outcome.fingerprint})
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

        outcome = heal_cell(cell, on_start, on_record)
    _store(outcome, files["folder"], rows)
    _finish(run, outcome)
    upload(run, files["folder"])
    s = outcome.summary()
    console.say(
        f"{title}: {s['verdict']} (rank recovery {s['rank_recovery_pct']:.1f} %, loss recovery "
        f"{s['loss_recovery_pct']:.1f} %) → {files['folder']}"
    )
    return outcome


def find_checkpoints(folder: str) -> list[pathlib.Path]:
    """All collapsed checkpoints below a folder, sorted.

    Raises:
        CheckpointError: There is no such folder, or none in it.
    """
    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise CheckpointError(f"--checkpoint-dir {folder} is not a folder: name an existing one")
    found = sorted(root.rglob(CHECKPOINT_NAME))
    if not found:
        raise CheckpointError(
            f"no {CHECKPOINT_NAME} below {folder}: run the attack entry point first, or name "
            "another folder"
        )
    return found


def _local_checkpoint(config: HealConfig) -> pathlib.Path | None:
    if config.attack_run_id:
        run = tracking.get_run(config.attack_run_id)
        return tracking.download(f"runs:/{run.run_id}/checkpoints/{CHECKPOINT_NAME}")
    given = config.collapsed_checkpoint
    if not given:
        return None
    return tracking.download(given) if ":/" in given else pathlib.Path(given).expanduser().resolve()


def _fresh_attack(run: RunLogger, config: HealConfig, console: Console) -> pathlib.Path:
    resolved = decide_model(config, None, "")
    shared = {
        name: getattr(resolved, name)
        for name in (
            "model",
            "corpus",
            "max_documents",
            "seed",
            "batch_size",
            "sequence_length",
            "probe_tokens",
            "measurement_interval",
            "threads",
            "device",
            "output_dir",
            "verbosity",
        )
    }
    return attack(AttackConfig(arm=config.arm, **shared), parent=run, console=console)[1]


def _cells(config: HealConfig, path: pathlib.Path, replicates: int) -> list[HealCell]:
    resolved = decide_model(config, read_checkpoint(path), path)
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
    with tracking.start("heal", {"stage": "heal"}) as run:
        if config.checkpoint_dir:
            paths = find_checkpoints(config.checkpoint_dir)
            replicates = config.runs_per_checkpoint
        else:
            paths = [_local_checkpoint(config) or _fresh_attack(run, config, console)]
            replicates = config.num_runs
        if len(paths) == 1 and replicates == 1:
            (cell,) = _cells(config, paths[0], 1)
            return [heal_one(cell, console, run=run)]
        return _heal_children(run, config, paths, replicates, console)


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
            except (CheckpointError, ConfigError) as error:
                failures.append(str(error))
                console.say(f"failed: {error}")
    run.describe(f"{len(outcomes)} of {total} healing runs done.")
    if failures:
        raise CheckpointError(f"{len(failures)} of {len(paths)} checkpoints failed: {failures[0]}")
    return outcomes
