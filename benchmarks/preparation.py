"""What an attack's preparation costs, phase by phase: as it is, beside the dense ways.

python -m benchmarks.preparation [--model nano] [--text FILE] [--rounds 3] [--json FILE]

The dense ways form every weight gradient of one sequence at a time and decompose every matrix by
an SVD; they are what models that the faster ways do not fit are given, so that both are real.
``--model`` takes a preset, or a folder or .gguf file, which needs ``--text``.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.table import Row, at_least, ratios, rounds, save, show
from healing.attacks import gram_alignment
from healing.attacks.alignment import random_sequences, sequence_alignments
from healing.attacks.catalyst_search import search_catalyst, token_gradient
from healing.config.attack import AttackConfig
from healing.config.options import AUTO
from healing.curvature import subspaces
from healing.curvature.subspaces import SingularSubspace
from healing.models.blocks import block_matrices
from healing.models.loading import LoadedModel
from healing.randomness import named_generator
from healing.stages.cells.inputs import load_inputs, resolve_from_model, use_threads

SEARCH_TARGET, WHOLE_TARGET = 8.0, 5.0
"""Times as fast as the dense way, for a model of 135 million parameters and more."""
LARGE = 100_000_000
ROUNDS_TIMED = 1
"""Rounds of the catalyst search that are timed: every one is alike."""


@contextlib.contextmanager
def dense() -> Iterator[None]:
    """Neither Gram form: gradients of one sequence at a time, SVDs."""
    with (
        mock.patch.object(gram_alignment, "gram_layers", return_value=None),
        mock.patch.object(subspaces, "split_by_gram", return_value=None),
    ):
        yield


def ways(config: AttackConfig, loaded: LoadedModel, space: SingularSubspace) -> dict:
    """Phase → what does it."""
    model, length = loaded.model, config.catalyst_length

    def draws(count: int) -> torch.Tensor:
        generator = named_generator(0, "benchmark")
        return random_sequences(count, length, loaded.vocabulary, generator).to(loaded.device)

    def search() -> object:
        return search_catalyst(
            model,
            space,
            draws(config.baseline_draws),
            length=length,
            steps=ROUNDS_TIMED,
            candidates=config.search_candidates,
            generator=named_generator(0, "search"),
            vocabulary=loaded.vocabulary,
        )

    matrices = block_matrices(model)
    return {
        "bases": lambda: SingularSubspace.of(matrices, config.subspace_energy),
        f"ρ of {config.baseline_draws} sequences": lambda: sequence_alignments(
            model, space, draws(config.baseline_draws)
        ),
        "derivative of ρ": lambda: token_gradient(model, space, draws(1)[0]),
        f"search, {ROUNDS_TIMED} round and the baselines": search,
    }


def timed(action) -> float:
    """Seconds of one call in the dense way."""
    with dense():
        begin = time.perf_counter()
        action()
        return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="nano")
    parser.add_argument("--text", default=AUTO, help="corpus; a model without a preset needs one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", default="")
    options = parser.parse_args()
    config = resolve_from_model(AttackConfig(model=options.model, corpus=options.text))
    use_threads(config)
    _, loaded, probe = load_inputs(config)
    space = SingularSubspace.of(block_matrices(loaded.model), config.subspace_energy)
    rows: list[Row] = []
    whole = {"now": [0.0] * options.rounds, "dense": [0.0] * options.rounds}
    name = config.label
    for phase, action in ways(config, loaded, space).items():
        seconds = rounds(
            {"now": action, "dense": lambda action=action: timed(action)},
            options.rounds,
            warm_up=int(loaded.n_params < LARGE),
        )
        faster = ratios(seconds["dense"], seconds["now"])
        what = f"{name}: {phase}, times as fast as dense"
        is_search = phase.startswith("search") and loaded.n_params > LARGE
        row = Row(what, tuple(faster), "×")
        rows += [
            Row(f"{name}: {phase}", tuple(seconds["now"]), "s"),
            at_least(what, faster, "×", SEARCH_TARGET) if is_search else row,
        ]
        if phase == "bases" or phase.startswith("search"):
            for way, values in seconds.items():
                times = 1 if phase == "bases" else config.search_steps  # rounds are alike
                whole[way] = [w + times * v for w, v in zip(whole[way], values, strict=True)]
    faster = ratios(whole["dense"], whole["now"])
    what = f"{name}: bases and {config.search_steps} rounds (extrapolated), times as fast as dense"
    big = loaded.n_params > LARGE
    rows.append(at_least(what, faster, "×", WHOLE_TARGET) if big else Row(what, tuple(faster), "×"))
    errors = named_generator(0, "bootstrap")
    healthy = rounds({"healthy": lambda: probe.measure(loaded.model, errors)}, 1, warm_up=0)
    rows.append(Row(f"{name}: healthy measurement with its error", tuple(healthy["healthy"]), "s"))
    tokens = random_sequences(4, config.catalyst_length, loaded.vocabulary, errors)
    now = sequence_alignments(loaded.model, space, tokens.to(loaded.device))
    with dense():
        before = sequence_alignments(loaded.model, space, tokens.to(loaded.device))
    apart = max(abs(a - b) / b for a, b in zip(now, before, strict=True))
    show(
        f"{name}: {loaded.n_params:,} parameters, {len(space.names)} matrices, "
        f"{torch.get_num_threads()} thread(s); largest relative difference of ρ {apart:.1e}",
        rows,
    )
    save(options.json, rows)


if __name__ == "__main__":
    main()
