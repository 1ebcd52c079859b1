"""Lanczos eigenpairs against chosen spectra, dense matrices and ARPACK."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import eigsh
from torch import Tensor

from healing.curvature import lanczos as lanczos_module
from healing.curvature.lanczos import LanczosStatus, Recurrence, gaussian, lanczos
from healing.randomness import named_generator


class Dense:
    """A dense symmetric matrix as an operator that counts its products."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = (len(matrix), len(matrix))
        self.dtype = matrix.dtype
        self.device = matrix.device
        self.products = 0

    def __call__(self, vector: Tensor, /) -> Tensor:
        self.products += 1
        return self.matrix @ vector


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_spectrum(eigenvalues: Tensor, seed: int = 7) -> tuple[Tensor, Tensor]:
    """Symmetric float64 matrix with the given eigenvalues, and its eigenvectors as columns."""
    n = len(eigenvalues)
    noise = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    vectors = torch.linalg.qr(noise)[0]
    matrix = vectors @ torch.diag(eigenvalues.double()) @ vectors.T
    return (matrix + matrix.T) / 2, vectors


def outlier_spectrum(n: int = 300) -> Tensor:
    """Outliers at both ends of a bulk, as a language model's Hessian has them."""
    bulk = torch.linspace(-0.5, 1.0, n - 7, dtype=torch.float64)
    return torch.cat([torch.tensor([-6.0, -3.0, -2.0]), bulk, torch.tensor([5.0, 8.0, 13.0, 21.0])])


def test_both_ends_match_the_chosen_eigenvalues_and_vectors() -> None:
    eigenvalues = outlier_spectrum()
    matrix, vectors = with_spectrum(eigenvalues)
    result = lanczos(Dense(matrix), generator(), n_largest=4, n_smallest=3, tolerance=1e-9)
    assert result.status is LanczosStatus.CONVERGED
    # residual 1e-9·21, eigenvalue error residual²/gap: double precision rounding is what remains
    torch.testing.assert_close(
        result.largest.values, torch.tensor([21.0, 13, 8, 5]).double(), rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        result.smallest.values, torch.tensor([-6.0, -3, -2]).double(), rtol=1e-12, atol=0
    )
    cosines = (result.largest.vectors.T @ vectors[:, [-1, -2, -3, -4]]).diagonal().abs()
    assert (1 - cosines).abs().max() < 1e-12
    unit = torch.linalg.vector_norm(result.largest.vectors, dim=0)
    torch.testing.assert_close(unit, torch.ones(4).double(), rtol=1e-14, atol=0)


def test_agrees_with_arpack() -> None:
    noise = torch.randn(250, 250, generator=generator(3), dtype=torch.float64)
    matrix = noise + noise.T
    result = lanczos(
        Dense(matrix), generator(), n_largest=3, n_smallest=3, max_iterations=200, tolerance=1e-8
    )
    largest = np.sort(eigsh(matrix.numpy(), k=3, which="LA")[0])[::-1]
    smallest = np.sort(eigsh(matrix.numpy(), k=3, which="SA")[0])
    assert result.status is LanczosStatus.CONVERGED
    np.testing.assert_allclose(result.largest.values.numpy(), largest, rtol=1e-10)
    np.testing.assert_allclose(result.smallest.values.numpy(), smallest, rtol=1e-10)


def test_residuals_are_those_of_the_returned_pairs_and_bound_the_error() -> None:
    eigenvalues = outlier_spectrum()
    matrix, _ = with_spectrum(eigenvalues)
    # far too few steps for this tolerance: the residuals must say so
    result = lanczos(Dense(matrix), generator(), n_largest=4, max_iterations=8, tolerance=1e-9)
    assert result.status is LanczosStatus.MAX_ITERATIONS
    for pairs in (result.largest, result.smallest):
        expected = torch.linalg.vector_norm(
            matrix @ pairs.vectors - pairs.values * pairs.vectors, dim=0
        )
        torch.testing.assert_close(pairs.residuals, expected, rtol=1e-6, atol=1e-10)
        nearest = (pairs.values[:, None] - eigenvalues).abs().min(1).values
        assert (nearest <= pairs.residuals + 1e-10).all()
    assert result.largest.residuals.max() > 1e-3


def test_no_ghost_copies_of_converged_eigenvalues() -> None:
    # Without reorthogonalisation an eigenvalue this far out is found again and again: in float32
    # its copies fill the top of the Ritz spectrum within these steps.
    eigenvalues = torch.cat([torch.linspace(0, 1, 397), torch.tensor([30.0, 100.0, 1000.0])])
    matrix, _ = with_spectrum(eigenvalues)
    operator = Dense(matrix.float())
    result = lanczos(
        operator, generator(), n_largest=4, n_smallest=0, max_iterations=80, tolerance=1e-12
    )
    assert result.iterations == 80
    torch.testing.assert_close(
        result.largest.values[:3], torch.tensor([1000.0, 100, 30]).double(), rtol=1e-5, atol=0
    )
    assert result.largest.values[3] < 1.01


