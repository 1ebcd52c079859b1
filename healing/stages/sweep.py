"""Stage ``main``: models × arms × seeds, each attacked and healed, then summarized."""

from __future__ import annotations

import concurrent.futures
import math
import os
import pathlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import as_params
from healing.config.heal import HealConfig
from healing.config.options import AUTO
from healing.config.presets import MODELS, model_label, preset_for
from healing.config.shared import CONTROL, SHAM, TREATMENT
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError, HealingError, SweepError
from healing.models.checkpoints import CHECKPOINT_NAME, read_checkpoint
from healing.models.loading import resolve_device
from healing.reporting.markdown import markdown
from healing.stages.attack import attack, raw_data_folder
from healing.stages.basin import basin, stored_fingerprint
from healing.stages.cells.attack import attack_fingerprint, attack_name
from healing.stages.cells.heal import HealCell, heal_fingerprint, sham_checkpoint
from healing.stages.cells.inputs import complete, input_marks
from healing.stages.console import Console
from healing.stages.heal import heal_one
from healing.stages.summarize import summarize
from healing.statistics.heal_runs import HealRun
from healing.statistics.summary import Summary
from healing.tracking import queries, run_logger
from healing.tracking.queries import RunView
from healing.tracking.run_logger import RunLogger


@dataclass(frozen=True)
class SweepCell:
    """One attack and the healing of its checkpoint."""

    model: str
    arm: str
    seed: int
    revision: str = ""
    deduped: bool = False

    @property
    def label(self) -> str:
        """The model as runs are grouped by."""
        return model_label(self.model, self.revision, self.deduped)

    @property
    def title(self) -> str:
        """For the progress bar."""
        return f"{self.label} {self.arm} seed {self.seed}"


def plan(config: SweepConfig) -> list[list[SweepCell]]:
    """Chains of cells: the arms of one model and seed, the largest model first; before all a model
    of unknown size.

    Within a chain the sham comes first, since the others refer to it, and the noise comes after
    the attack that it is matched to.
    """
    wanted = config.arm_list()
    if config.sham and SHAM not in wanted:
        wanted = (SHAM, *wanted)
    arms = sorted(wanted, key=lambda arm: (arm != SHAM, arm == CONTROL))
    return [
        [SweepCell(model, arm, seed, config.revision, config.deduped) for arm in arms]
        for model in sorted(config.model_list(), key=_size, reverse=True)
        for seed in config.seed_list()
    ]


def _size(model: str) -> int:
    return MODELS.index(model) if model in MODELS else len(MODELS)


def worker_count(config: SweepConfig) -> int:
    """Cells at a time: more than one only where a cell uses one thread and no accelerator."""
    if config.workers != AUTO:
        return int(config.workers)
    on_cpu = resolve_device(config.device).type == "cpu"
    single = all(preset_for(model).threads == 1 for model in config.model_list())
    return min(4, os.cpu_count() or 1) if on_cpu and single else 1


def _shared(config: SweepConfig) -> dict[str, Any]:
    names = (
        "revision",
        "deduped",
        "corpus",
        "batch_size",
        "sequence_length",
        "measurement_interval",
        "device",
        "output_dir",
        "cache_dir",
    )
    return {name: getattr(config, name) for name in names} | {"verbosity": "quiet"}


def attack_config(config: SweepConfig, cell: SweepCell, reference: str) -> AttackConfig:
    """Resolved configuration of a cell's attack."""
    return complete(
        AttackConfig(
            model=cell.model,
            arm=cell.arm,
            seed=cell.seed,
            attack_steps=config.attack_steps,
            reference_checkpoint=reference,
            match=config.noise_match if reference else "norm",
            **_shared(config),
        )
    )


def heal_config(config: SweepConfig, cell: SweepCell) -> HealConfig:
    """Resolved configuration of a cell's healing."""
    steps = config.healing_steps
    if steps == AUTO:
        steps = preset_for(cell.model).sweep_healing_steps
    return complete(
        HealConfig(
            model=cell.model,
            arm=cell.arm,
            seed=cell.seed,
            healing_steps=int(steps),
            healing_lr=config.healing_lr,
            sham=config.sham and cell.arm != SHAM,
            **_shared(config),
        )
    )


