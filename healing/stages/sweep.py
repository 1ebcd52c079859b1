"""Stage ``main``: models × arms × seeds, each attacked and healed, then summarized."""

from __future__ import annotations

import concurrent.futures
import math
import os
import pathlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from healing.config.arm_tags import arm_role, arm_takes, arms_of
from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.fingerprint import as_params
from healing.config.heal import HealConfig
from healing.config.healer import Healer
from healing.config.options import AUTO
from healing.config.presets import preset_for
from healing.config.shared import SAVING
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError, HealingError, SweepError
from healing.models.loading import resolve_device
from healing.registry import DAMAGE_CONTROL, SHAM, TREATMENT
from healing.reporting import run_page
from healing.reporting.markdown import markdown
from healing.stages.attack import ATTACK, checkpoint_of
from healing.stages.basin import BASIN
from healing.stages.cells.basin_outcome import BasinCell
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import resolve_from_model
from healing.stages.cells.sweep_plan import SweepCell, plan
from healing.stages.driver import Driver
from healing.stages.heal import HEAL
from healing.stages.summarize import OVERVIEW, show_summary, summarized
from healing.stages.terminal.console import Cells, Console
from healing.stages.tuning.healer_files import healers_of
from healing.statistics.heal_runs import HealRun
from healing.statistics.summary import Summary
from healing.tracking.git_version import checkout
from healing.tracking.output_folder import require_writable
from healing.tracking.queries import RunView
from healing.tracking.run import Run


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
        "tokenizer",
        "text_column",
        "split_rule",
        "batch_size",
        "sequence_length",
        "measurement_interval",
        "device",
        "output_dir",
        "cache_dir",
        "log_layers",
        "log_images",
        "log_model",
        *SAVING,
    )
    return {name: getattr(config, name) for name in names} | {"verbosity": "quiet"}


def attack_config(
    config: SweepConfig, cell: SweepCell, reference: str, direction: str = ""
) -> AttackConfig:
    """Resolved configuration of a cell's attack.

    Args:
        config: Of the sweep.
        cell: Says which attack.
        reference: Checkpoint that a damage control is matched to; empty = none.
        direction: Checkpoint that gives the direction of a ray; empty = none.
    """
    ranked = arm_takes(cell.arm, "noise_rank")
    return resolve_from_model(
        AttackConfig(
            model=cell.model,
            arm=cell.arm,
            seed=cell.seed,
            attack_steps=config.attack_steps,
            reference_checkpoint=reference,
            direction_checkpoint=direction,
            match=config.match_of(cell.arm) if reference else "norm",
            noise_draw=cell.draw,
            noise_rank=config.noise_rank if ranked else 1,
            **_shared(config),
        )
    )


