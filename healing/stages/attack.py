"""Stage ``attack``: hurt a healthy model, measure the damage, store the collapsed checkpoint."""

from __future__ import annotations

import contextlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from healing.config.arm_tags import arm_label, arm_role, arm_tags
from healing.config.attack import AttackConfig
from healing.config.fingerprint import NOT_SETTINGS, as_params, fingerprint
from healing.config.options import flag_name
from healing.config.resolve import resolve_from_presets
from healing.errors import CheckpointError
from healing.models.checkpoints import (
    CHECKPOINT_NAME,
    HEALED_NAME,
    read_checkpoint,
    save_checkpoint,
)
from healing.registry import DAMAGE_CONTROL, NEEDS
from healing.reporting import run_page
from healing.reporting.phrases import quantity_text
from healing.reporting.plots import runs as figures
from healing.reporting.plots.layers import rank_map
from healing.stages.cells.attack import (
    AttackOutcome,
    attack_cell,
    attack_code,
    noise_match,
    reference_tags,
)
from healing.stages.cells.events import Record
from healing.stages.cells.inputs import device_kind, resolve_from_model, use_threads
from healing.stages.cells.recollapse import read_healed, resolve_from_healed
from healing.stages.driver import Driver
from healing.stages.stage import (
    Done,
    Report,
    StageDefaults,
    Tools,
    checkpoint_file,
    headlines,
    model_of,
    pictures_of,
    points_of,
    run_of,
)
from healing.stages.terminal.console import Console
from healing.tracking.git_version import checkout
from healing.tracking.run_files import write_json
from healing.tracking.store import Store


def describe(outcome: AttackOutcome, run_id: str) -> str:
    """Markdown description of an attack run."""
    s, damage, config = outcome.summary(), outcome.damage, outcome.config
    rows = (
        (
            "effective rank (mean over blocks)",
            "effective_rank",
            f"{-s['rank_reduction_pct']:+.1f} %",
        ),
        ("loss (nats per token)", "loss", ""),
        ("perplexity", "perplexity", f"× {quantity_text(s['perplexity_ratio'])}"),
    )
    return run_page.page(
        f"**{damage.spectral_state.capitalize()}**: {config.label} after "
        f"{arm_label(config.arm)}, seed {config.seed}. Effective rank "
        f"{quantity_text(s['healthy_effective_rank'])} → "
        f"**{quantity_text(s['collapsed_effective_rank'])}**, perplexity "
        f"{quantity_text(s['healthy_perplexity'])} → {quantity_text(s['collapsed_perplexity'])}.",
        run_id,
        [
            "| | healthy | after the attack | change |",
            "|---|---|---|---|",
            *(f"| {name} | {quantity_text(s[f'healthy_{key}'])} | "
              f"{quantity_text(s[f'collapsed_{key}'])} | {change} |" for name, key, change in rows),
        ],
        _repeat(outcome),
        run_page.PART_OF,
        run_page.links("Comes from", _origins(outcome)),
        run_page.links(
            "Then",
            [
                ("its healing runs", run_page.search_link("attack_run_id", run_id)),
                ("controls matched to it", run_page.search_link("reference_run_id", run_id)),
            ],
        ),
        _findings(outcome),
        alt="effective rank and perplexity against attack steps",
    )  # fmt: skip


def _referred(outcome: AttackOutcome) -> dict[str, str]:
    """The runs that an attack refers to, by the option that names them."""
    found = dict(reference_tags(outcome.config))
    if outcome.start:
        found["start_run_id"] = outcome.start.checkpoint.config.get("heal_run_id", "")
    return found


def _repeat(outcome: AttackOutcome) -> list[str]:
    """The command that attacks in the same way."""
    also: dict[str, Any] = {"device": device_kind(outcome.config), **_referred(outcome)}
    if healed := also.pop("start_run_id", ""):
        also["start_checkpoint"] = f"runs:/{healed}/checkpoints/{HEALED_NAME}"
    needs = also.keys() - {"device"}
    note = "It reads the runs that it names from this store (MLFLOW_TRACKING_URI)." if needs else ""
    return run_page.repeat("attack", run_page.settings(outcome.config, **also), checkout(), note)


def _origins(outcome: AttackOutcome) -> list[tuple[str, str]]:
    found = _referred(outcome)
    named = {
        "reference_run_id": "the attack whose damage it is matched to",
        "direction_run_id": "the attack whose direction it takes",
        "start_run_id": "the healing run whose weights it attacks again",
    }
    return [(text, run_page.run_link(found.get(name, ""))) for name, text in named.items()]


