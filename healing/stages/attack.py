"""Stage ``attack``: hurt a healthy model, measure the damage, store the collapsed checkpoint."""

from __future__ import annotations

import math
import pathlib
import time
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from healing.attacks.base import AttackRecord
from healing.config.attack import AttackConfig
from healing.config.fingerprint import NOT_SETTINGS, as_params, fingerprint
from healing.config.resolve import resolve_from_presets
from healing.config.shared import RAW_DATA, BaseConfig
from healing.measurements.spectrum import ROWS_PER_DIMENSION
from healing.models.blocks import embedding_matrix
from healing.models.checkpoints import CHECKPOINT_NAME, read_checkpoint, save_checkpoint
from healing.models.loading import LoadedModel
from healing.reporting.plots import runs as runs_figures
from healing.stages.cells.attack import (
    AttackOutcome,
    attack_cell,
    attack_code,
    attack_name,
    noise_match,
)
from healing.stages.cells.inputs import resolve_from_model, use_threads
from healing.stages.console import Console
from healing.tracking import queries, run_logger
from healing.tracking.run_files import JsonLines, start_folder, write_json
from healing.tracking.run_logger import RunLogger


def raw_data_folder(output_dir: str, name: str) -> pathlib.Path:
    """Local folder of one run."""
    return pathlib.Path(output_dir).expanduser().resolve() / RAW_DATA / name


def describe(outcome: AttackOutcome) -> str:
    """Markdown description of an attack run."""
    s, damage, config = outcome.summary(), outcome.damage, outcome.config
    lines = [
        f"Attack **{config.arm}** on **{config.label}**, seed {config.seed}: "
        f"**{damage.spectral_state}**.",
        "",
        "| | healthy | after the attack | change |",
        "|---|---|---|---|",
        f"| effective rank (mean over blocks) | {s['healthy_effective_rank']:.2f} | "
        f"{s['collapsed_effective_rank']:.2f} | {-s['rank_reduction_pct']:+.1f} % |",
        f"| perplexity | {s['healthy_perplexity']:.4g} | {s['collapsed_perplexity']:.4g} | "
        f"x {s['perplexity_ratio']:.4g} |",
    ]
    if outcome.catalyst:
        c = outcome.catalyst
        lines += [
            "",
            f"Catalyst search **{c.status}**: alignment {c.alignment:.4f}, random tokens "
            f"{s['random_alignment_mean']:.4f} (highest of {len(c.random_alignments)}: "
            f"{s['random_alignment_max']:.4f}).",
        ]
    if "rayleigh_quotient" in s:
        lines += [
            "",
            f"Curvature of the clean loss along the catalyst's gradient: "
            f"{s['rayleigh_quotient']:.4g}, percentile {s['rayleigh_percentile']:.0f} among "
            f"{config.rayleigh_draws} random directions (mean {s['rayleigh_random_mean']:.4g}).",
        ]
    if noise_match(config) in ("loss", "rank"):
        reached = outcome.last.diagnostics
        lines += [
            "",
            f"Noise matched to the reference's {config.match} within "
            f"{abs(reached['match_error_pct']):.2f} % at {reached['noise_scale']:.4g} times its "
            f"weight change, after {outcome.last.step} scales tried.",
        ]
    return "\n".join(lines)


def _tags(outcome: AttackOutcome) -> dict[str, Any]:
    tags = {
        "fingerprint": outcome.fingerprint,
        "spectral_state": outcome.damage.spectral_state,
        "attack_status": outcome.status,
        "target_reached": str(outcome.reached_target).lower(),
    }
    if outcome.catalyst:
        tags["catalyst"] = outcome.catalyst.status
    if noise_match(outcome.config):
        tags["noise_match"] = noise_match(outcome.config)
    return tags | dict(outcome.preparation.statuses)


def _reference_facts(config: AttackConfig) -> dict[str, str]:
    """What noise was matched to: which state, by which arm, made how. Noise matched to attacks of
    other arms or settings is other noise, and pairs with the attack it was matched to.
    """
    if not config.reference_checkpoint:
        return {}
    made = read_checkpoint(pathlib.Path(config.reference_checkpoint)).config
    settings = {k: v for k, v in made.items() if k not in NOT_SETTINGS}
    return {
        "reference_arm": made.get("arm", "unknown"),
        "reference_settings": fingerprint(settings),
        "reference_fingerprint": made.get("fingerprint", ""),
    }


def _store(run: RunLogger, outcome: AttackOutcome, folder: pathlib.Path) -> pathlib.Path:
    config = outcome.config
    checkpoint = folder / "checkpoints" / CHECKPOINT_NAME
    save_checkpoint(
        checkpoint,
        outcome.loaded.model,
        outcome.last.step,
        f"{config.label} after {outcome.last.step} steps of {config.arm}, seed {config.seed}: "
        f"{outcome.damage.spectral_state}",
        {
            **as_params(config),
            "noise_match": noise_match(config),
            **_reference_facts(config),
            "code": attack_code(),
            "fingerprint": outcome.fingerprint,
            "attack_run_id": run.run_id,
            "healthy_digest": outcome.loaded.digest,
            "model_commit": outcome.loaded.commit,
            "corpus_digests": outcome.digests,
        },
    )
    summary = {**outcome.summary(), **_tags(outcome), "attack_run_id": run.run_id}
    if outcome.catalyst:
        summary["catalyst_tokens"] = outcome.catalyst.tokens.tolist()
        summary["catalyst_history"] = list(outcome.catalyst.history)
    write_json(folder / "attack_summary.json", summary)
    states = {"healthy": outcome.healthy, "collapsed": outcome.collapsed}
    spectra = {name: m.mean_spectrum() for name, m in states.items()}
    write_json(folder / "spectra.json", spectra)
    runs_figures.spectral_decay(folder / "plots" / "spectral_decay.png", spectra)
    return checkpoint