def heal_config(
    config: SweepConfig, cell: SweepCell, source: str = "", healer: Healer | None = None
) -> HealConfig:
    """Resolved configuration of a cell's healing.

    Args:
        config: Of the sweep.
        cell: What is healed.
        source: Of the healer, as it was named.
        healer: Of the cell's model; ``None`` = the default one.

    Raises:
        ConfigError: A setting that was given contradicts the healer.
    """
    steps = config.healing_steps
    if steps == AUTO and healer is None:
        steps = preset_for(cell.model).sweep_healing_steps
    wanted = HealConfig(
        model=cell.model,
        arm=cell.arm,
        seed=cell.seed,
        healing_steps=steps,
        healing_lr=config.healing_lr,
        healer=source,
        sham=config.sham and cell.role != SHAM,
        log_text=config.log_text,
        register_as=config.register_as,
        **_shared(config),
    )
    return resolve_from_model(healer.applied(wanted) if healer else wanted)


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

    def __init__(self, config: SweepConfig, run: Run, driver: Driver) -> None:
        self.config, self.run, self.driver = config, run, driver
        self.healers = healers_of(config, driver.store)
        self.stopped = threading.Event()

    def _attack(self, driver: Driver, cell: SweepCell, attacks: dict[str, str]) -> pathlib.Path:
        for arm in filter(None, (cell.matched_to, cell.direction)):
            if arm not in attacks:
                raise ConfigError(f"the attack {arm} that it refers to failed")
        reference, direction = (attacks.get(a, "") for a in (cell.matched_to, cell.direction))
        settings = attack_config(self.config, cell, reference, direction)
        done = driver.run_cell(ATTACK, settings, parent=self.run, reuse=True)
        return checkpoint_of(done, driver.store)

    def _basin(self, driver: Driver, cell: SweepCell, healed: RunView) -> RunView | None:
        """The landscape of a healing run, where it is wanted."""
        if not self._wants_landscape(cell):
            return None
        shared = _shared(self.config)
        settings = BasinConfig(
            heal_run_id=healed.run_id,
            device=shared["device"],
            output_dir=shared["output_dir"],
            verbosity=shared["verbosity"],
        )
        done = driver.run_cell(BASIN, BasinCell(settings), parent=self.run, reuse=True)
        return driver.store.get_run(done.run_id)

    def run_cell(self, driver: Driver, cell: SweepCell, attacks: dict[str, str]) -> CellResult:
        """One cell: attack, healing, landscape; each is found again where it was run before.

        Args:
            driver: Of this cell.
            cell: What to run.
            attacks: Arm → checkpoint, of the same model and seed; gains this cell's.
        """
        path = ""
        if cell.role != SHAM:
            path = str(self._attack(driver, cell, attacks))
            attacks[cell.arm] = path
        healer = self.healers.get(cell.label, ("", None))
        heal_cell = HealCell(heal_config(self.config, cell, *healer), path)
        done = driver.run_first(HEAL, heal_cell, self.run)
        view = driver.store.get_run(done.run_id)
        return CellResult(cell, view, done.reused, basin=self._basin(driver, cell, view))

    def run_chain(self, chain: Sequence[SweepCell], cells: Cells) -> list[CellResult]:
        """The arms of one model and seed in order; a failing cell does not stop the others."""
        results: list[CellResult] = []
        attacks: dict[str, str] = {}
        for cell in chain:
            if self.stopped.is_set():
                break
            shown = cells.cell(self._runs(cell))
            driver = self.driver.within(self.driver.console.within(shown))
            try:
                result = self.run_cell(driver, cell, attacks)
            except HealingError as error:
                result = CellResult(cell, failure=f"{cell.title}: {error}")
            results.append(result)
            cells.over(shown, cell.title)
            self._tell(result)
        return results

    def _runs(self, cell: SweepCell) -> int:
        """Runs of a cell: the sham is healed only, a landscape comes last."""
        return (cell.role != SHAM) + 1 + self._wants_landscape(cell)

    def _wants_landscape(self, cell: SweepCell) -> bool:
        wanted = self.config.basin and not cell.draw
        return wanted and cell.role in (TREATMENT, DAMAGE_CONTROL)

    def _tell(self, result: CellResult) -> None:
        console = self.driver.console
        if result.failure:
            console.say(f"failed: {result.failure}")
        elif result.view is not None:
            console.detail(f"{result.cell.title}: {result.view.tags['verdict']}")

    def run_all(self) -> list[CellResult]:
        """Every chain, several at a time; results in the order of the plan.

        Threads, not processes: torch releases the interpreter lock in its kernels, each cell
        computes on one thread, and imports and corpora are shared.
        """
        chains = plan(self.config)
        workers = worker_count(self.config)
        with (
            self.driver.console.cells(sum(map(len, chains)), "sweep", "cell") as cells,
            concurrent.futures.ThreadPoolExecutor(workers) as pool,
        ):
            futures = [pool.submit(self.run_chain, chain, cells) for chain in chains]
            try:
                return [result for future in futures for result in future.result()]
            except BaseException:
                # Ctrl-C reaches this thread alone: cells under way end at their next safe point,
                # no other begins.
                self.stopped.set()
                self.driver.stop.set()
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
        counts, healthy = (
            _counted([view.tags[f"{state}_is_minimum"] for view in views])
            for state in ("collapsed", "healthy")
        )
        gain = [view.metrics.get("basin/collapsed/least_gain", math.nan) for view in views]
        fall, own = (
            [view.metrics.get(f"basin/{s}/best_probe_loss_drop", math.nan) for view in views]
            for s in ("collapsed", "healthy")
        )
        cosine = [view.metrics.get("basin/return_cosine", math.nan) for view in views]
        climb = [view.metrics.get("basin/climb/collapsed_healed", math.nan) for view in views]
        lines.append(
            f"{model} {arm}: collapsed state a minimum? {counts} of {len(views)} (healthy: "
            f"{healthy}); a step along the gradient gains at least {_range(gain)} nats, descent on "
            f"held-out text {_range(fall)} (healthy: {_range(own)}); climb on the straight path "
            f"collapsed → healed {_range(climb)} nats; cos(healing, −attack) {_range(cosine)}."
        )
    return lines


