"""What the faster ways save on a device: each beside the way that it replaced, in one run.

Eigenvalues of all blocks' covariances in one batched call, beside one call after the other and
beside the host's threads; bases of weight matrices from Gram eigenvectors, beside an SVD; ρ of many
sequences from Gram matrices, beside a gradient of one sequence at a time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.parts import Numbers
from benchmarks.preparation import dense
from benchmarks.stopwatch import synchronize
from healing.attacks.alignment import random_sequences, sequence_alignments
from healing.config.attack import AttackConfig
from healing.curvature.subspaces import SingularSubspace, split_by_gram, split_by_svd
from healing.measurements.covariance import STACK_BYTES
from healing.models.blocks import block_matrices, embedding_matrix, transformer_blocks
from healing.models.loading import LoadedModel
from healing.randomness import named_generator

HOST_THREADS = 16
"""At most; one covariance each."""


def _seconds(action: Callable[[], object], device: torch.device, *, warm_up: bool = True) -> float:
    if warm_up:
        action()
    synchronize(device)
    begin = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - begin


def covariances(loaded: LoadedModel) -> torch.Tensor:
    """Positive definite float64 (blocks, hidden, hidden) of the model's sizes, of random rows: an
    eigensolver's time hardly depends on the numbers.
    """
    blocks, hidden = len(transformer_blocks(loaded.model)), embedding_matrix(loaded.model).shape[1]
    generator = torch.Generator(loaded.device).manual_seed(0)
    shape, options = (2 * hidden, hidden), {"dtype": torch.float64, "device": loaded.device}
    grams = []
    for _ in range(blocks):
        rows = torch.randn(shape, generator=generator, **options)
        grams.append(rows.T @ rows)
    return torch.stack(grams)


def eigenvalues(loaded: LoadedModel) -> Numbers:
    """Seconds of the eigenvalues that one measurement needs, in three ways; their largest
    difference over the largest eigenvalue.
    """
    stack, device = covariances(loaded), loaded.device
    most = max(1, STACK_BYTES // stack[0].nbytes)

    def batched() -> list[torch.Tensor]:
        return [torch.linalg.eigvalsh(part) for part in stack.split(most)]

    def single() -> list[torch.Tensor]:
        return [torch.linalg.eigvalsh(one) for one in stack]

    def host() -> list[torch.Tensor]:
        with ThreadPoolExecutor(min(HOST_THREADS, len(stack))) as pool:
            return list(pool.map(torch.linalg.eigvalsh, stack.cpu()))

    first, second = torch.cat(batched()), torch.stack(single())
    return {
        "blocks": len(stack),
        "hidden": stack.shape[-1],
        "batched_seconds": _seconds(batched, device),
        "single_seconds": _seconds(single, device),
        "host_seconds": _seconds(host, device, warm_up=False),
        "largest_difference": float((first - second).abs().max() / first.max()),
    }


def bases(loaded: LoadedModel, energy: float) -> Numbers:
    """Seconds of a decomposition of every shape of block matrix, in both ways, and of them all."""
    shapes: dict[tuple[int, ...], list[torch.Tensor]] = {}
    for matrix in block_matrices(loaded.model).values():
        shapes.setdefault(tuple(matrix.shape), []).append(matrix.detach())
    found, sums = {}, {"gram": 0.0, "svd": 0.0}
    for shape, matrices in shapes.items():
        tall = (matrices[0].T if shape[0] < shape[1] else matrices[0]).double()
        own = {
            "gram": _seconds(lambda tall=tall: split_by_gram(tall, energy), loaded.device),
            # Seconds long: a warm-up would cost more than it corrects.
            "svd": _seconds(
                lambda tall=tall: split_by_svd(tall, energy), loaded.device, warm_up=False
            ),
        }
        found["x".join(map(str, shape))] = {**own, "matrices": len(matrices)}
        sums = {way: sums[way] + own[way] * len(matrices) for way in sums}
    return {"shapes": found, **{f"{way}_seconds": total for way, total in sums.items()}}


def alignment(loaded: LoadedModel, config: AttackConfig) -> Numbers:
    """Seconds of ρ of one round's candidates in both ways, and their largest difference."""
    space = SingularSubspace.of(block_matrices(loaded.model), config.subspace_energy)
    draws = named_generator(0, "benchmark")
    count, length = config.search_candidates, config.catalyst_length
    sequences = random_sequences(count, length, loaded.vocabulary, draws).to(loaded.device)
    found: list[list[float]] = []

    def all_of_them() -> None:
        found.append(sequence_alignments(loaded.model, space, sequences))

    together = _seconds(all_of_them, loaded.device)
    with dense():
        one_by_one = _seconds(all_of_them, loaded.device)
    apart = max(abs(a - b) / b for a, b in zip(found[0], found[-1], strict=True))
    return {
        "sequences": count,
        "gram_seconds": together,
        "dense_seconds": one_by_one,
        "largest_difference": apart,
    }
