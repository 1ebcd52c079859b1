"""The landscape of one healing run as a pure function: three states, three paths, a statement."""

from __future__ import annotations

import contextlib
import functools
import math
import pathlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from healing.attacks.finished import Finished
from healing.config.basin import BasinConfig
from healing.config.fingerprint import as_params, fingerprint
from healing.config.options import AUTO
from healing.config.presets import model_slug
from healing.config.shared import BaseConfig
from healing.curvature.escape import Direction, Escape, escape
from healing.curvature.flat_weights import put_weights, weights_of
from healing.curvature.gradient_noise import gradient_statistics
from healing.curvature.hessian import HessianOperator
from healing.curvature.lanczos import lanczos
from healing.curvature.loss_landscape import displacement, loss_path
from healing.curvature.minimum import Curvature, Evidence, is_minimum
from healing.curvature.stochastic_lanczos import SpectralDensity, lanczos_quadrature
from healing.data.splits import Corpus
from healing.errors import CheckpointError, ConfigError, CorpusError
from healing.measurements.probe import Probe
from healing.models.blocks import next_token_loss
from healing.models.checkpoints import (
    HEALED_KIND,
    Checkpoint,
    load_state,
    read_checkpoint,
    require_made_from,
)
from healing.models.loading import LoadedModel, state_digest
from healing.progress import Safe, counted, enter
from healing.randomness import named_generator
from healing.stages.cells.basin_outcome import BasinCell, BasinOutcome, StateReport
from healing.stages.cells.code_digest import code_digest
from healing.stages.cells.events import Begin, Events
from healing.stages.cells.inputs import device_kind, inputs_read, load_inputs, resolve_from_model

STATES = ("healthy", "collapsed", "healed")
PATHS = {
    "collapsed_healed": ("collapsed", "healed"),
    "healthy_healed": ("healthy", "healed"),
    "healthy_collapsed": ("healthy", "collapsed"),
}
STEPS = 4 * len(STATES) + len(PATHS)
"""Parts of a cell, for a progress bar."""
TOKENS_PER_PASS = 512
"""Tokens whose gradient graph is held at once."""


Part = Callable[[str], Safe]
"""Name of a part that is done → the safe point after it."""


class _OfState:
    """The finished parts of one state's examination, as plain data.

    Args:
        finished: Of the whole cell.
        state: Its name.
        part: The safe point after a part of the cell.
    """

    def __init__(self, finished: Finished, state: str, part: Part) -> None:
        self._finished, self._state, self._part = finished, state, part

    def get(self, name: str) -> Any:
        """What came of a part; ``None`` where it is not finished."""
        return self._finished.get(f"{self._state} {name}")

    def over(self, name: str, *result: Any) -> Safe:
        """Keep what came of a part."""
        self._finished.keep(f"{self._state} {name}", result)
        return self._part(f"{self._state} {name}")


def resolve_from_checkpoint(config: BasinConfig, healed: Checkpoint, path: object) -> BasinConfig:
    """Replace every ``auto`` by what the healing run had, else by the default.

    Raises:
        CheckpointError: The user names another model or revision than the checkpoint, or it names
            none.
        ConfigError: The model cannot be what is named.
    """
    named = healed.model_fields(path, config.model, config.revision, config.deduped)
    if named["model"] == AUTO:
        raise CheckpointError(f"{path} names no model: name it with --model")
    healed.pin_commit()
    wanted = [f.name for f in fields(BaseConfig) if getattr(config, f.name, "") == AUTO]
    known = {name: healed.config[name] for name in wanted if name in healed.config}
    base = resolve_from_model(BaseConfig(**{**known, **named}))
    wanted += list(named)
    auto = {name: getattr(base, name) for name in wanted if name != "device"}
    return replace(config, **auto)


def inputs_of(config: BasinConfig) -> BaseConfig:
    """The part of a resolved configuration that says what is loaded."""
    shared = {f.name for f in fields(BaseConfig)} & {f.name for f in fields(BasinConfig)}
    return resolve_from_model(BaseConfig(**{name: getattr(config, name) for name in shared}))


