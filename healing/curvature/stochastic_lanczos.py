"""Randomised estimates on a symmetric operator: trace, spectral density, rank of a direction.

Pure linear algebra on flat vectors. Every function draws its probes from the generator passed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from healing.curvature.lanczos import Device, Recurrence, SymmetricOperator, gaussian
from healing.progress import counted, phase, tick


@dataclass(frozen=True)
class SpectralDensity:
    """Gauss quadrature nodes and weights whose mixture approximates a spectral density.

    Attributes:
        nodes: Ritz values, shape `(probes, iterations)`, float64 on the host. Rows that broke
            down early are padded with zeros of weight zero; NaN where the operator was not finite.
        weights: Squared first components, same shape; each row sums to one.
        dimension: n, so that n·(weights·nodes).sum(1).mean() estimates the trace.
    """

    nodes: Tensor
    weights: Tensor
    dimension: int

    def moment(self, order: int) -> tuple[float, float]:
        """tr(Hᵖ)/n and its standard error over probes (NaN for one probe), p = `order`.

        Each probe's value equals vᵀHᵖv/vᵀv exactly for p ≤ 2·iterations - 1.
        """
        samples = (self.weights * self.nodes**order).sum(1)
        return samples.mean().item(), standard_error(samples)

    def with_probe(self, nodes: Tensor, weights: Tensor) -> SpectralDensity:
        """With one more probe in front, of any number of nodes, shape `(m,)` (what a `lanczos` run
        leaves); shorter rows are padded. No nodes (a run that was not finite) become NaN.
        """
        if not len(nodes):
            nodes = weights = torch.full((1,), math.nan, dtype=torch.float64)
        width = max(len(nodes), self.nodes.shape[1])
        rows = [
            torch.cat(
                [
                    torch.nn.functional.pad(own[None], (0, width - len(own))),
                    torch.nn.functional.pad(others, (0, width - others.shape[1])),
                ]
            )
            for own, others in ((nodes, self.nodes), (weights, self.weights))
        ]
        return SpectralDensity(rows[0], rows[1], self.dimension)

    def density(self, grid: Tensor, sigma: float) -> Tensor:
        """Density at `grid`, each node broadened to a Gaussian: Σ w·N(t; θ, σ²), mean of probes.

        Args:
            grid: Points t in units of the eigenvalues, shape `(points,)`.
            sigma: Standard deviation of the Gaussian, same unit, > 0.

        Returns:
            Density per unit eigenvalue, shape `(points,)`, float64, integrating to one.

        Raises:
            ValueError: If `sigma` is not positive.
        """
        if not sigma > 0:
            raise ValueError(f"sigma must be positive, got {sigma}")
        points = grid.to(device=self.nodes.device, dtype=torch.float64)
        scaled = (points[:, None] - self.nodes.reshape(1, -1)) / sigma
        kernels = torch.exp(-0.5 * scaled**2) / (sigma * math.sqrt(2 * math.pi))
        return kernels @ self.weights.reshape(-1) / len(self.nodes)

    def grid(self, sigma: float, points: int = 512) -> Tensor:
        """Evenly spaced grid of shape `(points,)` from 5 sigma below to 5 above all nodes."""
        used = self.nodes[self.weights != 0]
        low, high = used.min().item() - 5 * sigma, used.max().item() + 5 * sigma
        return torch.linspace(low, high, points, dtype=torch.float64)


def standard_error(samples: Tensor) -> float:
    """Standard error of the mean of `samples`, shape `(m,)`; NaN for fewer than two."""
    if len(samples) < 2:
        return math.nan
    return samples.std().item() / math.sqrt(len(samples))


def rademacher(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Vector of independent ±1, shape `(n,)`, drawn on the generator's device."""
    n = operator.shape[0]
    bits = torch.randint(0, 2, (n,), generator=generator, device=generator.device, dtype=torch.int8)
    return (2 * bits - 1).to(device=operator.device, dtype=operator.dtype)


def rayleigh_quotient(operator: SymmetricOperator, vector: Tensor) -> float:
    """vᵀHv / vᵀv: the curvature along `vector`, shape `(n,)`; NaN for the zero vector."""
    converted = vector.to(device=operator.device, dtype=operator.dtype)
    return (torch.dot(converted, operator(converted)) / torch.dot(converted, converted)).item()


@dataclass(frozen=True)
class RayleighPercentile:
    """Where a direction's curvature lies among that of isotropic random directions.

    Attributes:
        quotient: Rayleigh quotient of the direction.
        percentile: Share of random directions below it, in [0, 100], ties counted half; NaN if
            any quotient is not finite.
        random_quotients: Shape `(n_random,)`, float64 on the host. They concentrate at tr(H)/n
            with variance 2‖H‖²_F/n² or less, so in high dimension a percentile of 0 or 100 is
            common and says little without them.
    """

    quotient: float
    percentile: float
    random_quotients: Tensor