@dataclass(frozen=True)
class CellResult:
    """What became of one cell: its healing run, or why there is none, and its landscape."""

    cell: SweepCell
    view: RunView | None = None
    reused: bool = False
    failure: str = ""
    basin: RunView | None = None


class Sweep:
    """The cells of one sweep, run in one process under one parent run."""

    def __init__(self, config: SweepConfig, run: RunLogger) -> None:
        self.config, self.run, self.console = config, run, Console("quiet")
        self.matched = TREATMENT in config.arm_list()
        self.stopped = threading.Event()

    def _attack(self, cell: SweepCell, reference: str) -> pathlib.Path:
        settings = attack_config(self.config, cell, reference)
        marks = input_marks(settings)
        mark = attack_fingerprint(settings, marks.identity, marks.corpus_digests)
        done = queries.find_finished(self.run.experiment_id, mark)
        if done is None:
            return attack(settings, parent=self.run, console=self.console)[1]
        folder = raw_data_folder(settings.output_dir, attack_name(settings, mark))
        path = folder / "checkpoints" / CHECKPOINT_NAME
        if path.is_file():
            return path
        return queries.download(f"runs:/{done.run_id}/checkpoints/{CHECKPOINT_NAME}")

    def _heal(self, cell: SweepCell, path: pathlib.Path | None) -> tuple[RunView, bool]:
        unit = HealCell(heal_config(self.config, cell), "" if path is None else str(path))
        marks = input_marks(unit.config)
        if path is None:
            start = sham_checkpoint(marks.healthy_digest, unit.config)
        else:
            start = read_checkpoint(path)
        mark = heal_fingerprint(unit, start, marks.identity, marks.corpus_digests)
        done = queries.find_finished(self.run.experiment_id, mark)
        if done is not None:
            return done, True
        heal_one(unit, self.console, parent=self.run)
        fresh = queries.find_finished(self.run.experiment_id, mark)
        assert fresh is not None, "a healing run that just finished is in its own store"
        return fresh, False

    def _basin(self, cell: SweepCell, healed: RunView) -> RunView | None:
        """The landscape of a healing run, examined once."""
        if not self.config.basin or cell.arm not in (TREATMENT, CONTROL):
            return None
        shared = _shared(self.config)
        settings = BasinConfig(
            heal_run_id=healed.run_id,
            device=shared["device"],
            output_dir=shared["output_dir"],
            verbosity=shared["verbosity"],
        )
        mark = stored_fingerprint(settings)
        done = queries.find_finished(self.run.experiment_id, mark)
        if done is None:
            basin(settings, parent=self.run, console=self.console)
            done = queries.find_finished(self.run.experiment_id, mark)
        return done

    def run_chain(
        self, chain: Sequence[SweepCell], on_done: Callable[[CellResult], None]
    ) -> list[CellResult]:
        """The arms of one model and seed in order; a failing cell does not stop the others."""
        results, reference = [], ""
        for cell in chain:
            if self.stopped.is_set():
                break
            try:
                if cell.arm == CONTROL and self.matched and not reference:
                    raise ConfigError("the attack that the noise is matched to failed")
                path = None
                if cell.arm != SHAM:
                    path = self._attack(cell, reference if cell.arm == CONTROL else "")
                if cell.arm == TREATMENT:
                    reference = str(path)
                view, reused = self._heal(cell, path)
                landscape = self._basin(cell, view)
                results.append(CellResult(cell, view, reused, basin=landscape))
            except HealingError as error:
                results.append(CellResult(cell, failure=f"{cell.title}: {error}"))
            on_done(results[-1])
        return results

    def run_all(self, console: Console) -> list[CellResult]:
        """Every chain, several at a time; results in the order of the plan.

        Threads, not processes: torch releases the interpreter lock in its kernels, each cell
        computes on one thread, and imports and corpora are shared.
        """
        chains = plan(self.config)
        workers = worker_count(self.config)
        with (
            console.bar(sum(map(len, chains)), "sweep", unit="cell") as bar,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
        ):

            def on_done(result: CellResult) -> None:
                bar.set_postfix_str(f"last: {result.cell.title}")
                bar.update(1)
                if result.failure:
                    console.say(f"failed: {result.failure}")
                elif result.view is not None:
                    console.detail(f"{result.cell.title}: {result.view.tags['verdict']}")

            futures = [pool.submit(self.run_chain, chain, on_done) for chain in chains]
            try:
                return [result for future in futures for result in future.result()]
            except BaseException:
                # Ctrl-C reaches this thread alone: cells under way end, no other begins.
                self.stopped.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