def _findings(outcome: AttackOutcome) -> list[str]:
    """What else is to be said of an attack: one paragraph each."""
    s, config = outcome.summary(), outcome.config
    lines: list[str] = []
    if outcome.catalyst:
        c = outcome.catalyst
        lines += [
            f"Catalyst search **{c.status}**: alignment {c.alignment:.4f}, random tokens "
            f"{s['random_alignment_mean']:.4f} (highest of {len(c.random_alignments)}: "
            f"{s['random_alignment_max']:.4f}).",
        ]
    if "rayleigh_quotient" in s:
        lines += [
            f"Curvature of the clean loss along the catalyst's gradient: "
            f"{s['rayleigh_quotient']:.4g}, percentile {s['rayleigh_percentile']:.0f} among "
            f"{config.rayleigh_draws} random directions (mean {s['rayleigh_random_mean']:.4g}).",
        ]
    if outcome.start:
        lines += [f"Attacked again after healing: {recollapse_sentence(s)}."]
    reached = outcome.last.diagnostics
    if "match_error_pct" in reached:
        lines += [
            f"Matched to the reference's {config.match.partition('+')[0]} within "
            f"{abs(reached['match_error_pct']):.2f} % at strength {reached['noise_scale']:.4g}, "
            f"after {outcome.last.step} strengths tried.",
        ]
    if "readout_scale" in reached:
        lines += [
            "Then matched to its loss within "
            f"{abs(reached['readout_match_error_pct']):.2f} % by noise on the readout, of "
            f"{reached['readout_scale']:.4g} times its norm.",
        ]
    return [line for text in lines for line in (text, "")]


def recollapse_sentence(s: Mapping[str, Any]) -> str:
    """How soon healed weights collapsed again, from an attack's summary."""
    first, again = s["first_attack_steps"], s["recollapse_steps"]
    took = "not" if math.isnan(again) else f"after {again:.0f} steps"
    return (
        f"from the healed rank {s['start_effective_rank']:.1f} down to {s['recollapse_rank']:.1f} "
        f"{took}, from the healthy {s['healthy_effective_rank']:.1f} after {first:.0f}"
    )


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
    tags |= _start_facts(outcome)
    return tags | dict(outcome.preparation.solver_statuses)


def _reference_facts(config: AttackConfig) -> dict[str, str]:
    """What a control was matched to, and whose direction it took: which state, by which arm, made
    how. Controls of attacks of other arms or settings are other controls, and pair with the attack
    they were matched to.
    """
    facts: dict[str, str] = {}
    for what in NEEDS:
        if path := getattr(config, f"{what}_checkpoint"):
            made = read_checkpoint(pathlib.Path(path)).config
            settings = {k: v for k, v in made.items() if k not in NOT_SETTINGS}
            facts |= {
                f"{what}_arm": made.get("arm", "unknown"),
                f"{what}_settings": fingerprint(settings),
                f"{what}_fingerprint": made.get("fingerprint", ""),
            }
    return facts


def _start_facts(outcome: AttackOutcome) -> dict[str, Any]:
    """Which healed weights were attacked: repeated attacks are not pooled with first ones."""
    if outcome.start is None:
        return {}
    healed = outcome.start.checkpoint
    return {
        "start": "healed",
        "start_digest": healed.digest,
        "start_run_id": healed.config.get("heal_run_id", ""),
    }


def _save(outcome: AttackOutcome, folder: pathlib.Path, run_id: str) -> None:
    """Write everything but the trajectory."""
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
            "code": attack_code(config),
            "fingerprint": outcome.fingerprint,
            "attack_run_id": run_id,
            "healthy_digest": outcome.loaded.digest,
            "model_commit": outcome.loaded.commit,
            "corpus_digests": outcome.digests,
            **_start_facts(outcome),
        },
    )
    summary = {**outcome.summary(), **_tags(outcome), "attack_run_id": run_id}
    if outcome.catalyst:
        summary["catalyst_tokens"] = outcome.catalyst.tokens.tolist()
        summary["catalyst_history"] = list(outcome.catalyst.history)
    write_json(folder / "attack_summary.json", summary)
    states = {"healthy": outcome.healthy, "collapsed": outcome.collapsed}
    spectra = {name: m.mean_spectrum() for name, m in states.items()}
    write_json(folder / "spectra.json", spectra)
    figures.spectral_decay(folder / "plots" / "spectral_decay.png", spectra)


