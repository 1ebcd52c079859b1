"""Perturbations of weights by chance: Gaussian, of low rank, or turned at random."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from healing.config.attack import AttackConfig
from healing.randomness import named_generator


def noise_draws(config: AttackConfig, *purpose: str) -> torch.Generator:
    """The random stream of an arm's noise: of its seed, and of its number where that is not 0."""
    number = (config.noise_draw,) if config.noise_draw else ()
    return named_generator(config.seed, "attack", config.arm, *purpose, *number)


def _of_norms(
    healthy: Mapping[str, torch.Tensor],
    norms: Mapping[str, float],
    draw: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Draws on the CPU in name order, each scaled to its Frobenius norm, in the weights' format."""
    noise = {}
    for name in sorted(healthy):
        drawn = draw(healthy[name])
        noise[name] = (drawn * (norms[name] / float(drawn.norm()))).to(healthy[name])
    return noise


def gaussian_noise(
    healthy: Mapping[str, torch.Tensor], norms: Mapping[str, float], generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Independent Gaussian entries of one standard deviation per tensor.

    Args:
        healthy: Name → tensor, for shapes and formats.
        norms: Name → Frobenius norm of the noise.
        generator: CPU generator.
    """
    return _of_norms(healthy, norms, lambda w: torch.randn(w.shape, generator=generator))


def low_rank_noise(
    healthy: Mapping[str, torch.Tensor],
    norms: Mapping[str, float],
    rank: int,
    generator: torch.Generator,
) -> dict[str, torch.Tensor]:
    """E = U Vᵀ per matrix (m, n), U (m, rank) and V (n, rank) with independent Gaussian entries.

    Args:
        healthy: Name → matrix, for shapes and formats.
        norms: Name → Frobenius norm of the noise.
        rank: Of every E; at most the shorter side of the matrix has an effect.
        generator: CPU generator.
    """

    def draw(w: torch.Tensor) -> torch.Tensor:
        left, right = (torch.randn(side, rank, generator=generator) for side in w.shape)
        return left @ right.T

    return _of_norms(healthy, norms, draw)


def _frame(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Orthonormal columns (rows, columns), uniform over all such, float64.

    Q of a Gaussian matrix's QR with the signs of R's diagonal (Mezzadri 2007, math-ph/0609050).
    """
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * r.diagonal().sign()


def rotated(change: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A matrix with the singular values of another and directions of its own.

    E = P diag(σ(ΔW)) Qᵀ with P (m, r) and Q (n, r) uniform orthonormal frames, r = min(m, n): ΔW
    turned by independent uniform rotations on both sides.

    Args:
        change: ΔW, (m, n).
        generator: CPU generator.
    """
    values = torch.linalg.svdvals(change.double())
    left, right = (_frame(side, len(values), generator) for side in change.shape)
    return (left * values) @ right.T