def attack_split(config: BasinConfig, corpus: Corpus, loaded: LoadedModel) -> Tensor:
    """Windows of the ``attack`` split, (windows, length), enough for all gradient batches.

    Raises:
        ConfigError: A batch holds no window.
        CorpusError: The split is too small.
    """
    length = int(config.sequence_length)
    if config.curvature_tokens < length:
        raise ConfigError(
            f"--curvature-tokens {config.curvature_tokens} is less than one window of {length} "
            "tokens: raise it"
        )
    windows = corpus.windows("attack", loaded.tokenizer, length)
    needed = config.gradient_batches * (config.curvature_tokens // length)
    if len(windows) < needed:
        raise CorpusError(
            f"attack split of corpus {config.corpus!r} fills {len(windows)} windows of {length} "
            f"tokens, the gradient needs {needed}: use a larger corpus, or lower "
            "--gradient-batches or --curvature-tokens"
        )
    return windows


def curvature_batch(windows: Tensor, count: int) -> Tensor:
    """`count` windows evenly spaced over the split: many documents in one small batch."""
    return windows[torch.arange(count) * len(windows) // count]


def gradient_batches(windows: Tensor, batches: int, count: int) -> list[Tensor]:
    """Disjoint blocks of `count` neighbouring windows, evenly spaced over the split.

    Neighbours often share a document: blocks keep such windows in one batch, so that batches are
    as good as independent.
    """
    starts = [index * len(windows) // batches for index in range(batches)]
    return [windows[start : start + count] for start in starts]


def _operator(loaded: LoadedModel, windows: Tensor) -> HessianOperator:
    rows = max(1, TOKENS_PER_PASS // windows.shape[1])
    chunks = windows.to(loaded.device).split(rows)
    predicted = [len(chunk) * (windows.shape[1] - 1) for chunk in chunks]
    return HessianOperator(loaded.model, next_token_loss, chunks, predicted)


def _spectrum(
    config: BasinConfig, operator: HessianOperator, parts: _OfState
) -> Generator[Safe, None, tuple[Curvature, Direction | None, SpectralDensity]]:
    """Extreme eigenvalues, the direction of the lowest where it is negative, and the density from
    the search's own probe and further ones.
    """
    known = parts.get("eigenvalues"), parts.get("spectral density")
    with operator.retained_graphs() if None in known else contextlib.nullcontext():
        if known[0] is None:
            enter("eigenvalues")
            yield parts.over("eigenvalues", *_extremes(config, operator))
        if known[1] is None:
            enter("spectral density")
            density = lanczos_quadrature(
                operator,
                named_generator(int(config.seed), "basin-density"),
                n_probes=config.density_probes,
                n_iterations=config.density_iterations,
            )
            yield parts.over("spectral density", density)
    curvature, lowest, nodes, weights = parts.get("eigenvalues")
    (density,) = parts.get("spectral density")
    return curvature, lowest, density.with_probe(nodes, weights)


def _extremes(
    config: BasinConfig, operator: HessianOperator
) -> tuple[Curvature, Direction | None, Tensor, Tensor]:
    """The search's eigenvalues, the direction of the lowest where it is negative, and its probe's
    quadrature: nodes and weights, `(iterations,)`.
    """
    found = lanczos(
        operator,
        named_generator(int(config.seed), "basin-lanczos"),
        n_largest=config.eigenvalues,
        n_smallest=config.eigenvalues,
        max_iterations=config.lanczos_iterations,
        tolerance=config.curvature_tolerance,
    )
    curvature = Curvature(
        tuple(found.largest.values.tolist()),
        tuple(found.smallest.values.tolist()),
        tuple(found.largest.residuals.tolist()),
        tuple(found.smallest.residuals.tolist()),
        found.status.value,
        found.products,
    )
    lowest = None
    if curvature.is_negative:
        vector = found.smallest.vectors[:, 0].clone()  # of its own: the others are not kept
        lowest = Direction(curvature.smallest[0], vector)
    return curvature, lowest, found.nodes, found.weights


def examine(
    config: BasinConfig,
    loaded: LoadedModel,
    windows: Tensor,
    probe: Probe,
    parts: _OfState,
) -> Generator[Safe, None, StateReport]:
    """All evidence about the model's current weights, which are left as they are.

    The random streams are the same for every state, so that states are compared pairwise, and begin
    anew with every part: what was finished before needs no stream's state.
    """
    count = config.curvature_tokens // windows.shape[1]
    batches = [
        _operator(loaded, batch)
        for batch in gradient_batches(windows, config.gradient_batches, count)
    ]
    if parts.get("gradient") is None:
        enter("gradient")
        statistics = gradient_statistics([b.gradient() for b in counted(batches, len(batches))])
        yield parts.over("gradient", statistics)
    (gradients,) = parts.get("gradient")
    fixed = curvature_batch(windows, count)
    operator = _operator(loaded, fixed)
    curvature, lowest, density = yield from _spectrum(config, operator, parts)
    if lowest is not None:  # what was kept is on the host
        lowest = replace(lowest, vector=lowest.vector.to(loaded.device))
    if parts.get("escape") is None:
        enter("escape")
        yield parts.over(
            "escape",
            _escape(config, loaded, fixed, probe, batches, curvature, lowest),
        )
    (left,) = parts.get("escape")
    evidence = Evidence(gradients, curvature, left)
    return StateReport(evidence, is_minimum(evidence), density)


def _escape(
    config: BasinConfig,
    loaded: LoadedModel,
    fixed: Tensor,
    probe: Probe,
    batches: Sequence[HessianOperator],
    curvature: Curvature,
    lowest: Direction | None,
) -> Escape:
    """Where descent leads from the model's current weights."""
    return escape(
        loaded.model,
        functools.partial(Probe(fixed).loss, loaded.model),
        functools.partial(probe.window_losses, loaded.model),
        # A fresh batch at every step: descent on one alone fits that one.
        lambda step: batches[step % len(batches)].gradient(),
        named_generator(int(config.seed), "basin-escape"),
        step_size=1 / curvature.steepness if curvature.steepness > 0 else math.nan,
        steps=config.escape_steps,
        radius=config.perturbation_radius,
        perturbations=config.perturbations,
        lowest=lowest,
    )


def read_states(cell: BasinCell, loaded: LoadedModel) -> tuple[dict[str, Tensor], Checkpoint]:
    """Flat weights of the three states and the healed checkpoint; the model is left healed.

    Raises:
        CheckpointError: A file is not what it is given as, or the states do not belong together.
    """
    weights, digest = {"healthy": weights_of(loaded.model)}, loaded.digest
    if cell.collapsed:
        collapsed = read_checkpoint(pathlib.Path(cell.collapsed))
        require_made_from(collapsed, loaded, cell.collapsed)
        load_state(loaded, collapsed, cell.collapsed)
        digest = collapsed.digest
    weights["collapsed"] = weights_of(loaded.model)
    healed = read_checkpoint(pathlib.Path(cell.healed))
    if healed.kind != HEALED_KIND:
        raise CheckpointError(
            f"{cell.healed} is not a healed checkpoint (type {healed.kind}): give one that the "
            "heal entry point stored with --save-healed true"
        )
    require_made_from(healed, loaded, cell.healed)
    if healed.config.get("collapsed_digest") != digest:
        raise CheckpointError(
            f"{cell.healed} was not healed from {cell.collapsed or 'the healthy model'} but from "
            "other weights: give the two files of one healing run"
        )
    load_state(loaded, healed, cell.healed)
    weights["healed"] = weights_of(loaded.model)
    return weights, healed


def basin_fingerprint(
    cell: BasinCell, weights: dict[str, Tensor], identity: str, digests: dict[str, str]
) -> str:
    """Fingerprint of a landscape; states count by their weights, not by their paths or runs."""
    bare = replace(cell.config, heal_run_id="", collapsed_checkpoint="", healed_checkpoint="")
    state_digests = {name: state_digest({name: vector}) for name, vector in weights.items()}
    kind = device_kind(inputs_of(cell.config))
    return fingerprint(
        "basin",
        bare,
        state_digests,
        identity,
        digests,
        code_digest("healing.stages.cells.basin"),
        kind,
    )


def basin_cell(cell: BasinCell) -> Events[BasinOutcome]:
    """The landscape of one healing run; nothing is written and MLflow is not touched."""
    config = cell.config
    inputs = inputs_of(config)
    corpus, loaded, probe = load_inputs(inputs)
    windows = attack_split(config, corpus, loaded)
    enter("loading the checkpoints")
    weights, healed = read_states(cell, loaded)
    run_fingerprint = basin_fingerprint(cell, weights, loaded.identity, corpus.digests)
    kept = yield Begin(
        run_fingerprint,
        f"{model_slug(config.label)}_{cell.arm}_seed{config.seed}_basin_{run_fingerprint[:8]}",
        {
            **as_params(config),
            "collapsed": cell.collapsed,
            "healed": cell.healed,
            "fingerprint": run_fingerprint,
        },
        STEPS,
        "part",
        counts={"n_params": loaded.n_params},
        inputs=inputs_read(config, corpus.digests, {"attack": "curvature", "probe": "probe"}),
    )
    finished = Finished(kept)

    def part(name: str) -> Safe:
        done = finished.parts()
        return Safe(len(done), name, lambda: done, lambda: len(done))

    states = {}
    for name in STATES:
        put_weights(loaded.model, weights[name])
        examined = examine(config, loaded, windows, probe, _OfState(finished, name, part))
        states[name] = yield from examined
    paths = {}
    for name, (start, end) in PATHS.items():
        if finished.get(name) is None:
            enter("straight paths")
            path = loss_path(
                loaded.model,
                weights[start],
                weights[end],
                config.path_points,
                functools.partial(probe.loss, loaded.model),
            )
            finished.keep(name, path)
            yield part(name)
        paths[name] = finished.get(name)
    apart = displacement(weights["healthy"], weights["collapsed"], weights["healed"])
    return BasinOutcome(
        cell, run_fingerprint, healed.config, loaded.n_params, corpus.digests, states, paths, apart
    )
