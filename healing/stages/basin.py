"""Stage ``basin``: is the collapsed state of a healing run a minimum, and what lies around it?"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from healing.config.arm_tags import arm_label
from healing.config.basin import BasinConfig
from healing.config.paths import local_path
from healing.errors import CheckpointError, TrackingError
from healing.models.checkpoints import CHECKPOINT_NAME, HEALED_NAME, read_checkpoint
from healing.reporting import run_page
from healing.reporting.phrases import minimum_text
from healing.reporting.plots import basin as figures
from healing.reporting.plots.style import for_a_page
from healing.stages.cells.basin import STATES, basin_cell, inputs_of, resolve_from_checkpoint
from healing.stages.cells.basin_outcome import BasinCell, BasinOutcome
from healing.stages.cells.events import Record
from healing.stages.cells.inputs import device_kind, use_threads
from healing.stages.driver import Driver
from healing.stages.stage import (
    Report,
    StageDefaults,
    Tools,
    checkpoint_file,
    run_of,
    settled,
)
from healing.stages.terminal.console import Console
from healing.tracking.git_version import checkout
from healing.tracking.queries import CELL_KEY, RunView
from healing.tracking.run_files import write_json
from healing.tracking.snapshots import Saving
from healing.tracking.store import Store

SHOWN = (
    "loss",
    "gradient_norm",
    "gradient_snr",
    "least_gain",
    "most_gain",
    "lambda_max",
    "lambda_min",
    "trace",
    "descent_probe_loss_drop",
    "best_probe_loss_drop",
    "best_probe_loss_drop_error",
    "best_loss_drop",
)
"""Numbers of a state in the description's table."""


def _collapsed_of(view: RunView, store: Store) -> pathlib.Path | None:
    """The checkpoint that a healing run started from; ``None`` = the healthy model (a sham)."""
    attack_id, path = view.tags.get("attack_run_id", ""), view.tags.get("checkpoint", "")
    if not path:
        return None
    local = local_path(path, f"tag checkpoint of run {view.run_id}:")
    if attack_id:
        try:
            local = store.download(f"runs:/{attack_id}/checkpoints/{CHECKPOINT_NAME}")
        except TrackingError:
            if not local.is_file():
                raise
    found = read_checkpoint(local)
    wanted = view.tags.get("checkpoint_id", "")
    if wanted and wanted not in (found.config.get("fingerprint"), found.digest):
        raise CheckpointError(
            f"{local} is not the checkpoint that run {view.run_id} healed (its checkpoint_id is "
            f"{wanted}): restore that file, or name both files with --collapsed-checkpoint and "
            "--healed-checkpoint"
        )
    return local


def _states_of(run_id: str, store: Store) -> tuple[pathlib.Path | None, pathlib.Path]:
    """Collapsed and healed checkpoint of a healing run, checked against its tags."""
    view = run_of(run_id, "heal", "--heal-run-id", store)
    run_id = view.run_id
    if view.tags.get("stage") != "heal" or view.tags.get("role") == "parent":
        kind = "the parent of healing runs" if view.tags.get("role") else "not a healing run"
        raise CheckpointError(f"run {run_id} is {kind}: name a single healing run (stage heal)")
    try:
        healed = store.download(f"runs:/{run_id}/checkpoints/{HEALED_NAME}")
    except TrackingError as error:
        raise TrackingError(
            f"healing run {run_id} stored no {HEALED_NAME}: heal again with --save-healed true"
        ) from error
    stored = read_checkpoint(healed).config.get("fingerprint")
    if stored != view.tags.get("fingerprint"):
        raise CheckpointError(
            f"{HEALED_NAME} of run {run_id} has the fingerprint {stored}, the run "
            f"{view.tags.get('fingerprint')}: the artifact is of another run"
        )
    return _collapsed_of(view, store), healed


def find_cell(config: BasinConfig, store: Store) -> BasinCell:
    """What to examine, with every ``auto`` resolved from the healed checkpoint.

    Raises:
        ConfigError: Nothing, or too much, is named.
        CheckpointError: A file is missing or is not what it is given as.
        TrackingError: No such run or artifact.
    """
    config.require_source()
    collapsed: pathlib.Path | None
    if config.heal_run_id:
        collapsed, healed = _states_of(config.heal_run_id, store)
    else:
        given, flag = config.collapsed_checkpoint, "--collapsed-checkpoint"
        collapsed = checkpoint_file(given, "attack", CHECKPOINT_NAME, flag, store)
        given, flag = config.healed_checkpoint, "--healed-checkpoint"
        healed = checkpoint_file(given, "heal", HEALED_NAME, flag, store)
    resolved = resolve_from_checkpoint(config, read_checkpoint(healed), healed)
    return BasinCell(resolved, str(collapsed or ""), str(healed))


