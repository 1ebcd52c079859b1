"""Stage ``main``: models × arms × seeds, each attacked and healed, then summarized."""

from __future__ import annotations

import math
from collections.abc import Sequence

from healing.config.arm_tags import arm_role, arms_of
from healing.config.fingerprint import as_params
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import RAY, SweepConfig
from healing.errors import SweepError
from healing.models.loading import resolve_device
from healing.registry import DAMAGE_CONTROL, TREATMENT
from healing.reporting import run_page
from healing.reporting.markdown import markdown, opening
from healing.stages.driver import Driver
from healing.stages.launching.chain import CellResult, at_one_commit, chains_of
from healing.stages.launching.launcher import Launcher
from healing.stages.launching.threads import ThreadLauncher
from healing.stages.summarize import OVERVIEW, show_summary, summarized
from healing.stages.terminal.console import Console
from healing.stages.tuning.healer_files import healers_of
from healing.statistics.heal_runs import HealRun
from healing.statistics.summary import Summary
from healing.tracking.git_version import checkout
from healing.tracking.output_folder import require_writable
from healing.tracking.queries import RunView


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
    why = result.failure.removeprefix(f"{cell.title}: ")  # the list has a column of names
    return HealRun("none", cell.title, False, model=cell.label, arm=cell.arm, failure=why)


def _device(config: SweepConfig, results: Sequence[CellResult]) -> str:
    """What cells were computed on: on a cluster this machine need not have it."""
    if config.launcher != RAY:
        return resolve_device(config.device).type
    told = {r.view.tags.get("device", "") for r in results if r.view is not None} - {""}
    return told.pop() if len(told) == 1 else config.device


def _describe(
    config: SweepConfig, summary: Summary, results: list[CellResult], run_id: str, summary_id: str
) -> str:
    reused = sum(r.reused for r in results)
    again = f" ({reused} of them finished earlier and not run again)" if reused else ""
    landscape = [f"- {line}" for line in basin_sentences(results)]
    options = run_page.settings(config, device=_device(config, results))
    cells = (
        f"Models {config.models}; arms {config.arms}; seeds {config.seeds_text()}. "
        f"{len(results)} cells{again}."
    )
    return run_page.page(
        opening(summary) if summary.groups else cells,
        run_id,
        [cells] if summary.groups else [],
        run_page.repeat("main", options, checkout()),
        run_page.links(
            "Then",
            [
                ("the summary: report, tables, figures", run_page.run_link(summary_id)),
                ("all runs of this sweep", run_page.search_link("mlflow.parentRunId", run_id)),
            ],
        ),
        [markdown(summary)],
        ["", "## Landscape", "", *landscape] if landscape else [],
        picture=OVERVIEW if summary.groups else "",
        alt="mean recovery by arm, rank left and loss right",
    )


def launcher_of(config: SweepConfig) -> Launcher:
    """The one that is asked for."""
    if config.launcher != RAY:
        return ThreadLauncher(config)
    # With it comes what predicts memory, which no other sweep needs.
    from healing.stages.launching.ray_launcher import RayLauncher

    return RayLauncher(config)


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
        with console.waiting("asking the Hub for the version of the text"):
            chains = at_one_commit(chains_of(config, healers_of(config, driver.store)))
        if texts := {f"{d}@{commit}" for chain in chains for d, commit in chain.commits}:
            run.tags({"texts": ", ".join(sorted(texts))})
        results = launcher_of(config).run(chains, driver, run)
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