def basin_sentences(results: Sequence[CellResult]) -> list[str]:
    """Model and arm: in how many landscapes the collapsed state is a minimum, and what the others
    say, one line each.
    """
    groups: dict[tuple[str, str], list[RunView]] = {}
    for result in results:
        if result.basin is not None:
            key = (result.cell.label, result.cell.arm)
            groups.setdefault(key, []).append(result.basin)
    lines = []
    for (model, arm), views in groups.items():
        answers = [view.tags["collapsed_is_minimum"] for view in views]
        counts = ", ".join(f"{a} in {answers.count(a)}" for a in dict.fromkeys(answers))
        cosine = [view.metrics.get("basin/return_cosine", math.nan) for view in views]
        climb = [view.metrics.get("basin/climb/collapsed_healed", math.nan) for view in views]
        lines.append(
            f"{model} {arm}: collapsed state a minimum? {counts} of {len(views)}; climb on the "
            f"straight path collapsed → healed {_range(climb)} nats; cos(healing, −attack) "
            f"{_range(cosine)}."
        )
    return lines


def _range(values: Sequence[float]) -> str:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "undefined"
    low, high = min(known), max(known)
    text = f"{low:.3g}" if low == high else f"{low:.3g} to {high:.3g}"
    lost = len(values) - len(known)
    return f"{text} (undefined in {lost})" if lost else text


def failed_run(result: CellResult) -> HealRun:
    """A cell without a healing run, as the summary lists it."""
    cell = result.cell
    return HealRun(
        "none", cell.title, False, model=cell.label, arm=cell.arm, failure=result.failure
    )


def _describe(config: SweepConfig, summary: Summary, results: list[CellResult]) -> str:
    reused = sum(r.reused for r in results)
    again = f" ({reused} of them finished earlier and not run again)" if reused else ""
    landscape = "".join(f"- {line}\n" for line in basin_sentences(results))
    return (
        f"Models {config.models}; arms {config.arms}; seeds {config.seeds}. "
        f"{len(results)} cells{again}.\n\n{markdown(summary)}"
        + (f"\n## Landscape\n\n{landscape}" if landscape else "")
    )


def sweep(config: SweepConfig) -> Summary:
    """Run the whole experiment and summarize it.

    Raises:
        SweepError: A cell failed; raised after all others ran and were summarized.
    """
    console = Console(config.verbosity)
    name = f"{config.models} x {config.arms} x seeds {config.seeds}"
    with run_logger.start(name, {"stage": "main"}) as run:
        run.params("main", as_params(config))
        if CONTROL in config.arm_list() and TREATMENT not in config.arm_list():
            console.say(
                f"note: {CONTROL} is not matched to anything, since {TREATMENT} is not among "
                "--arms: it gets noise of one standard deviation of each tensor"
            )
        results = Sweep(config, run).run_all(console)
        views = [r.view for r in results if r.view is not None]
        failures = [r.failure for r in results if r.failure]
        if not views:
            raise SweepError(failures)
        query = SummarizeConfig(output_dir=config.output_dir, verbosity=config.verbosity)
        lost = [failed_run(r) for r in results if r.failure]
        summary = summarize(query, views=views, failed=lost, parent=run, console=console)
        for line in basin_sentences(results):
            console.say(line)
        run.describe(_describe(config, summary, results))
        run.tags({"heal_runs": len(views), "reused_runs": sum(r.reused for r in results)})
        view = queries.share_view(run.experiment_id)
        console.say(f"in the MLflow UI: http://127.0.0.1:5000{view}")
        if failures:
            raise SweepError(failures)
    return summary
