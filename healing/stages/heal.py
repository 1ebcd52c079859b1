"""Stage ``heal``: fine-tune collapsed checkpoints on clean text and measure the recovery."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from healing.config.arm_tags import SHAM_ARM, arm_label, arm_tags
from healing.config.fingerprint import as_params
from healing.config.heal import HealConfig
from healing.config.options import AUTO
from healing.config.shared import SAVING
from healing.errors import CheckpointError, HealingError, TrackingError
from healing.measurements.diagnosis import NONE
from healing.measurements.recovery import State
from healing.models.checkpoints import (
    HEALED_KIND,
    HEALED_NAME,
    Checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from healing.models.loading import LoadedModel
from healing.registry import METHODS
from healing.reporting import run_page
from healing.reporting.phrases import percent_text
from healing.reporting.plots import runs as figures
from healing.reporting.plots.layers import rank_map
from healing.reporting.verdict_sentences import run_outcome
from healing.stages.attack import ATTACK, checkpoint_of
from healing.stages.cells.events import Record
from healing.stages.cells.heal import heal_cell, resolve_from_checkpoint, stored_config
from healing.stages.cells.heal_outcome import HealCell, HealOutcome
from healing.stages.cells.inputs import use_threads
from healing.stages.cells.recollapse import FIRST_RANK, FIRST_STEPS
from healing.stages.driver import Driver
from healing.stages.healing_run.inputs import (
    find_checkpoints,
    fresh_attack_config,
    local_checkpoint,
)
from healing.stages.healing_run.page import describe, tables
from healing.stages.stage import (
    Done,
    Report,
    StageDefaults,
    Tools,
    headlines,
    model_of,
    pictures_of,
    points_of,
    settled,
)
from healing.stages.terminal.console import Console
from healing.stages.tuning.healer_files import with_healer
from healing.tracking.queries import CELL_KEY
from healing.tracking.run import Run
from healing.tracking.run_files import read_jsonl, write_json
from healing.tracking.sending.logged_models import ModelFiles
from healing.tracking.sending.requests import LOCAL_ID
from healing.tracking.snapshots import Saving
from healing.tracking.store import Store
from healing.training.parallel.group import ranks_of


def _write_files(outcome: HealOutcome, folder: pathlib.Path, records: Sequence[Record]) -> None:
    """Summary, spectra and figures."""
    config, s, rows = outcome.cell.config, outcome.summary(), points_of(records)
    arm = outcome.checkpoint.config.get("arm", "unknown")
    write_json(folder / "healing_summary.json", s)
    spectra = {
        "healthy": outcome.healthy.mean_spectrum(),
        "collapsed": outcome.records[0].measurement.mean_spectrum(),
        "healed": outcome.records[-1].measurement.mean_spectrum(),
    }
    write_json(folder / "spectra.json", spectra)
    title = f"{config.label}, {arm_label(arm)}, seed {config.seed}"
    figures.recovery_trajectory(folder / "plots" / "recovery_trajectory.png", rows, s, arm, title)
    sham_loss = {step: state.loss for step, state in outcome.cell.sham.items()}
    figures.overview(folder / run_page.PICTURE, rows, s, sham_loss, arm)
    figures.perplexity_recovery(
        folder / "plots" / "perplexity_recovery.png", rows, s, arm, title, sham_loss
    )
    figures.spectral_decay(folder / "plots" / "spectral_decay_three_state.png", spectra, title)
    if config.log_images:
        ranks = outcome.rank_shares()
        steps = [record.step for record in records]
        rank_map(folder / "plots" / "rank_by_block.png", steps, ranks, "healing steps", title)


def _save_healed(
    outcome: HealOutcome, healed: LoadedModel, folder: pathlib.Path, run_id: str
) -> None:
    """The healed weights, with what the basin stage needs to check that states belong together."""
    made, step = outcome.checkpoint.config, outcome.records[-1].step
    arm = made.get("arm", "unknown")
    config = {
        **stored_config(outcome.cell, outcome.checkpoint, outcome.fingerprint),
        "arm": arm,
        "heal_run_id": run_id,
        "attack_run_id": made.get("attack_run_id", ""),
        "healthy_digest": outcome.healthy_digest,
        "model_commit": healed.commit,
        "collapsed_digest": outcome.checkpoint.digest,
        FIRST_STEPS: outcome.checkpoint.step,
        FIRST_RANK: outcome.records[0].measurement.effective_rank,
        "corpus_digests": outcome.digests,
    }
    text = f"{outcome.cell.config.label} healed for {step} steps after {arm}"
    path = folder / "checkpoints" / HEALED_NAME
    save_checkpoint(path, healed.model, step, text, config, HEALED_KIND)


def _model(
    outcome: HealOutcome, healed: LoadedModel, folder: pathlib.Path
) -> tuple[ModelFiles, ...]:
    """The healed model, where it is wanted; of a sham, which nothing had hurt, none."""
    if not outcome.cell.checkpoint:
        return ()
    config, arm = outcome.cell.config, outcome.checkpoint.config.get("arm", "unknown")
    title = f"{config.label} {arm} seed {config.seed} healed"
    facts = {"arm": arm, "state": "healed", "steps": outcome.records[-1].step}
    return model_of("heal", config, healed, folder, title, **facts)


def _sham_states(done: Done, store: Store) -> dict[int, State]:
    """Step → state of a finished sham."""
    path = done.file("metrics.jsonl", store)
    try:
        return {
            int(row["step"]): State(
                float(row["effective_rank"]), float(row["loss"]), float(row["perplexity"])
            )
            for row in read_jsonl(path)
        }
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise TrackingError(
            f"metrics.jsonl of the sham (run {done.run_id}) is malformed ({error!r}): delete that "
            "run and heal again"
        ) from error


HEADLINES = ("effective_rank", "loss_recovery_pct", "rank_recovery_pct")
"""What a healing run's page charts first."""

