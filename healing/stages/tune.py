"""Stage ``tune``: the strongest healer of a model, on checkpoints that no verdict rests on."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from healing.config.attack import AttackConfig
from healing.config.fingerprint import as_params, fingerprint
from healing.config.heal import HealConfig
from healing.config.healer import HEALER_NAME, Healer
from healing.config.presets import model_slug
from healing.config.tune import METHOD, TuneConfig
from healing.errors import ConfigError
from healing.models.checkpoints import read_checkpoint
from healing.registry import METHODS
from healing.reporting import run_page
from healing.reporting.plots import tuning as figures
from healing.reporting.tuning import healer_sentence, trials_csv, tuning_markdown, value_text
from healing.stages.attack import ATTACK, checkpoint_of
from healing.stages.cells.heal import heal_code
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.cells.inputs import device_kind, resolve_from_model
from healing.stages.cells.trial import TrialCell, TrialOutcome
from healing.stages.driver import Driver
from healing.stages.stage import upload
from healing.stages.terminal.console import Console
from healing.stages.tuning.space import axes_of, settings_of
from healing.stages.tuning.study import Proposal, Study
from healing.stages.tuning.trial_stage import TRIAL, state_of
from healing.statistics.healer_trials import COMPLETE, PRUNED, Trial, best_so_far, winner
from healing.tracking.git_version import checkout
from healing.tracking.output_folder import run_folder
from healing.tracking.run import Run
from healing.tracking.run_files import write_json, write_text

PLACE = "priority5_healing/tuning"
"""Folder below ``output_dir`` that holds one folder per study."""
SHARED = (
    "model",
    "revision",
    "deduped",
    "tokenizer",
    "corpus",
    "max_documents",
    "text_column",
    "split_rule",
    "sequence_length",
    "probe_tokens",
    "measurements",
    "threads",
    "device",
    "output_dir",
    "cache_dir",
)
"""Fields that attack, healing and search have in common."""


@dataclass(frozen=True)
class Selected:
    """One checkpoint that healers are selected on.

    Attributes:
        arm: Of the attack.
        seed: Of attack and healing.
        path: Of the checkpoint.
        digest: Of its weights.
    """

    arm: str
    seed: int
    path: str
    digest: str


@dataclass(frozen=True)
class Tuned:
    """What a search found.

    Attributes:
        healer: The winner.
        trials: Every healer tried; the first is the default one.
        folder: With the study, the winner's file, table and figures.
    """

    healer: Healer
    trials: tuple[Trial, ...]
    folder: pathlib.Path


def _shared(config: TuneConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SHARED} | {"verbosity": "quiet"}


def selection(config: TuneConfig, run: Run, driver: Driver) -> list[Selected]:
    """The selection checkpoints, by arm and seed: attacked once, found again later."""
    found = []
    for seed in config.seed_list():
        for arm in config.arm_list():
            attack = AttackConfig(
                arm=arm,
                seed=seed,
                attack_steps=config.attack_steps,
                batch_size=config.batch_size,
                measurement_interval=config.measurement_interval,
                **_shared(config),
            )
            done = driver.run_cell(ATTACK, attack, parent=run, reuse=True)
            path = checkpoint_of(done, driver.store)
            found.append(Selected(arm, seed, str(path), read_checkpoint(path).digest))
    return found


def healing_of(config: TuneConfig, selected: Selected, settings: Mapping[str, Any]) -> HealConfig:
    """Resolved configuration of one healer's healing of one checkpoint."""
    steps = config.tokens // (settings["batch_size"] * settings["sequence_length"])
    values = _shared(config) | {
        "arm": selected.arm,
        "seed": selected.seed,
        "healing_steps": steps,
        "measurement_interval": steps // config.rungs,
        "save_healed": False,
    }
    return resolve_from_model(HealConfig(**(values | dict(settings))))