def describe(outcome: BasinOutcome, run_id: str) -> str:
    """Markdown description: the statement, its evidence, the tables."""
    collapsed, made = outcome.states["collapsed"].statement, outcome.made
    heal_run_id = made.get("heal_run_id", "")
    options = {"heal_run_id": heal_run_id, "device": device_kind(inputs_of(outcome.cell.config))}
    if not heal_run_id:
        cell = outcome.cell
        options |= {"collapsed_checkpoint": cell.collapsed, "healed_checkpoint": cell.healed}
    needs = "It reads the healing run's checkpoints from this store (MLFLOW_TRACKING_URI)."
    return run_page.page(
        f"**Is the collapsed state a minimum? {collapsed.answer}**: {collapsed.because}.",
        run_id,
        [],
        run_page.repeat(
            "basin", run_page.settings(outcome.cell.config, **options), checkout(), needs
        ),
        run_page.PART_OF,
        run_page.links(
            "Comes from",
            [
                ("the healing run", run_page.run_link(heal_run_id)),
                ("the attack", run_page.run_link(made.get("attack_run_id", ""))),
            ],
        ),
        _evidence(outcome),
        alt="loss along the straight paths between the states",
    )


def _evidence(outcome: BasinOutcome) -> list[str]:
    """What the statements rest on."""
    healthy = outcome.states["healthy"].statement
    lines = [
        f"The healthy state, by the same rule: {healthy.answer} ({healthy.because}).",
        "",
        *(f"* {state}: **{r.statement.answer}** ({r.statement.because}). {r.statement.evidence}."
          for state, r in outcome.states.items()),
        "",
        "| | " + " | ".join(STATES) + " |",
        "|---|" + "---|" * len(STATES),
    ]  # fmt: skip
    tables = [report.metrics() for report in outcome.states.values()]
    lines += [
        f"| {name} | " + " | ".join(f"{t[name]:.4g}" for t in tables) + " |" for name in SHOWN
    ]
    lines += ["", "| straight path | barrier (nats) | at (%) | climb (nats) |", "|---|---|---|---|"]
    for name, path in outcome.paths.items():
        at = f"{100 * path.barrier_position:.0f}" if path.barrier > 0 else "–"
        note = path.reason or f"{path.barrier:.4g} | {at}"
        row = f"{note} | {path.climb:.4g}" if not path.reason else f"{note} | |"
        lines.append(f"| {name.replace('_', ' → ')} | {row} |")
    return [*lines, "", _angle(outcome)]


def _angle(outcome: BasinOutcome) -> str:
    d = outcome.displacement
    angle = f"undefined ({d.reason})" if d.reason else f"{d.return_cosine:.4f}"
    return (
        f"cos(healing step, −attack step) {angle}; ‖attack step‖ {d.attack_norm:.4g}, "
        f"‖healing step‖ {d.healing_norm:.4g}, left to the healthy state {d.remaining_norm:.4g}, "
        f"of ‖W‖ {d.healthy_norm:.4g}."
    )


def _tags(outcome: BasinOutcome) -> dict[str, Any]:
    made, collapsed = outcome.made, outcome.states["collapsed"].statement
    reasons = {"return_cosine_undefined_reason": outcome.displacement.reason}
    reasons |= {f"barrier_undefined_reason.{n}": p.reason for n, p in outcome.paths.items()}
    return {
        **outcome.statements(),
        "collapsed_is_minimum_evidence": f"{collapsed.because}: {collapsed.evidence}",
        "fingerprint": outcome.fingerprint,
        "heal_run_id": made.get("heal_run_id", ""),
        "attack_run_id": made.get("attack_run_id", ""),
        **{name: text for name, text in reasons.items() if text},
    }


def _densities(outcome: BasinOutcome) -> dict[str, Any]:
    """Nodes and weights of the spectral density by state, one row per probe."""
    return {
        state: {
            "dimension": report.density.dimension,
            "nodes": report.density.nodes.tolist(),
            "weights": report.density.weights.tolist(),
        }
        for state, report in outcome.states.items()
    }


