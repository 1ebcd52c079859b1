"""One healing run as a pure function: what it is, what it leaves, what identifies it."""

from __future__ import annotations

import functools
import pathlib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from healing.config.arm_tags import SHAM_ARM
from healing.config.fingerprint import NOT_SETTINGS, as_params, fingerprint, not_separating
from healing.config.heal import HealConfig
from healing.config.presets import model_slug
from healing.data.splits import Corpus
from healing.data.windows import batches
from healing.errors import CheckpointError
from healing.measurements.continuations import Continuations, openings_of
from healing.measurements.diagnosis import MAX_REPLAY_STEPS, Failure, HealthyReplay
from healing.measurements.kept_measurements import measured
from healing.measurements.unigram import unigram_loss
from healing.models.blocks import embedding_matrix
from healing.models.checkpoints import (
    CHECKPOINT_NAME,
    HEALED_KIND,
    Checkpoint,
    load_state,
    read_checkpoint,
    require_fitting,
    weight_distance,
)
from healing.models.loading import LoadedModel
from healing.progress import Safe, enter
from healing.randomness import named_generator
from healing.registry import COLLAPSED, HEALTHY, METHODS
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.events import Begin, Events, Record
from healing.stages.cells.heal_outcome import HealCell, HealOutcome
from healing.stages.cells.inputs import (
    device_kind,
    few_rows_warnings,
    inputs_read,
    load_for,
    load_inputs,
    measurement_modules,
    rank_and_perplexity,
    resolve_from_model,
    training_windows,
)
from healing.training.healing_loop import HealRecord, adapted, heal_events, replay_healthy
from healing.training.parallel.group import parallel_tags
from healing.training.parallel.team import Alone, ranks_for


def resolve_from_checkpoint(
    config: HealConfig, checkpoint: Checkpoint | None, path: object
) -> HealConfig:
    """Resolve ``auto``: the checkpoint's model and revision, at the commit it was made from, unless
    the user names one.

    Raises:
        CheckpointError: The user names another model or revision than the checkpoint.
        ConfigError: The model cannot be what is named.
    """
    if checkpoint is not None:
        named = checkpoint.model_fields(path, config.model, config.revision, config.deduped)
        tokenizer = config.tokenizer or checkpoint.tokenizer
        config = replace(config, tokenizer=tokenizer, **named)
        checkpoint.pin_commit()
    return resolve_from_model(config)


def sham_checkpoint(healthy_digest: str, config: HealConfig) -> Checkpoint:
    """The healthy model in a checkpoint's place; its weights stay where they are."""
    origin = {
        "model": config.model,
        "revision": config.revision,
        "deduped": config.deduped,
        "arm": SHAM_ARM,
        "seed": config.seed,
        "healthy_digest": healthy_digest,
        "fingerprint": healthy_digest,
    }
    return Checkpoint(0, {}, "healthy model", origin, known_digest=healthy_digest)


_PLAIN = HealConfig()


def _determining(config: HealConfig) -> HealConfig:
    """Without what has no effect: the mode of fp32, options of other healing methods."""
    if config.precision == "fp32":
        config = replace(config, precision_mode="autocast")
    own = METHODS.facts(config.healing_method).get("OPTIONS", ())
    others = {o for f in METHODS.all_facts() if f.built_in for o in f.get("OPTIONS", ())}
    return replace(config, **{name: getattr(_PLAIN, name) for name in others - set(own)})


def heal_code(config: HealConfig, *more: str) -> str:
    """Digest of the code that makes a healing run's numbers: the cell's, that of its method, which
    is loaded by name, and of more modules.
    """
    return code_digest("healing.stages.cells.heal", METHODS.module(config.healing_method), *more)


def heal_fingerprint(
    cell: HealCell, checkpoint: Checkpoint, identity: str, digests: dict[str, str]
) -> str:
    """Fingerprint of a healing run; the checkpoint counts by its weights, not by its path."""
    bare = replace(_determining(cell.config), collapsed_checkpoint="", arm=SHAM_ARM)
    return fingerprint(
        "heal",
        bare,
        cell.replicate,
        checkpoint.digest,
        attacked_settings(checkpoint),
        identity,
        digests,
        heal_code(cell.config, *measurement_modules(cell.config)),
        device_kind(cell.config),
        # Equal numbers, another statement: a run found again would not say how it was selected.
        *([cell.healer.digest] if cell.healer else []),
    )


def _data_order(cell: HealCell) -> torch.Generator:
    return named_generator(cell.config.seed, "sft", cell.replicate)


def _first_batch(cell: HealCell, windows: torch.Tensor) -> torch.Tensor:
    return next(batches(windows, int(cell.config.batch_size), _data_order(cell)))