def _counted(answers: Sequence[str]) -> str:
    return ", ".join(f"{answer} in {answers.count(answer)}" for answer in dict.fromkeys(answers))


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


def _describe(
    config: SweepConfig, summary: Summary, results: list[CellResult], run_id: str, summary_id: str
) -> str:
    reused = sum(r.reused for r in results)
    again = f" ({reused} of them finished earlier and not run again)" if reused else ""
    landscape = [f"- {line}" for line in basin_sentences(results)]
    options = run_page.settings(config, device=resolve_device(config.device).type)
    return run_page.page(
        f"Models {config.models}; arms {config.arms}; seeds {config.seeds_text()}. "
        f"{len(results)} cells{again}.",
        run_id,
        [],
        run_page.repeat("main", options, checkout()),
        run_page.links(
            "Then",
            [
                ("the summary: report, tables, figures", run_page.run_link(summary_id)),
                ("all runs of this sweep", run_page.search_link("parent", run_id)),
            ],
        ),
        [markdown(summary)],
        ["", "## Landscape", "", *landscape] if landscape else [],
        picture=OVERVIEW if summary.groups else "",
        alt="mean recovery by arm, rank left and loss right",
    )


def sweep(config: SweepConfig, driver: Driver | None = None) -> Summary:
    """Run the whole experiment and summarize it.

    Raises:
        SweepError: A cell failed; raised after all others ran and were summarized.
    """
    driver = driver or Driver(Console(config.verbosity))
    console = driver.console
    name = f"{config.models} x {config.arms} x seeds {config.seeds_text()}"
    with driver.process(name, {"stage": "main"}, config.output_dir, view=True) as run:
        if config.system_metrics:
            run.system_metrics()
        run.params("main", as_params(config))
        require_writable(config.output_dir)
        driver.store.check_registry(config.register_as)
        roles = {arm: arm_role(arm) for arm in config.arm_list()}
        for arm in (a for a, role in roles.items() if role == DAMAGE_CONTROL):
            if TREATMENT not in roles.values():
                treatments = " or ".join(arms_of(TREATMENT))
                console.say(
                    f"note: {arm} is not matched to anything, since {treatments} is not among "
                    "--arms: it gets the strength 1 (noise of one standard deviation of each "
                    "tensor)"
                )
        results = Sweep(config, run, driver).run_all()
        views = [r.view for r in results if r.view is not None]
        failures = [r.failure for r in results if r.failure]
        if not views:
            raise SweepError(failures)
        query = SummarizeConfig(output_dir=config.output_dir, verbosity=config.verbosity)
        lost = [failed_run(r) for r in results if r.failure]
        summary, folder, summary_id = summarized(
            query, views=views, failed=lost, parent=run, driver=driver
        )
        show_summary(run, summary, folder)
        for line in basin_sentences(results):
            console.say(line)
        run.describe(_describe(config, summary, results, run.run_id, summary_id))
        run.tags({"heal_runs": len(views), "reused_runs": sum(r.reused for r in results)})
        if failures:
            raise SweepError(failures)
    return summary
