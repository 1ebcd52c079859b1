"""What an attack's preparation costs, phase by phase: as it is, beside the dense ways.

python -m benchmarks.preparation [--model nano] [--text FILE] [--rounds 3] [--json FILE]

The dense ways form every weight gradient of one sequence at a time and decompose every matrix by
an SVD; they are what models that the faster ways do not fit are given, so that both are real. The
first round does not count. The title says how busy the machine was before (load average over a
minute, 0 on an idle one): beside other work seconds mean little, and ratios only what was meant.
``--model`` takes a preset, or a folder or .gguf file, which needs ``--text``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.table import Row, at_least, ratios, rounds, save, show
from healing.attacks import gram_alignment
from healing.attacks.alignment import random_sequences, sequence_alignments
from healing.attacks.catalyst_search import token_gradient
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
NAMES = {
    "bases": "bases of all matrices",
    "baselines": "ρ of the start and the random sequences",
    "candidates": "ρ of a round's candidates",
    "derivative": "derivative of ρ by the tokens",
}


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

    matrices = block_matrices(model)
    return {
        "bases": lambda: SingularSubspace.of(matrices, config.subspace_energy),
        "baselines": lambda: sequence_alignments(model, space, draws(config.baseline_draws + 1)),
        "candidates": lambda: sequence_alignments(model, space, draws(config.search_candidates)),
        "derivative": lambda: token_gradient(model, space, draws(1)[0]),
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
    load = os.getloadavg()[0]
    config = resolve_from_model(AttackConfig(model=options.model, corpus=options.text))
    use_threads(config)
    _, loaded, probe = load_inputs(config)
    space = SingularSubspace.of(block_matrices(loaded.model), config.subspace_energy)
    rows: list[Row] = []
    name, large = config.label, loaded.n_params > LARGE
    found: dict[str, dict[str, list[float]]] = {}
    for phase, action in ways(config, loaded, space).items():
        found[phase] = rounds(
            {"now": action, "dense": lambda action=action: timed(action)},
            options.rounds,
        )
        rows += [
            Row(f"{name}: {NAMES[phase]}", tuple(found[phase]["now"]), "s"),
            Row(
                f"{name}: {NAMES[phase]}, times as fast as dense",
                tuple(ratios(found[phase]["dense"], found[phase]["now"])),
                "×",
            ),
        ]

    def together(way: str, *, bases: bool) -> list[float]:
        """Seconds of a whole search, whose rounds are alike, and of the bases if wanted."""
        return [
            base * bases + start + config.search_steps * (candidates + derivative)
            for base, start, candidates, derivative in zip(
                *(found[phase][way] for phase in NAMES), strict=True
            )
        ]

    for what, bases, target in (
        (f"search of {config.search_steps} rounds", False, SEARCH_TARGET),
        ("bases and search", True, WHOLE_TARGET),
    ):
        faster = ratios(together("dense", bases=bases), together("now", bases=bases))
        text = f"{name}: {what}, times as fast as dense"
        rows.append(at_least(text, faster, "×", target) if large else Row(text, tuple(faster), "×"))
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
        f"{torch.get_num_threads()} thread(s), load {load:.1f}; largest relative difference of ρ "
        f"{apart:.1e}",
        rows,
    )
    save(options.json, rows)


if __name__ == "__main__":
    main()