def upload(run: RunLogger, folder: pathlib.Path) -> None:
    """Store every file of a local run folder as artifacts, in the same layout."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            parent = path.parent.relative_to(folder).as_posix()
            run.artifact(path, None if parent == "." else parent)


def warn_of_few_rows(console: Console, config: BaseConfig, loaded: LoadedModel) -> None:
    """Say so where the probe has fewer rows per dimension than small eigenvalues need."""
    hidden = embedding_matrix(loaded.model).shape[1]
    rows = int(config.probe_tokens) * (1 - 1 / config.sequence_length)
    if rows < ROWS_PER_DIMENSION * hidden:
        console.say(
            f"warning: {rows:.0f} probe rows for {hidden} hidden dimensions, fewer than "
            f"{ROWS_PER_DIMENSION} per dimension: raise --probe-tokens"
        )


def log_corpora(run: RunLogger, config: Any, digests: dict[str, str], used: dict[str, str]) -> None:
    """Record the splits that a run used: split name → what for."""
    for split, context in used.items():
        facts = {"corpus": config.corpus, "split": split}
        run.dataset(f"{pathlib.Path(config.corpus).name}-{split}", digests[split], context, facts)


def open_run(
    parent: RunLogger | None, title: str, tags: dict[str, Any]
) -> AbstractContextManager[RunLogger]:
    """The process' own run, or a child of the given one."""
    if parent is None:
        return run_logger.start(title, tags)
    return run_logger.child(parent, title, {**tags, "parent": parent.run_id})


def with_reference(config: AttackConfig) -> AttackConfig:
    """The configuration with the checkpoint of its reference run, if it names one.

    Raises:
        TrackingError: There is no such run, or it holds no checkpoint.
    """
    if not config.reference_run_id:
        return config
    run = queries.get_run(config.reference_run_id)
    path = queries.download(f"runs:/{run.run_id}/checkpoints/{CHECKPOINT_NAME}")
    return replace(config, reference_checkpoint=str(path), reference_run_id="")


def attack(
    config: AttackConfig, *, parent: RunLogger | None = None, console: Console | None = None
) -> tuple[str, pathlib.Path]:
    """Run, log and store one attack.

    Returns:
        MLflow run id and the local checkpoint.
    """
    console = console or Console(config.verbosity)
    config = with_reference(resolve_from_presets(config))
    title = f"attack {config.label} {config.arm} seed {config.seed}"
    own = {"stage": "attack", "arm": config.arm, "model": config.label}
    use_threads(config)
    with open_run(parent, title, own) as run:
        config = resolve_from_model(config)
        run.params("attack", as_params(config))
        if config.reference_checkpoint:
            made = read_checkpoint(pathlib.Path(config.reference_checkpoint)).config
            run.tags({"reference_run_id": made.get("attack_run_id", "")})
        trajectory: list[tuple[int, dict[str, float]]] = []
        files: dict[str, Any] = {}
        begin = time.perf_counter()
        with console.bar(int(config.attack_steps), title) as bar:

            def on_start(mark: str, loaded: LoadedModel, digests: dict[str, str]) -> None:
                run.n_params(loaded.n_params)
                run.tags(loaded.tags)
                warn_of_few_rows(console, config, loaded)
                log_corpora(run, config, digests, {"attack": "attack", "probe": "probe"})
                files["folder"] = raw_data_folder(config.output_dir, attack_name(config, mark))
                start_folder(files["folder"], as_params(config))
                files["lines"] = JsonLines(files["folder"] / "metrics.jsonl")
                run.rescue(files["folder"] / "config.json", files["lines"].path)

            def on_record(record: AttackRecord) -> None:
                values = record.metrics()
                run.metrics({k: v for k, v in values.items() if not math.isnan(v)}, record.step)
                seconds = time.perf_counter() - begin
                files["lines"].append({"step": record.step, "seconds": seconds, **values})
                trajectory.append((record.step, values))
                bar.set_postfix_str(
                    f"rank {values['effective_rank']:.1f}, perplexity {values['perplexity']:.3g}"
                )
                bar.update(record.step - bar.n)

            outcome = attack_cell(config, on_record, on_start)
        folder = files["folder"]
        run.metrics({f"summary/{k}": v for k, v in outcome.summary().items()}, outcome.last.step)
        run.tags(_tags(outcome))
        checkpoint = _store(run, outcome, folder)
        runs_figures.rank_collapse(
            folder / "plots" / "rank_collapse.png", trajectory, config.arm, config.label
        )
        run.describe(describe(outcome))
        upload(run, folder)
        s = outcome.summary()
        catalyst = f", catalyst {outcome.catalyst.status}" if outcome.catalyst else ""
        console.detail(
            f"{title}: {outcome.damage.spectral_state}, rank {s['healthy_effective_rank']:.1f} → "
            f"{s['collapsed_effective_rank']:.1f}, perplexity {s['healthy_perplexity']:.3g} → "
            f"{s['collapsed_perplexity']:.3g}{catalyst}"
        )
        return run.run_id, checkpoint