def test_basis_stays_orthonormal_through_a_near_breakdown() -> None:
    low_rank, _ = with_spectrum(torch.cat([torch.zeros(196), torch.tensor([1.0, 2, 3, 4])]))
    noise, _ = with_spectrum(torch.linspace(-1, 1, 200), seed=8)
    operator = Dense(low_rank + 1e-9 * noise)
    recurrence = Recurrence(operator, gaussian(operator, generator()), 60, None, None)
    for _ in range(60):
        recurrence.step()
    basis = recurrence.basis.combine(torch.eye(60))
    assert (basis.T @ basis - torch.eye(60)).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bfloat16_basis_error_bound(dtype: torch.dtype) -> None:
    eigenvalues = outlier_spectrum()
    matrix, _ = with_spectrum(eigenvalues)
    unit_roundoff = 2.0**-8
    result = lanczos(
        Dense(matrix.to(dtype)),
        generator(),
        n_largest=3,
        n_smallest=2,
        max_iterations=60,
        tolerance=unit_roundoff,
        basis_dtype=torch.bfloat16,
    )
    exact = torch.tensor([21.0, 13, 8, -6, -3], dtype=torch.float64)
    values = torch.cat([result.largest.values, result.smallest.values])
    residuals = torch.cat([result.largest.residuals, result.smallest.residuals])
    # rounding of the stored vectors enters the values squared and the vectors linearly
    assert result.status is LanczosStatus.CONVERGED
    assert (values - exact).abs().max() <= 21 * unit_roundoff**2
    assert residuals.max() <= 21 * unit_roundoff
    # and it does enter: otherwise the basis was not stored in bfloat16
    assert residuals.min() > 21 * unit_roundoff / 100


def test_rounded_basis_that_misses_the_tolerance_is_reported() -> None:
    matrix, _ = with_spectrum(outlier_spectrum())
    result = lanczos(Dense(matrix), generator(), tolerance=1e-6, basis_dtype=torch.bfloat16)
    assert result.status is LanczosStatus.STAGNATED
    assert result.largest.residuals.max() > 1e-6 * 21


def test_host_basis_changes_nothing() -> None:
    matrix, _ = with_spectrum(outlier_spectrum())
    default = lanczos(Dense(matrix), generator())
    host = lanczos(Dense(matrix), generator(), basis_device="cpu")
    assert torch.equal(default.largest.vectors, host.largest.vectors)


@pytest.mark.parametrize(
    ("eigenvalues", "distinct"),
    [(torch.ones(40), [1.0]), (torch.zeros(40), [0.0]), ([5.0, 5, 2] + [0.0] * 37, [5.0, 2, 0])],
    ids=["identity", "zero", "repeated"],
)
def test_breakdown_returns_the_distinct_eigenvalues(
    eigenvalues: Tensor, distinct: list[float]
) -> None:
    operator = Dense(torch.diag(torch.as_tensor(eigenvalues, dtype=torch.float64)))
    result = lanczos(operator, generator(), n_largest=4, n_smallest=1)
    assert result.status is LanczosStatus.BREAKDOWN
    assert result.iterations == len(distinct)
    torch.testing.assert_close(
        result.largest.values, torch.tensor(distinct).double(), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("n", [1, 2, 6])
def test_full_dimension_gives_the_whole_spectrum(n: int) -> None:
    eigenvalues = torch.arange(1, n + 1, dtype=torch.float64) - 2.5
    matrix, _ = with_spectrum(eigenvalues)
    result = lanczos(Dense(matrix), generator(), n_largest=n, n_smallest=n, tolerance=1e-10)
    assert result.status is LanczosStatus.CONVERGED
    assert result.iterations == n
    torch.testing.assert_close(result.smallest.values, eigenvalues)
    torch.testing.assert_close(result.largest.values, eigenvalues.flip(0))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_products_are_a_status_with_nan(bad: float) -> None:
    matrix = torch.eye(20)
    matrix[3, 3] = bad
    result = lanczos(Dense(matrix), generator())
    assert result.status is LanczosStatus.NONFINITE
    for pairs in (result.largest, result.smallest):
        assert pairs.values.isnan().all()
        assert pairs.residuals.isnan().all()
        assert pairs.vectors.isnan().all()
        assert pairs.vectors.shape == (20, 1)


def test_counts_its_products() -> None:
    operator = Dense(with_spectrum(outlier_spectrum())[0])
    result = lanczos(operator, generator(), n_largest=3, n_smallest=2)
    assert result.products == operator.products == result.iterations + 5


def test_one_seed_repeats_and_another_differs() -> None:
    matrix, _ = with_spectrum(outlier_spectrum())
    first, again, other = (lanczos(Dense(matrix), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first.largest.vectors, again.largest.vectors)
    assert not torch.equal(first.largest.vectors, other.largest.vectors)


@pytest.mark.parametrize(("n_largest", "n_smallest"), [(0, 0), (-1, 3), (3, -1)])
def test_refuses_no_pairs(n_largest: int, n_smallest: int) -> None:
    with pytest.raises(ValueError, match="need n_largest, n_smallest >= 0 and one pair"):
        lanczos(Dense(torch.eye(5)), generator(), n_largest=n_largest, n_smallest=n_smallest)


def test_refuses_more_pairs_than_iterations() -> None:
    with pytest.raises(ValueError, match="max_iterations 4 is less than the 5 pairs wanted"):
        lanczos(Dense(torch.eye(9)), generator(), n_largest=3, n_smallest=2, max_iterations=4)


@pytest.mark.parametrize(("numbers", "height"), [(2**28, 16), (5 * 7, 5), (6, 1)])
def test_rows_of_a_basis_go_through_the_device_in_blocks_that_fit(monkeypatch, numbers, height):
    """The projection is the same whatever the height of the blocks."""
    monkeypatch.setattr(lanczos_module, "_NUMBERS_PER_BLOCK", numbers)
    rows = torch.linalg.qr(torch.randn(7, 6, generator=named_generator(0, "q"))).Q.T
    basis = lanczos_module._Basis(20, rows[0], None, None)
    for row in (*rows, *rows, *rows):
        basis.append(row)
    basis.size = 6
    vector = torch.randn(7, generator=named_generator(1, "v"))
    expected = vector - rows.T @ (rows @ vector)
    basis.remove_from(vector)
    torch.testing.assert_close(vector, expected, rtol=0, atol=1e-5)
    basis.size = 18
    assert basis._blocks()[0] == (0, height)
