"""What a notebook calls: attack, heal, examine, sweep and summarize, tracked in MLflow or not.

The functions run the same stages as the command line. Nothing is changed for the caller: no
environment variable, no matplotlib backend, no number of threads.
"""

from __future__ import annotations

import atexit
import difflib
import functools
import pathlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from healing.config.attack import AttackConfig
from healing.config.basin import BasinConfig
from healing.config.heal import HealConfig
from healing.config.options import fields_of, flag_name
from healing.config.presets import MODELS, preset_for
from healing.config.summarize import SummarizeConfig
from healing.config.sweep import SweepConfig
from healing.errors import ConfigError
from healing.registry import ARMS, METHODS
from healing.results import AttackResult, HealResult, LandscapeResult, SummaryResult
from healing.stages.driver import Driver
from healing.stages.stage import Done
from healing.stages.terminal.console import Console
from healing.tracking.local_store import LocalStore
from healing.tracking.store import MlflowStore, Store

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from healing.measurements.probe import Measurement, Probe


@functools.cache
def _untracked() -> LocalStore:
    """Runs of this process that nobody tracks; shams among them are found again."""
    return LocalStore()


@functools.cache
def _scratch() -> str:
    """Where untracked runs write unless they are kept; gone with the process."""
    folder = tempfile.mkdtemp(prefix="llm-healing-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _driver(track: bool | str, progress: bool) -> Driver:
    store: Store = _untracked()
    if track:
        store = MlflowStore(track if isinstance(track, str) else "")
    return Driver(Console("normal" if progress else "quiet"), store)


def _config(kind: type, settings: Mapping[str, Any], keep: str | pathlib.Path | None) -> Any:
    """A configuration; an unknown setting is answered with the nearest known one.

    Raises:
        ConfigError: A setting is unknown or out of range.
    """
    known = [field.name for field, _, _ in fields_of(kind)]
    for name in settings:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f": did you mean {near[0]!r}?" if near else f": choose from {', '.join(known)}"
            raise ConfigError(f"unknown setting {name!r}{hint}")
    return kind(**{"output_dir": str(keep or _scratch()), **settings})


def _described(done: Done, store: Store) -> tuple[str, pathlib.Path, str, Store]:
    text = done.report.markdown if done.report else ""
    return done.run_id, done.folder, text, store


def attack(
    model: str = "nano",
    arm: str = "haep",
    *,
    seed: int = 0,
    track: bool | str = False,
    keep: str | pathlib.Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> AttackResult:
    """Attack a healthy model.

    Args:
        model: Name of a preset, Hub id or folder.
        arm: See :func:`arms`.
        seed: Of every named random stream.
        track: Log to MLflow: to the current experiment, or to the one named.
        keep: Folder for the files; ``None`` = one that goes with the process.
        progress: Whether a bar is shown.
        settings: Fields of :class:`healing.config.attack.AttackConfig`.

    Raises:
        HealingError: What is wrong and how to mend it.
    """
    from healing.stages.attack import ATTACK

    config = _config(AttackConfig, {"model": model, "arm": arm, "seed": seed, **settings}, keep)
    driver = _driver(track, progress)
    kept = config.output_dir if keep else ""
    with driver.process(ATTACK.title(config), {"stage": ATTACK.name}, kept) as run:
        done = driver.run_cell(ATTACK, config, run=run)
    return AttackResult(*_described(done, driver.store))


def heal(
    start: AttackResult | str | pathlib.Path,
    *,
    steps: int = 500,
    replicate: int = 0,
    sham: bool = False,
    track: bool | str = False,
    keep: str | pathlib.Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> HealResult:
    """Fine-tune a collapsed model on clean text and follow its recovery.

    Args:
        start: An attack's result, a checkpoint file, an artifact's URI, or an MLflow attack run.
        steps: Fine-tuning steps.
        replicate: Number of the run among those of the same start: another data order.
        sham: Also refer recovery to the healthy model through the same fine-tuning.
        track: As for :func:`attack`.
        keep: As for :func:`attack`.
        progress: Whether a bar is shown.
        settings: Fields of :class:`healing.config.heal.HealConfig`.

    Raises:
        HealingError: What is wrong and how to mend it.
    """
    from healing.stages.cells.heal_outcome import HealCell
    from healing.stages.heal import HEAL
    from healing.stages.healing_run.inputs import local_checkpoint

    driver = _driver(track, progress)
    settings = {"healing_steps": steps, "sham": sham, **settings}
    config = _config(HealConfig, {**settings, **_start(start)}, keep)
    with driver.process(HEAL.name, {"stage": HEAL.name}, config.output_dir if keep else "") as run:
        path = local_checkpoint(config, driver.store)
        done = driver.run_cell(HEAL, HealCell(config, str(path), replicate), run=run)
    return HealResult(*_described(done, driver.store))


def _start(start: AttackResult | str | pathlib.Path) -> dict[str, str]:
    if isinstance(start, AttackResult):
        return {"collapsed_checkpoint": str(start.checkpoint)}
    text = str(start)
    is_run = len(text) == 32 and set(text) <= set("0123456789abcdef")
    return {"attack_run_id" if is_run else "collapsed_checkpoint": text}


def landscape(
    healed: HealResult | str,
    *,
    track: bool | str = False,
    keep: str | pathlib.Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> LandscapeResult:
    """Examine the loss around and between the three states of a healing run.

    Args:
        healed: A healing run's result, or its MLflow run.
        track: As for :func:`attack`.
        keep: As for :func:`attack`.
        progress: Whether a bar is shown.
        settings: Fields of :class:`healing.config.basin.BasinConfig`.

    Raises:
        HealingError: What is wrong and how to mend it.
    """
    from healing.stages.basin import BASIN
    from healing.stages.cells.basin_outcome import BasinCell

    driver, named = _driver(track, progress), {"heal_run_id": str(healed)}
    if isinstance(healed, HealResult):
        named = {
            "healed_checkpoint": str(healed.checkpoint),
            "collapsed_checkpoint": str(healed.config["checkpoint"]),
        }
    config = _config(BasinConfig, {**settings, **named}, keep)
    with driver.process(
        BASIN.name, {"stage": BASIN.name}, config.output_dir if keep else ""
    ) as run:
        done = driver.run_cell(BASIN, BasinCell(config), run=run)
    return LandscapeResult(*_described(done, driver.store))


def sweep(
    models: Iterable[str] = ("nano",),
    arms: Iterable[str] = ("haep", "random_tokens", "random_text"),
    seeds: Iterable[int] | str = (0, 1, 2, 3, 4),
    *,
    track: bool | str = False,
    keep: str | pathlib.Path | None = None,
    progress: bool = True,
    **settings: Any,
) -> SummaryResult:
    """Models × arms × seeds: attack and heal each, then summarize.

    Args:
        models: Names, Hub ids, folders.
        arms: See :func:`arms`.
        seeds: Of every model; or as on the command line, ``"0-2,nano=0-9"``.
        track: As of :func:`attack`.
        keep: As of :func:`attack`.
        progress: As of :func:`attack`.
        **settings: See :func:`options`.

    Raises:
        SweepError: A cell failed; all others were run.
    """
    from healing.stages.sweep import sweep as run_sweep

    given = seeds if isinstance(seeds, str) else ",".join(map(str, seeds))
    named = {"models": ",".join(models), "arms": ",".join(arms), "seeds": given}
    config = _config(SweepConfig, {**settings, **named}, keep)
    return SummaryResult(run_sweep(config, _driver(track, progress)))


def summarize(
    runs: Sequence[HealResult] | str, *, filter: str = "", confidence: float = 0.95
) -> SummaryResult:
    """Pool healing runs: results of this process, or those of an MLflow experiment.

    Args:
        runs: Results, or an experiment's name.
        filter: MLflow filter string; for an experiment alone.
        confidence: Of the intervals.

    Raises:
        TrackingError: Nothing to summarize.
    """
    from healing.stages.summarize import BOOTSTRAP_SEED, find_runs
    from healing.stages.summarize_inputs import read_runs
    from healing.statistics.summary import summarize_runs

    if isinstance(runs, str):
        views = find_runs(SummarizeConfig(experiment=runs, filter=filter, confidence=confidence))
        found = read_runs(views)
    else:
        found = [read_runs([r.store.get_run(r.run_id)], store=r.store)[0] for r in runs]
    draws = np.random.default_rng(BOOTSTRAP_SEED)
    return SummaryResult(summarize_runs(found, confidence, draws))


def measure(
    model: str | PreTrainedModel, *, probe: Probe | None = None, device: str = "auto"
) -> Measurement:
    """Effective rank, perplexity and spectra of a model on a clean probe.

    Args:
        model: Name, Hub id or folder; or a model that is loaded already, with a probe.
        probe: What to measure on; ``None`` = the probe of the model's preset.
        device: Where a model that is named is loaded.

    Raises:
        ConfigError: A loaded model without a probe: which text it reads is not known.
    """
    from healing.config.shared import BaseConfig
    from healing.stages.cells.inputs import load_inputs, resolve_from_model

    if not isinstance(model, str):
        if probe is None:
            raise ConfigError("a loaded model needs probe=Probe(windows): token ids it can read")
        return probe.measure(model)
    _, loaded, own = load_inputs(resolve_from_model(BaseConfig(model=model, device=device)))
    return (probe or own).measure(loaded.model)


def arms() -> dict[str, str]:
    """Name → what the attack is, of the arms that are built in and of plug-ins."""
    return {name: ARMS.facts(name).help for name in ARMS.names()}


def methods() -> dict[str, str]:
    """Name → what is trained, of the healing methods that are built in and of plug-ins."""
    return {name: METHODS.facts(name).help for name in METHODS.names()}


def models() -> dict[str, str]:
    """Name → where the weights come from."""
    return {name: preset_for(name).source for name in MODELS}


def options(stage: str) -> dict[str, str]:
    """Setting → help, of ``attack``, ``heal``, ``landscape`` or ``sweep``.

    Raises:
        ConfigError: There is no such stage.
    """
    kinds = {
        "attack": AttackConfig, "heal": HealConfig, "landscape": BasinConfig, "sweep": SweepConfig,
    }  # fmt: skip
    if stage not in kinds:
        raise ConfigError(f"no stage {stage!r}: choose from {', '.join(kinds)}")
    return {f.name: f"{f.metadata['help']} ({flag_name(f.name)})" for f, _, _ in
            fields_of(kinds[stage])}  # fmt: skip