TAGGED = (
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
"""Entries of the summary that are tags too, where they say something."""


class HealStage(StageDefaults):
    """From a collapsed checkpoint to a recovery."""

    name = "heal"

    def title(self, cell: HealCell) -> str:
        """``heal nano haep seed 0 run 1``."""
        config = cell.config
        if config.model == AUTO:  # not prepared: the checkpoint could not tell what it is of
            return f"heal {cell.checkpoint}"
        return f"heal {config.label} {_arm_of(cell)} seed {config.seed} run {cell.replicate + 1}"

    def tags(self, cell: HealCell) -> dict[str, Any]:
        """What runs are grouped by, and which checkpoint is healed."""
        arm = _arm_of(cell)
        tags: dict[str, Any] = {"arm": arm, "model": cell.config.label, **arm_tags(arm)}
        tags |= {"checkpoint": cell.checkpoint, "replicate": cell.replicate}
        tags |= {"sham_run_id": cell.sham_run_id} if cell.sham_run_id else {}
        tags |= {CELL_KEY: cell.key} if cell.key else {}
        return tags | (cell.healer.tags() if cell.healer else {})

    def params(self, cell: HealCell) -> dict[str, Any]:
        """The configuration, with the arm that was healed."""
        return {**settled(cell.config), "arm": _arm_of(cell), "replicate": cell.replicate}

    def output_dir(self, cell: HealCell) -> str:
        """As configured."""
        return cell.config.output_dir

    def saving(self, cell: HealCell) -> Saving:
        """As configured."""
        return super().saving(cell.config)

    def prepare(self, cell: HealCell, tools: Tools) -> HealCell:
        """Take the healer's settings where one is named, replace every ``auto`` by the
        checkpoint's own, and heal the sham where it is wanted, by the same healer.

        The sham is healed once per store, seed, replicate and settings; a finished one is found.
        """
        checkpoint = _checkpoint_of(cell)
        config, healer = with_healer(cell.config, tools.store)
        config = resolve_from_checkpoint(config, checkpoint, cell.checkpoint)
        cell = replace(cell, config=config, healer=healer)
        if healer:
            attacked = checkpoint.config.get("seed") if checkpoint else None
            seeds = [config.seed] if attacked is None else [config.seed, int(attacked)]
            healer.check_use(config.healer, config.label, seeds)
        use_threads(cell.config)
        if cell.config.is_parallel:
            ranks_of(cell.config)  # what is wrong is said before anything is computed
        if not cell.config.sham:
            return cell
        done = tools.first(self, cell.sham_cell())
        return replace(cell, sham=_sham_states(done, tools.store), sham_run_id=done.run_id)

    cell = staticmethod(heal_cell)

    def store(
        self,
        outcome: tuple[HealOutcome, LoadedModel],
        records: Sequence[Record],
        folder: pathlib.Path,
        run_id: str,
    ) -> Report:
        """The summary, spectra, three figures, and the healed weights where they are wanted."""
        found, healed = outcome
        _write_files(found, folder, records)
        if found.cell.config.save_healed:
            _save_healed(found, healed, folder, run_id)
        s = found.summary()
        numbers = {f"summary/{k}": v for k, v in s.items() if isinstance(v, (int, float))}
        tags = {name: s[name] for name in TAGGED if s[name]}
        if tags.get("nonfinite_origin") == NONE:
            del tags["nonfinite_origin"]
        if not math.isnan(s["nonfinite_step"]):
            tags["nonfinite_step"] = s["nonfinite_step"]
        line = f"{self.title(found.cell)}: {_came_back(s)}"
        # At step 0 the UI draws one number as a bar, at any other as a line of one point.
        points = [(0, numbers), *headlines(records, HEADLINES)]
        return Report(
            points,
            tags,
            describe(found, run_id),
            line,
            result=found,
            pictures=pictures_of(found.records, found.healthy, wanted=found.cell.config.log_images),
            tables=tables(found, healed.tokenizer),
            models=_model(found, healed, folder),
        )


def _came_back(s: Mapping[str, Any]) -> str:
    """What a healing run's line says of its recovery, with the reason where it has none."""
    loss = f"loss recovery {percent_text(s['loss_recovery_pct'])}"
    if why := s["rank_undefined_reason"]:
        return f"rank recovery undefined ({why}), {loss}"
    rank = f"rank recovery {percent_text(s['rank_recovery_pct'])}"
    return f"{run_outcome(s['verdict'], s['steps'])} ({rank}, {loss})"


HEAL = HealStage()
NOT_THE_COMMAND = (
    *SAVING,
    "resume_run_id",
    "verbosity",
    "cache_dir",
    "device",
    "parallel",
    "ranks",
    "system_metrics",
    "dry_run",
    "time_steps",
)
"""Options in which a command that goes on with a cut one may differ from it."""


def _checkpoint_of(cell: HealCell) -> Checkpoint | None:
    return read_checkpoint(pathlib.Path(cell.checkpoint)) if cell.checkpoint else None


def _arm_of(cell: HealCell) -> str:
    """The arm of the state that is healed; ``unknown`` where the file does not say or is none."""
    if not cell.checkpoint:
        return SHAM_ARM
    with contextlib.suppress(CheckpointError):
        return str(read_checkpoint(pathlib.Path(cell.checkpoint)).config.get("arm", "unknown"))
    return "unknown"


def heal(config: HealConfig, driver: Driver | None = None) -> list[HealOutcome]:
    """Heal one checkpoint, every checkpoint below a folder, or a fresh attack.

    One checkpoint healed once is one run; otherwise a parent run holds a child per healing run.
    A child that fails does not stop the others; the parent then fails at the end. Where the same
    command was cut, or failed, the children that finished then are left out, of the result too; one
    that went through is done anew.

    Raises:
        CheckpointError: Nothing to heal, or not a checkpoint of the model.
        ConfigError: Parameters contradict each other.
    """
    driver = driver or Driver(Console(config.verbosity))
    with driver.process("heal", {"stage": HEAL.name}, config.output_dir) as run:
        if config.system_metrics:
            run.system_metrics()
        _check_early(config, driver.store)
        if config.checkpoint_dir:
            paths = find_checkpoints(config.checkpoint_dir)
            replicates = config.runs_per_checkpoint
        else:
            given = local_checkpoint(config, driver.store)
            paths = [given or _fresh_attack(config, run, driver)]
            replicates = config.num_runs
        cells = [HealCell(config, str(path), n) for path in paths for n in range(replicates)]
        if len(cells) == 1:
            return [_outcome(driver.run_cell(HEAL, cells[0], run=run))]
        return _heal_children(cells, config, run, driver)


def _check_early(config: HealConfig, store: Store) -> None:
    """What would stop every run, before an attack is made for them."""
    store.check_registry(config.register_as)
    applied, healer = with_healer(config, store)
    METHODS.load(applied.healing_method).check(applied)
    if applied.is_parallel:
        ranks_of(applied)
    given = (config.collapsed_checkpoint, config.attack_run_id, config.checkpoint_dir)
    if healer and not any(given):
        label = resolve_from_checkpoint(applied, None, "").label
        healer.check_use(config.healer, label, [config.seed])


def _fresh_attack(config: HealConfig, run: Run, driver: Driver) -> pathlib.Path:
    # Found again where it was made before: healing that was cut goes on without it.
    done = driver.run_cell(ATTACK, fresh_attack_config(config), parent=run, reuse=True)
    return checkpoint_of(done, driver.store)


def _outcome(done: Done) -> HealOutcome:
    assert done.report is not None, "a run that was not looked up has its report"
    found: HealOutcome = done.report.result
    return found


def _command(config: HealConfig) -> dict[str, str]:
    """Parameters of a parent that make its command the same as this one."""
    values = {name: v for name, v in as_params(config).items() if name not in NOT_THE_COMMAND}
    return {f"{HEAL.name}.{name}": str(value) for name, value in values.items()}


def _heal_children(
    cells: list[HealCell], config: HealConfig, run: Run, driver: Driver
) -> list[HealOutcome]:
    total = len(cells)
    run.tags({"role": "parent", "mlflow.runName": f"heal {total} runs", "arm": "", "model": ""})
    run.params("heal", as_params(config))
    outcomes: list[HealOutcome] = []
    found_again, failures = 0, dict[str, str]()
    cut = driver.store.cut_before(run, HEAL.name, _command(config))
    before = {name for r in cut for name in (r.run_id, r.tags.get(LOCAL_ID, "")) if name}
    if cut:
        run.tags({"resumed_from": cut[0].run_id})
    with driver.console.bar(total, "healing runs", unit="run") as bar:
        for cell in cells:
            if cell.checkpoint in failures:
                continue  # what is wrong with it was said at its first replicate
            try:
                done = driver.run_cell(HEAL, cell, parent=run, below=before)
                if done.report is None:  # of a run that this one goes on with
                    found_again += 1
                else:
                    outcomes.append(_outcome(done))
                bar.update(1)
            except HealingError as error:
                failures[cell.checkpoint] = str(error)
                driver.console.say(f"failed: {error}")
    run.describe(f"{found_again + len(outcomes)} of {total} healing runs done.")
    if failures:
        n = len({cell.checkpoint for cell in cells})
        first = next(iter(failures.values()))
        raise CheckpointError(f"{len(failures)} of {n} checkpoints failed: {first}")
    return outcomes