def identity_of(config: TuneConfig, selected: Sequence[Selected]) -> dict[str, Any]:
    """What trials must share to be compared, and proposals to be repeated."""
    lora = [METHODS.module("lora")] if METHOD in config.axis_list() else []
    plain = healing_of(config, selected[0], settings_of(config, {}))
    left_out = {"device", "output_dir", "cache_dir", "collapsed_checkpoint", "seed", "arm"}
    return {
        "healing": {k: v for k, v in as_params(plain).items() if k not in left_out},
        "checkpoints": [[s.arm, s.seed, s.digest] for s in selected],
        "tokens": config.tokens,
        "rungs": config.rungs,
        "axes": {
            axis.name: list(axis.choices) or [axis.low, axis.high] for axis in axes_of(config)
        },
        "sgd": [config.sgd_rate_ratio, config.sgd_momentum],
        "sampler": [config.sampler, config.seed, config.startup_trials, config.grid_rates],
        "pruner": config.pruner,
        "code": heal_code(plain, *lora),
        "device": device_kind(plain),
    }


class Search:
    """One search under way."""

    def __init__(self, config: TuneConfig, run: Run, driver: Driver) -> None:
        self.config, self.run, self.driver = config, run, driver
        self.selected = selection(config, run, driver)
        self.identity = identity_of(config, self.selected)
        arms = "-".join(config.arm_list())[:40]
        slug = model_slug(config.label)
        self.name = config.study or f"{slug}_{arms}_{fingerprint(self.identity)[:8]}"
        self.folder = run_folder(config.output_dir, PLACE, self.name)

    def cell(self, proposal: Proposal) -> TrialCell:
        """What is computed for a proposal."""
        settings = settings_of(self.config, proposal.values)
        healings = [healing_of(self.config, s, settings) for s in self.selected]
        return TrialCell(
            proposal.number,
            proposal.values,
            healings[0],
            tuple(HealCell(h, s.path) for h, s in zip(healings, self.selected, strict=True)),
            tuple(s.digest for s in self.selected),
            proposal.judge,
        )

    def try_out(self, study: Study, proposal: Proposal, driver: Driver) -> str:
        """Compute one trial and tell the study; a line on it."""
        done = driver.run_cell(TRIAL, self.cell(proposal), parent=self.run)
        assert done.report is not None, "a trial is never looked up"
        outcome: TrialOutcome = done.report.result
        facts = {
            "rank_recovery_pct": outcome.rank_recovery_pct,
            "loss_recovery_pct": outcome.loss_recovery_pct,
            "losses": list(outcome.losses),
            "tokens": outcome.tokens,
            "run_id": done.run_id,
            "settings": settings_of(self.config, proposal.values),
        }
        if state_of(outcome) == PRUNED:
            study.prune(proposal, facts)
        else:
            study.finish(proposal, outcome.loss, facts)
        values = ", ".join(f"{k} {value_text(v)}" for k, v in proposal.values.items())
        return f"{TRIAL.title(self.cell(proposal))}: {done.report.line} ({values})"

    def run_all(self, study: Study) -> None:
        """Trials until there are as many as asked for, or the grid is used up."""
        total, console = self.config.trials, self.driver.console
        with console.cells(total, f"tune {self.config.label}", "trial") as cells:
            for trial in study.trials():
                cells.over(cells.cell(1), f"trial {trial.number}")
            while len(study.trials()) < total:
                proposal = study.propose()
                if proposal is None:
                    console.say(f"the grid is used up after {len(study.trials())} healers")
                    return
                shown = cells.cell(1)
                line = self.try_out(study, proposal, self.driver.within(console.within(shown)))
                cells.over(shown, f"trial {proposal.number}")
                console.say(line)

    def healer(self, study: Study) -> Healer:
        """The winner.

        Raises:
            ConfigError: No healer went through.
        """
        trials = study.trials()
        best = winner(trials)
        if best is None:
            raise ConfigError(
                f"none of {len(trials)} healers got through {self.config.tokens:,} tokens: lower "
                "--rate-highest, or give the selection other --arms"
            )
        return Healer(
            settings=settings_of(self.config, best.values),
            model=self.config.label,
            arms=self.config.arm_list(),
            seeds=self.config.seed_list(),
            tried=len(trials),
            token_budget=self.config.tokens,
            loss=best.loss,
            default_loss=trials[0].loss,
            rank_recovery_pct=best.rank_recovery_pct,
            default_rank_recovery_pct=trials[0].rank_recovery_pct,
            trial=best.number,
            study=self.name,
            study_digest=study.digest,
        )

    def store(self, healer: Healer, study: Study) -> Tuned:
        """Write and log the winner, the table of trials and the figures."""
        trials, importances, folder = study.trials(), study.importances(), self.folder
        write_json(folder / HEALER_NAME, healer.entries())
        text = tuning_markdown(healer, trials, importances)
        write_text(folder / "tuning.md", text + "\n")
        write_text(folder / "trials.csv", trials_csv(trials))
        plots, title = folder / "plots", f"Healers of {self.config.label}, {self.config.arms}"
        figures.history(plots / "tuning_history.png", trials, title)
        figures.slices(plots / "tuning_slices.png", trials, title)
        if importances:
            figures.importance(plots / "tuning_importance.png", importances, title)
        self._log(healer, trials, importances, text)
        return Tuned(healer, tuple(trials), folder)

    def _log(
        self, healer: Healer, trials: Sequence[Trial], importances: Mapping[str, float], text: str
    ) -> None:
        lowest = best_so_far(trials)
        curve = [
            (number, {"trial_loss": trial.loss, "lowest_loss": low})
            for number, (trial, low) in enumerate(zip(trials, lowest, strict=True))
        ]
        summary = {
            "loss": healer.loss,
            "default_loss": healer.default_loss,
            "gain_nats": healer.default_loss - healer.loss,
            "rank_recovery_pct": healer.rank_recovery_pct,
            "default_rank_recovery_pct": healer.default_rank_recovery_pct,
            **{f"importance/{name}": share for name, share in importances.items()},
            "trials": float(len(trials)),
            "trials_complete": float(sum(t.state == COMPLETE for t in trials)),
        }
        final = {f"summary/{name}": value for name, value in summary.items()}
        self.run.history([*curve, (len(trials), final)])
        self.run.tags({**healer.tags(), "study": self.name, "study_digest": healer.study_digest})
        self.run.describe(self._page(text))
        upload(self.run, self.folder)

    def _page(self, text: str) -> str:
        """The run's description: the command that searches again stands before the long tables."""
        sentence, _, tables = text.partition("\n\n")
        options = run_page.settings(self.config, device=device_kind(self.config))
        note = "In another --output-dir: it goes on with a search that is there."
        repeat = run_page.repeat("tune", options, checkout(), note)
        return run_page.page(sentence, self.run.run_id, [], repeat, [tables], picture="")


def tune(config: TuneConfig, driver: Driver | None = None) -> Tuned:
    """Search the strongest healer of a model, and go on with a search that was left.

    Raises:
        ConfigError: Settings contradict each other or those of the study, another process is at it,
            or no healer went through.
        HealingError: As attack and healing.
    """
    driver = driver or Driver(Console(config.verbosity))
    title = f"tune {config.label} {config.arms} seeds {config.seeds}"
    tags = {"stage": "tune", "role": "parent", "model": config.label}
    with driver.process(title, tags, config.output_dir) as run:
        if config.system_metrics:
            run.system_metrics()
        config = resolve_from_model(config)
        run.params("tune", as_params(config))
        if METHOD in config.axis_list():
            METHODS.load("lora").check(HealConfig())
        search = Search(config, run, driver)
        with Study.opened(search.folder / "study.journal", config, search.identity) as study:
            search.run_all(study)
            found = search.store(search.healer(study), study)
        driver.console.say(healer_sentence(found.healer))
        driver.console.say(f"files: {found.folder / HEALER_NAME}")
    return found