class AttackStage(StageDefaults):
    """From an attack's configuration to its checkpoint."""

    name = "attack"

    def title(self, config: AttackConfig) -> str:
        """``attack nano haep seed 0``; of noise also which draw, after the first."""
        draw = f" draw {config.noise_draw}" if config.noise_draw else ""
        return f"attack {config.label} {config.arm} seed {config.seed}{draw}"

    def tags(self, config: AttackConfig) -> dict[str, Any]:
        """What runs are grouped by."""
        tags = {"arm": config.arm, "model": config.label, **arm_tags(config.arm)}
        if arm_role(config.arm) == DAMAGE_CONTROL:
            tags["draw"] = str(config.noise_draw)
        # With the parameters, which name files: those that were fetched go with this process, and a
        # run that goes on finds them again by these tags.
        with contextlib.suppress(CheckpointError):  # what is wrong with them is said later
            tags |= reference_tags(config) | _start_tags(config)
        return tags

    def prepare(self, config: AttackConfig, tools: Tools) -> AttackConfig:
        """Fetch the reference's checkpoint and replace every ``auto``."""
        config = resolve_from_presets(_with_start(config, tools.store))
        config = resolve_from_model(with_reference(config, tools.store))
        use_threads(config)
        return config

    cell = staticmethod(attack_cell)

    def store(
        self, outcome: AttackOutcome, records: Sequence[Record], folder: pathlib.Path, run_id: str
    ) -> Report:
        """The checkpoint, the summary, the spectra and two figures."""
        config, s = outcome.config, outcome.summary()
        _save(outcome, folder, run_id)
        points, plots = points_of(records), folder / "plots"
        figures.rank_collapse(plots / "rank_collapse.png", points, config.arm, config.label)
        figures.attack_overview(folder / run_page.PICTURE, points, s, config.arm)
        if config.log_images:
            rank_map(
                plots / "rank_by_block.png",
                [record.step for record in outcome.records],
                outcome.rank_shares(),
                "attack steps" if not noise_match(config) else "strengths tried",
                f"{config.label}, {arm_label(config.arm)}, seed {config.seed}",
            )
        catalyst = f", catalyst {outcome.catalyst.status}" if outcome.catalyst else ""
        line = (
            f"{self.title(config)}: {outcome.damage.spectral_state}, rank "
            f"{s['healthy_effective_rank']:.1f} → {s['collapsed_effective_rank']:.1f}, perplexity "
            f"{s['healthy_perplexity']:.3g} → {s['collapsed_perplexity']:.3g}{catalyst}"
        )
        if outcome.start:
            line += f"; {recollapse_sentence(s)}"
        final = {f"summary/{k}": v for k, v in s.items()}
        charts = [(0, final), *headlines(records, ("effective_rank", "loss"))]
        result = {**s, **_tags(outcome)}
        detail = outcome.start is None
        page = describe(outcome, run_id)
        title = f"{config.label} {config.arm} seed {config.seed} collapsed"
        facts = {"arm": config.arm, "state": "collapsed", "steps": outcome.last.step}
        models = model_of(self.name, config, outcome.loaded, folder, title, **facts)
        return Report(
            charts,
            _tags(outcome),
            page,
            line,
            detail=detail,
            result=result,
            pictures=pictures_of(outcome.records, outcome.healthy, wanted=config.log_images),
            models=models,
        )


ATTACK = AttackStage()


def _start_tags(config: AttackConfig) -> dict[str, str]:
    """The healing run whose weights are attacked again, if any."""
    if not config.start_checkpoint:
        return {}
    healed = read_checkpoint(pathlib.Path(config.start_checkpoint)).config
    return {"start_run_id": healed.get("heal_run_id", "")}


def checkpoint_of(done: Done, store: Store) -> pathlib.Path:
    """Local path of a finished attack's checkpoint; fetched where its folder is gone.

    Raises:
        TrackingError: The store does not have it either.
    """
    return done.file(f"checkpoints/{CHECKPOINT_NAME}", store)


def with_reference(config: AttackConfig, store: Store) -> AttackConfig:
    """The configuration with the checkpoints of the runs that it names (reference, direction).

    Raises:
        TrackingError: There is no such run, or it holds no checkpoint.
    """
    for what in NEEDS:
        if run_id := getattr(config, f"{what}_run_id"):
            run = run_of(run_id, "attack", flag_name(f"{what}_run_id"), store)
            path = store.download(f"runs:/{run.run_id}/checkpoints/{CHECKPOINT_NAME}")
            found: dict[str, Any] = {f"{what}_checkpoint": str(path), f"{what}_run_id": ""}
            config = replace(config, **found)
    return config


def _with_start(config: AttackConfig, store: Store) -> AttackConfig:
    """The configuration of the first attack, where healed weights are attacked again."""
    given = config.start_checkpoint
    if not given:
        return config
    local = checkpoint_file(given, "heal", HEALED_NAME, "--start-checkpoint", store)
    config = replace(config, start_checkpoint=str(local))
    healed = read_healed(config.start_checkpoint)
    healed.pin_commit()
    return resolve_from_healed(config, healed)


def attack(config: AttackConfig, driver: Driver | None = None) -> tuple[str, pathlib.Path]:
    """Run, log and store one attack.

    Returns:
        MLflow run id and the local checkpoint.
    """
    driver = driver or Driver(Console(config.verbosity))
    with driver.process(ATTACK.title(config), {"stage": ATTACK.name}, config.output_dir) as run:
        if config.system_metrics:
            run.system_metrics()
        driver.store.check_registry(config.register_as)
        done = driver.run_cell(ATTACK, config, run=run)
    return done.run_id, checkpoint_of(done, driver.store)