def _replay_healthy(
    cell: HealCell, failure: Failure, windows: torch.Tensor, ranks: Alone
) -> HealthyReplay:
    """A failed run's first steps on a fresh healthy model: a second model in memory meanwhile."""
    healthy = load_for(_loading(cell.config))
    if cell.config.gradient_checkpointing:
        healthy.model.activation_checkpointing_enable()
    # As long as the run took to the failures that ended it, at most MAX_REPLAY_STEPS.
    steps = min(failure.step, MAX_REPLAY_STEPS)
    order = _data_order(cell)
    return replay_healthy(healthy, cell.config, windows, order, steps, ranks.trainer_of)


def _loading(config: HealConfig) -> HealConfig:
    """Of a model that is spread over ranks, rank 0 has the whole one in the host's memory."""
    return replace(config, device="cpu") if config.is_parallel else config


def heal_cell(cell: HealCell) -> Events[tuple[HealOutcome, LoadedModel]]:
    """One healing run as a function of its cell; files (but the checkpoint's) and MLflow are not
    touched. What it returns is what was found, and the healed model.
    """
    config = cell.config
    checkpoint = read_checkpoint(pathlib.Path(cell.checkpoint)) if cell.checkpoint else None
    if checkpoint:
        checkpoint.pin_commit()
    corpus, loaded, probe = load_inputs(_loading(config))
    checkpoint = checkpoint or sham_checkpoint(loaded.digest, config)
    _require_collapsed(checkpoint, loaded, cell)
    run_fingerprint = heal_fingerprint(cell, checkpoint, loaded.identity, corpus.digests)
    settings = settings_of(cell, checkpoint, corpus.digests)
    method = METHODS.load(config.healing_method)
    kept = yield Begin(
        run_fingerprint,
        heal_name(cell, checkpoint, run_fingerprint),
        stored_config(cell, checkpoint, run_fingerprint),
        int(config.healing_steps),
        tags={
            **loaded.tags,
            **lineage(checkpoint),
            "settings": settings,
            **parallel_tags(config),
        },
        counts={
            "n_params": loaded.n_params,
            "n_trainable_params": method.n_trainable(loaded.model, config),
        },
        inputs=inputs_read(config, corpus.digests, {"train": "training", "probe": "probe"}),
        warnings=few_rows_warnings(config, loaded),
        disk=4 * loaded.n_params * config.save_healed,
    )
    with ranks_for(config, loaded, probe) as ranks:
        outcome = yield from _healed(cell, corpus, loaded, checkpoint, run_fingerprint, ranks, kept)
    return outcome, loaded


def _healed(
    cell: HealCell,
    corpus: Corpus,
    loaded: LoadedModel,
    checkpoint: Checkpoint,
    run_fingerprint: str,
    ranks: Alone,
    kept: Mapping[str, Any] | None,
) -> Events[HealOutcome]:
    """What a cell computes once its inputs are there, by one process or by several."""
    config, probe = cell.config, ranks.probe
    enter("healthy measurement")
    probe = probe.remembering(HEALTHY, loaded.model)
    healthy = measured(probe, loaded, config.seed, loaded.digest)
    said = openings_of(probe.windows) if config.log_text else None
    said = _also(said, HEALTHY, ranks)
    distance = weight_distance(loaded.model, checkpoint.state) if cell.checkpoint else 0.0
    enter("loading the checkpoint")
    if cell.checkpoint:
        load_state(loaded, checkpoint, cell.checkpoint)
        ranks.refresh()
    checkpoint = checkpoint.without_tensors()
    windows = training_windows(config, corpus, loaded)
    enter("collapsed measurement")
    probe = probe.remembering(COLLAPSED, loaded.model)
    collapsed = measured(probe, loaded, config.seed, checkpoint.digest)
    said = _also(said, COLLAPSED, ranks)
    enter("first check")
    if config.gradient_checkpointing:
        loaded.model.activation_checkpointing_enable()
    # Probe only the gradients that will be trained: full ones may not fit beside adapters.
    with adapted(loaded.model, config, _data_order(cell)):
        in_float32 = ranks.first_failure(collapsed, _first_batch(cell, windows))
    outcome = HealOutcome(
        cell,
        run_fingerprint,
        checkpoint,
        loaded.digest,
        healthy,
        (HealRecord(0, 0, collapsed),),
        corpus.digests,
        in_float32,
        unigram_loss=unigram_loss(
            windows,
            probe.windows,
            len(embedding_matrix(loaded.model)),
            opening=len(loaded.opening),
        ),
        weight_change=distance,
    )
    if kept is not None:
        outcome = replace(outcome, records=tuple(kept["records"]))
    loop = kept["loop"] if kept else None
    order = _data_order(cell)
    trainer_of = ranks.trainer_of
    for event in heal_events(loaded, config, windows, probe, collapsed, order, loop, trainer_of):
        if isinstance(event, Safe):
            yield replace(event, state=functools.partial(_state, event, outcome.records))
            continue
        known = outcome.records if event.step else ()
        outcome = replace(outcome, records=(*known, event))
        metrics = {**event.metrics(), **outcome.recovery(event)}
        yield Record(event.step, metrics, rank_and_perplexity(metrics))
    ranks.finish()
    said, last = _also(said, "healed", ranks), outcome.records[-1]
    if last.stalled and last.failure and not outcome.in_float32:
        enter("the healthy model through the same steps")
        replayed = _replay_healthy(cell, last.failure, windows, ranks)
        outcome = replace(outcome, healthy_replay=replayed)
    return replace(outcome, said=said)