@dataclass(frozen=True)
class QuotientsSoFar:
    """Products of :func:`rayleigh_percentile` that were taken.

    Attributes:
        quotients: Of the direction, then of the random ones.
        stream: State of the generator, uint8.
    """

    quotients: tuple[float, ...]
    stream: Tensor


def _not_kept(state: QuotientsSoFar) -> None:
    """Nobody goes on with it."""


def rayleigh_percentile(
    operator: SymmetricOperator,
    vector: Tensor,
    generator: torch.Generator,
    n_random: int = 100,
    *,
    begun: QuotientsSoFar | None = None,
    keep: Callable[[QuotientsSoFar], None] = _not_kept,
) -> RayleighPercentile:
    """Percentile of the Rayleigh quotient of `vector` among isotropic random directions.

    Args:
        operator: Symmetric operator on `(n,)` vectors.
        vector: Direction, shape `(n,)`, of any length but zero.
        generator: Draws the random directions.
        n_random: Number of them, one product each.
        begun: Products that are not taken again; none, or the first one and more.
        keep: Given what there is after every product.

    Raises:
        ValueError: If `n_random` is less than one.
    """
    if n_random < 1:
        raise ValueError(f"need at least one random direction, got {n_random}")
    found: list[float] = []
    if begun is not None:
        found += begun.quotients
        generator.set_state(begun.stream)
    own = [] if found else [vector]
    left = 1 + n_random - len(found) - len(own)
    # One product each, of minutes on a large model: who listens can tell the rest from the first.
    directions = itertools.chain(own, (gaussian(operator, generator) for _ in range(left)))
    for direction in phase("curvature ranks", directions, 1 + n_random, begin=len(found)):
        found.append(rayleigh_quotient(operator, direction))
        keep(QuotientsSoFar(tuple(found), generator.get_state()))
    quotient, *others = found
    random_quotients = torch.tensor(others, dtype=torch.float64)
    below = (random_quotients < quotient).sum() + 0.5 * (random_quotients == quotient).sum()
    defined = math.isfinite(quotient) and bool(torch.isfinite(random_quotients).all())
    percentile = 100 * below.item() / n_random if defined else math.nan
    return RayleighPercentile(quotient, percentile, random_quotients)


def lanczos_quadrature(
    operator: SymmetricOperator,
    generator: torch.Generator,
    *,
    n_probes: int = 8,
    n_iterations: int = 64,
    basis_dtype: torch.dtype | None = None,
    basis_device: Device | None = None,
) -> SpectralDensity:
    """Spectral density by stochastic Lanczos quadrature.

    For each Rademacher probe v, the m-step tridiagonal matrix T = SΘSᵀ gives the m-point Gauss
    rule of the spectral measure vᵀδ(t - H)v/n: nodes Θ, weights S₁ᵢ². Costs
    `n_probes · n_iterations` products.

    Args:
        operator: Symmetric operator on `(n,)` vectors.
        generator: Draws the probes.
        n_probes: Number of probes averaged.
        n_iterations: Lanczos steps per probe; min(n_iterations, n) nodes result.
        basis_dtype: As in `lanczos`.
        basis_device: As in `lanczos`.

    Returns:
        Raw nodes and weights; `density` broadens them on a grid.

    Raises:
        ValueError: If `n_probes` or `n_iterations` is less than one.

    Source:
        Golub & Welsch 1969; Ubaru, Chen & Saad 2017, SIAM J. Matrix Anal. Appl. 38(4);
        Ghorbani, Krishnan & Xiao 2019, arXiv 1901.10159, which shows why the basis must be
        reorthogonalised.
    """
    if min(n_probes, n_iterations) < 1:
        raise ValueError(f"need one probe and one iteration, got {n_probes} and {n_iterations}")
    n = operator.shape[0]
    nodes = torch.zeros(n_probes, min(n_iterations, n), dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    for probe in counted(range(n_probes), n_probes):
        start = rademacher(operator, generator)
        recurrence = Recurrence(operator, start, n_iterations, basis_dtype, basis_device)
        recurrence.step()
        while recurrence.finite and not (recurrence.invariant or recurrence.exhausted):
            tick()
            recurrence.step()
        if not recurrence.finite:
            nodes[probe] = weights[probe] = math.nan
            continue
        values, vectors = recurrence.ritz()
        nodes[probe, : len(values)] = values
        weights[probe, : len(values)] = vectors[0] ** 2
    return SpectralDensity(nodes, weights, n)