def _write_files(outcome: BasinOutcome, folder: pathlib.Path) -> None:
    """Summary, paths, densities and figures."""
    statements = {name: report.statement for name, report in outcome.states.items()}
    summary = {
        **outcome.metrics(),
        **_tags(outcome),
        "evidence": {name: f"{s.because}: {s.evidence}" for name, s in statements.items()},
    }
    write_json(folder / "basin_summary.json", summary)
    paths = {
        name: {"positions": path.positions, "losses": path.losses, "excess": path.excess}
        for name, path in outcome.paths.items()
    }
    write_json(folder / "paths.json", paths)
    write_json(folder / "spectral_density.json", _densities(outcome))
    config, plots = outcome.cell.config, folder / "plots"
    run = f"{config.label}, {arm_label(outcome.cell.arm)}, seed {config.seed}"
    figures.loss_barriers(
        plots / "loss_barriers.png", outcome.paths, f"Loss on straight paths: {run}"
    )
    for_a_page(plots / "loss_barriers.png", folder / run_page.PICTURE)
    densities = {name: report.density for name, report in outcome.states.items()}
    figures.spectral_density(
        plots / "spectral_density.png",
        densities,
        _linear_scale(outcome),
        f"Hessian of {run} ({config.density_probes + 1} probes)",
    )
    evidence = {name: report.evidence for name, report in outcome.states.items()}
    answers = ", ".join(f"{name} {s.answer}" for name, s in statements.items())
    figures.gradient_and_eigenvalues(
        plots / "gradient_and_eigenvalues.png", evidence, f"{run}. Minimum? {answers}"
    )


def _linear_scale(outcome: BasinOutcome) -> float:
    """A power of ten about a hundredth of the smallest finite λ_max: where the bulk ends."""
    tops = [report.evidence.curvature.scale for report in outcome.states.values()]
    known = torch.tensor([top for top in tops if 0 < top < float("inf")], dtype=torch.float64)
    if not len(known):
        return 1.0
    return float(10 ** torch.round(torch.log10(known.min() / 100)))


def _path_points(outcome: BasinOutcome) -> list[tuple[int, dict[str, float]]]:
    """The losses on each straight path; the step is the percent of the way."""
    return [
        (round(100 * a), {f"path/{name}_loss": loss, f"path/{name}_excess": excess})
        for name, path in outcome.paths.items()
        for a, loss, excess in zip(path.positions, path.losses, path.excess, strict=True)
    ]


class BasinStage(StageDefaults):
    """From a healing run to the landscape around its three states."""

    name = "basin"

    def title(self, cell: BasinCell) -> str:
        """``basin nano haep seed 0``."""
        if not cell.healed:
            return "basin"
        return f"basin {cell.config.label} {cell.arm} seed {cell.config.seed}"

    def tags(self, cell: BasinCell) -> dict[str, Any]:
        """What runs are grouped by."""
        if not cell.healed:
            return {}
        key = {CELL_KEY: cell.key} if cell.key else {}
        return {"model": cell.config.label, "arm": cell.arm, **key}

    def params(self, cell: BasinCell) -> dict[str, Any]:
        """The configuration, with the arm."""
        return {**settled(cell.config), "arm": cell.arm}

    def output_dir(self, cell: BasinCell) -> str:
        """As configured."""
        return cell.config.output_dir

    def saving(self, cell: BasinCell) -> Saving:
        """After every part: numbers, a vector of the weights' size at most, and hours where the
        model is large.
        """
        return Saving(steps=1)

    def prepare(self, cell: BasinCell, tools: Tools) -> BasinCell:
        """Find the states that the configuration names."""
        cell = replace(find_cell(cell.config, tools.store), key=cell.key)
        use_threads(inputs_of(cell.config))
        return cell

    cell = staticmethod(basin_cell)

    def store(
        self, outcome: BasinOutcome, records: Sequence[Record], folder: pathlib.Path, run_id: str
    ) -> Report:
        """The summary, paths, densities and three figures."""
        _write_files(outcome, folder)
        answers = ", ".join(
            minimum_text(name, report.metrics(), report.statement.answer)
            for name, report in outcome.states.items()
        )
        line = f"{self.title(outcome.cell)}: a minimum? {answers}"
        points = [(0, outcome.metrics()), *_path_points(outcome)]
        return Report(points, _tags(outcome), describe(outcome, run_id), line, result=outcome)


BASIN = BasinStage()


def basin(config: BasinConfig, driver: Driver | None = None) -> BasinOutcome:
    """Examine, log and store the landscape of one healing run.

    Raises:
        ConfigError: Nothing to examine is named, or a budget does not fit.
        CheckpointError: The states do not belong together.
        CorpusError: The ``attack`` split is too small.
        TrackingError: No such run or artifact.
    """
    driver = driver or Driver(Console(config.verbosity))
    with driver.process(BASIN.name, {"stage": BASIN.name}, config.output_dir) as run:
        if config.system_metrics:
            run.system_metrics()
        done = driver.run_cell(BASIN, BasinCell(config), run=run)
    assert done.report is not None, "a run that was not looked up has its report"
    outcome: BasinOutcome = done.report.result
    return outcome