def _also(said: Continuations | None, state: str, ranks: Alone) -> Continuations | None:
    """What was said so far, and what the model says in its present state, where it is asked."""
    if said is None:
        return None
    enter("continuing text")
    found = ranks.continued(said.openings, said.true.shape[1])
    return replace(said, by_state={**said.by_state, state: found})


def _state(safe: Safe, records: tuple[HealRecord, ...]) -> dict[str, Any]:
    """What a cell goes on from: the loop's state, and the records so far."""
    return {"loop": safe.state(), "records": records}


def _require_collapsed(checkpoint: Checkpoint, loaded: LoadedModel, cell: HealCell) -> None:
    """Refuse healed weights, and an attack on other weights than these.

    Raises:
        CheckpointError: It is not a collapsed state of this model.
    """
    if checkpoint.kind == HEALED_KIND:
        raise CheckpointError(
            f"{cell.checkpoint} holds healed weights: name the collapsed checkpoint "
            f"({CHECKPOINT_NAME}) instead"
        )
    healthy = checkpoint.config.get("healthy_digest")
    if healthy and healthy != loaded.digest:
        raise CheckpointError(
            f"{cell.checkpoint} was made from other weights of {cell.config.label} than the ones "
            "here: its healthy reference is not this model; run the attack again"
        )
    if cell.checkpoint:
        require_fitting(loaded, checkpoint, cell.checkpoint)


def heal_name(cell: HealCell, checkpoint: Checkpoint, run_fingerprint: str) -> str:
    """Name of a healing run's folder."""
    config, arm = cell.config, checkpoint.config.get("arm", "unknown")
    slug = model_slug(config.label)
    return f"{slug}_{arm}_seed{config.seed}_run{cell.replicate + 1:02d}_{run_fingerprint[:8]}"


def stored_config(cell: HealCell, checkpoint: Checkpoint, run_fingerprint: str) -> dict[str, Any]:
    """Content of ``config.json``: the configuration, the checkpoint and what made it."""
    return {
        **as_params(cell.config),
        "checkpoint": cell.checkpoint,
        "replicate": cell.replicate,
        "fingerprint": run_fingerprint,
        "attack": checkpoint.config,
    }


def lineage(checkpoint: Checkpoint) -> dict[str, Any]:
    """Tags that say which collapsed state was healed, and what it was matched to."""
    origin = checkpoint.config
    return {
        "checkpoint_id": origin.get("fingerprint") or checkpoint.digest,
        "attack_run_id": origin.get("attack_run_id", ""),
        "attack_seed": origin.get("seed", ""),
        "noise_match": origin.get("noise_match", ""),
        # A control of one attack seed may be several checkpoints, one per draw of its noise.
        "draw": origin.get("noise_draw", "") if origin.get("noise_match") else "",
        "direction_arm": origin.get("direction_arm", ""),
        "reference_checkpoint_id": origin.get("reference_fingerprint", ""),
    }


def attacked_settings(checkpoint: Checkpoint) -> dict[str, Any]:
    """What made a checkpoint, seeds, paths and lineage left out."""
    return {k: v for k, v in checkpoint.config.items() if k not in NOT_SETTINGS}


def settings_of(cell: HealCell, checkpoint: Checkpoint, digests: dict[str, str]) -> str:
    """Hash of what runs must share to be pooled: parameters without seeds or paths, texts, code."""
    left_out = not_separating(cell.config)
    params = as_params(_determining(cell.config))
    healing = {k: v for k, v in params.items() if k not in left_out}
    attacked = attacked_settings(checkpoint)
    return fingerprint(healing, attacked, digests, heal_code(cell.config), device_kind(cell.config))
