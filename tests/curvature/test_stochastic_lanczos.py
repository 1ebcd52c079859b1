"""Trace, spectral density and percentiles against matrices whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from healing.curvature.stochastic_lanczos import (
    SpectralDensity,
    lanczos_quadrature,
    rademacher,
    rayleigh_percentile,
    rayleigh_quotient,
    standard_error,
)
from healing.progress import listening


class Dense:
    """A dense symmetric matrix as an operator."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (len(matrix), len(matrix))
        self.dtype = matrix.dtype
        self.device = matrix.device

    def __call__(self, vector: Tensor, /) -> Tensor:
        return self.matrix @ vector


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric float64 matrix with the given eigenvalues, and its eigenvectors as columns."""
    n = len(eigenvalues)
    noise = torch.randn(n, n, generator=generator(7), dtype=torch.float64)
    vectors = torch.linalg.qr(noise)[0]
    matrix = vectors @ torch.diag(eigenvalues.double()) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def outlier_spectrum(n: int = 300) -> Tensor:
    """A bulk between outliers at both ends, ascending."""
    bulk = torch.linspace(-0.5, 1.0, n - 7, dtype=torch.float64)
    return torch.cat([torch.tensor([-6.0, -3.0, -2.0]), bulk, torch.tensor([5.0, 8.0, 13.0, 21.0])])


def test_rademacher_is_plus_and_minus_one_in_equal_shares() -> None:
    draw = rademacher(Dense(torch.eye(10_000)), generator())
    assert set(draw.tolist()) == {-1.0, 1.0}
    assert draw.dtype == torch.float32
    assert abs(draw.mean().item()) < 4 / math.sqrt(10_000)


def test_quadrature_moments_are_exact_for_each_probe() -> None:
    matrix, _ = with_spectrum(outlier_spectrum(120) / 21)
    operator = Dense(matrix)
    steps = 6
    quadrature = lanczos_quadrature(operator, generator(5), n_probes=3, n_iterations=steps)
    draws = generator(5)
    probes = [rademacher(operator, draws) for _ in range(3)]
    powers = torch.stack(probes, 1)
    for order in range(2 * steps):  # Gauss: exact up to degree 2m - 1 ...
        moments = (quadrature.weights * quadrature.nodes**order).sum(1)
        expected = (torch.stack(probes, 1) * powers).sum(0) / 120
        torch.testing.assert_close(moments, expected, rtol=1e-9, atol=1e-12)
        assert quadrature.moment(order)[0] == pytest.approx(expected.mean().item(), rel=1e-9)
        powers = matrix @ powers
    # ... and no further
    moments = (quadrature.weights * quadrature.nodes ** (2 * steps)).sum(1)
    exact = (torch.stack(probes, 1) * powers).sum(0) / 120
    assert ((moments - exact) / exact).abs().min() > 1e-9


def test_moments_estimate_those_of_the_chosen_spectrum() -> None:
    eigenvalues = outlier_spectrum()
    matrix, _ = with_spectrum(eigenvalues)
    quadrature = lanczos_quadrature(Dense(matrix), generator(), n_probes=30, n_iterations=20)
    for order in (1, 2, 3):
        value, error = quadrature.moment(order)
        exact = (eigenvalues**order).mean().item()
        assert abs(value - exact) < 4 * error  # four standard errors: p < 1e-3 for t with 29 df
        assert error < 0.5 * abs(exact)  # and an interval that says something


def test_density_matches_the_broadened_spectrum_and_integrates_to_one() -> None:
    eigenvalues = outlier_spectrum()
    matrix, _ = with_spectrum(eigenvalues)
    quadrature = lanczos_quadrature(Dense(matrix), generator(), n_probes=20, n_iterations=60)
    sigma = 0.3
    grid = quadrature.grid(sigma, points=2000)
    density = quadrature.density(grid, sigma)
    exact = SpectralDensity(eigenvalues[None], torch.full((1, 300), 1 / 300).double(), 300)
    assert torch.trapezoid(density, grid).item() == pytest.approx(1, abs=1e-6)
    distance = torch.trapezoid((density - exact.density(grid, sigma)).abs(), grid).item()
    # Probe noise alone gives about sqrt(2/(300·20)) = 0.02 in total variation.
    assert distance < 0.05
    narrow = quadrature.density(grid, sigma / 3)
    assert torch.trapezoid((density - narrow).abs(), grid).item() > 0.1  # sigma matters


def test_density_is_a_gaussian_of_the_given_width() -> None:
    single = SpectralDensity(torch.tensor([[2.0]]).double(), torch.ones(1, 1).double(), 1)
    density = single.density(torch.tensor([2.0, 2.5]), 0.5)
    peak = 1 / (0.5 * math.sqrt(2 * math.pi))
    assert density.tolist() == pytest.approx([peak, peak * math.exp(-0.5)], rel=1e-12)


def test_quadrature_of_the_identity_breaks_down_to_one_node() -> None:
    quadrature = lanczos_quadrature(Dense(3 * torch.eye(30).double()), generator(), n_probes=2)
    torch.testing.assert_close(quadrature.weights.sum(1), torch.ones(2).double())
    assert (quadrature.weights > 0).sum() == 2
    assert quadrature.moment(2)[0] == pytest.approx(9)
    assert quadrature.grid(0.1, points=3).tolist() == pytest.approx([2.5, 3, 3.5])


def test_nonfinite_quadrature_is_nan() -> None:
    quadrature = lanczos_quadrature(Dense(torch.full((5, 5), math.nan)), generator(), n_probes=2)
    assert quadrature.nodes.isnan().all()
    assert math.isnan(quadrature.moment(1)[0])
    assert quadrature.density(torch.zeros(2), 1.0).isnan().all()


def test_quadrature_with_a_bfloat16_basis() -> None:
    matrix, _ = with_spectrum(outlier_spectrum())
    full = lanczos_quadrature(Dense(matrix), generator(), n_probes=2, n_iterations=40)
    narrow = lanczos_quadrature(
        Dense(matrix), generator(), n_probes=2, n_iterations=40, basis_dtype=torch.bfloat16
    )
    assert narrow.moment(2)[0] == pytest.approx(full.moment(2)[0], rel=2.0**-16)


def test_standard_error_of_one_sample_is_undefined() -> None:
    assert math.isnan(standard_error(torch.ones(1)))


def test_rayleigh_quotient_of_eigenvectors_and_of_zero() -> None:
    matrix, vectors = with_spectrum(outlier_spectrum())
    operator = Dense(matrix)
    assert rayleigh_quotient(operator, 5 * vectors[:, -1]) == pytest.approx(21, rel=1e-12)
    assert rayleigh_quotient(operator, vectors[:, 0] + vectors[:, -1]) == pytest.approx(7.5)
    assert math.isnan(rayleigh_quotient(operator, torch.zeros(300)))


def test_percentile_follows_the_law_of_random_directions() -> None:
    # On the sphere in three dimensions a coordinate is uniform (Archimedes), so that
    # P(u₁² < q) = sqrt(q) for H = diag(1, 0, 0).
    operator = Dense(torch.diag(torch.tensor([1.0, 0, 0])))
    direction = torch.tensor([0.5, math.sqrt(0.75), 0])
    ranked = rayleigh_percentile(operator, direction, generator(), n_random=900)
    assert ranked.quotient == pytest.approx(0.25, rel=1e-6)
    assert abs(ranked.percentile - 50) < 4 * 50 / math.sqrt(900)
    assert ranked.random_quotients.shape == (900,)


@pytest.mark.parametrize(("column", "percentile"), [(0, 0.0), (-1, 100.0)])
def test_extreme_eigenvectors_are_at_the_ends(column: int, percentile: float) -> None:
    matrix, vectors = with_spectrum(outlier_spectrum())
    ranked = rayleigh_percentile(Dense(matrix), vectors[:, column], generator(), n_random=20)
    assert ranked.percentile == percentile


def test_ties_count_half_and_nan_is_undefined() -> None:
    flat = rayleigh_percentile(Dense(torch.zeros(4, 4)), torch.ones(4), generator(), n_random=5)
    assert flat.percentile == 50
    broken = Dense(torch.full((4, 4), math.nan))
    assert math.isnan(rayleigh_percentile(broken, torch.ones(4), generator()).percentile)


def test_every_product_is_announced_before_it_is_made() -> None:
    """The gradient's own first, of 1 + n."""
    told = []
    made = []

    class Counted(Dense):
        def __call__(self, vector: Tensor, /) -> Tensor:
            made.append(vector)
            return super().__call__(vector)

    with listening(lambda *news: told.append((*news, len(made)))):
        rayleigh_percentile(Counted(torch.eye(4)), torch.ones(4), generator(), n_random=2)
    assert told == [("curvature ranks", i, 3, "", i) for i in range(3)]
    assert torch.equal(made[0] / made[0].norm(), torch.full((4,), 0.5))


def test_refuses_bad_arguments() -> None:
    operator = Dense(torch.eye(4))
    with pytest.raises(ValueError, match="need at least one random direction, got 0"):
        rayleigh_percentile(operator, torch.ones(4), generator(), n_random=0)
    with pytest.raises(ValueError, match="need one probe and one iteration, got 0 and 64"):
        lanczos_quadrature(operator, generator(), n_probes=0)
    with pytest.raises(ValueError, match="need one probe and one iteration, got 8 and 0"):
        lanczos_quadrature(operator, generator(), n_iterations=0)
    quadrature = lanczos_quadrature(operator, generator(), n_probes=1)
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        quadrature.density(torch.zeros(1), 0)
