"""Extreme eigenpairs of a symmetric operator by Lanczos iteration, with true residuals.

Pure linear algebra on flat vectors: nothing here knows about models or losses. An operator is
anything with `shape`, `dtype`, `device` and a call that multiplies one vector.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from healing.progress import tick

# Rows of the stored basis that are widened to the working dtype (and moved to the operator's
# device) at once, and at most how many numbers (1 GB in float32): they bound the extra memory of a
# narrow or host-side basis.
_ROWS_PER_BLOCK = 16
_NUMBERS_PER_BLOCK = 2**28

# Ritz values are recomputed every so many steps; the dense m x m decomposition is negligible
# beside a Hessian-vector product, but not beside a small dense one.
_STEPS_PER_CHECK = 5

Device = torch.device | str


class SymmetricOperator(Protocol):
    """A real symmetric linear map on flat vectors of shape `(n,)`."""

    @property
    def shape(self) -> tuple[int, int]:
        """`(n, n)`."""

    @property
    def dtype(self) -> torch.dtype:
        """Working dtype of its vectors."""

    @property
    def device(self) -> torch.device:
        """Device of its vectors."""

    def __call__(self, vector: Tensor, /) -> Tensor:
        """Product with one vector of shape `(n,)`."""


class LanczosStatus(enum.Enum):
    """How a Lanczos run ended; a value for the caller to act on, never an exception."""

    CONVERGED = "converged"
    """Every requested pair is there and its true residual meets the tolerance."""

    MAX_ITERATIONS = "max_iterations"
    """The budget of products ran out first; the residuals say how far the pairs are."""

    BREAKDOWN = "breakdown"
    """The Krylov space became invariant before it held n dimensions: the pairs are exact, but a
    repeated eigenvalue appears once only, and fewer pairs than requested may exist."""

    STAGNATED = "stagnated"
    """The recurrence's own estimate met the tolerance and the true residual does not: rounding
    of the basis (`basis_dtype`) or of the operator (finite differences) is the limit."""

    NONFINITE = "nonfinite"
    """The operator returned NaN or infinity; all numbers are NaN."""


@dataclass(frozen=True)
class Eigenpairs:
    """Approximate eigenpairs of a symmetric operator.

    Attributes:
        values: Rayleigh quotients λ = qᵀHq, shape `(k,)`, float64 on the host.
        vectors: Ritz vectors q of unit length as columns, shape `(n, k)`, working dtype.
        residuals: ‖Hq - λq‖ from one further product each, shape `(k,)`, float64 on the host.
            Some eigenvalue lies within this distance of λ (Parlett 1998, theorem 4.5.1), so
            λ + residual < 0 proves negative curvature.
    """

    values: Tensor
    vectors: Tensor
    residuals: Tensor


@dataclass(frozen=True)
class LanczosResult:
    """Both ends of a spectrum.

    Attributes:
        largest: Algebraically largest eigenvalues, descending.
        smallest: Algebraically smallest eigenvalues, ascending: the most negative first.
        status: How the run ended.
        iterations: Steps taken, the dimension of the Krylov space.
        products: Operator products spent, those for the residuals included.
        nodes: All Ritz values, ascending, shape `(iterations,)`, float64 on the host.
        weights: Squared first components of the tridiagonal matrix' eigenvectors, same shape. With
            the nodes they are the Gauss rule of the isotropic start vector's spectral measure:
            one probe of the spectral density, at no further cost.
    """

    largest: Eigenpairs
    smallest: Eigenpairs
    status: LanczosStatus
    iterations: int
    products: int
    nodes: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    weights: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))


def gaussian(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    """Standard normal vector, shape `(n,)`: an isotropic direction, not normalised."""
    n, dtype = operator.shape[0], operator.dtype
    draw = torch.randn(n, generator=generator, device=generator.device, dtype=dtype)
    return draw.to(operator.device)


class _Basis:
    """Stored Lanczos vectors, as rows, in a possibly narrower dtype or on another device."""

    def __init__(
        self, rows: int, like: Tensor, dtype: torch.dtype | None, device: Device | None
    ) -> None:
        self._rows = torch.empty(
            rows, len(like), dtype=dtype or like.dtype, device=device or like.device
        )
        self._like = like
        self.size = 0

    def append(self, vector: Tensor) -> None:
        self._rows[self.size].copy_(vector)
        self.size += 1

    def _blocks(self) -> list[tuple[int, int]]:
        # Rows of billions of numbers go through the device one at a time.
        height = max(1, min(_ROWS_PER_BLOCK, _NUMBERS_PER_BLOCK // self._rows.shape[1]))
        starts = range(0, self.size, height)
        return [(start, min(start + height, self.size)) for start in starts]

    def remove_from(self, vector: Tensor) -> None:
        """Subtract, in place, the projection of `vector` on the stored rows."""
        for start, stop in self._blocks():
            block = self._rows[start:stop].to(self._like)
            vector.addmv_(block.T, block @ vector, alpha=-1)

    def combine(self, coefficients: Tensor) -> Tensor:
        """Normalised combinations of the rows: `(size, k)` coefficients to `(n, k)` columns."""
        weights = coefficients.to(self._like)
        combined = self._like.new_zeros(weights.shape[1], len(self._like))
        for start, stop in self._blocks():
            combined.addmm_(weights[start:stop].T, self._rows[start:stop].to(self._like))
        combined /= torch.linalg.vector_norm(combined, dim=1, keepdim=True)
        return combined.T


class Recurrence:
    """The three-term recurrence, one `step` per product, orthogonalised twice against the basis.

    The current and the previous vector are kept in the working dtype whatever the basis dtype:
    the large components are removed with them, so a narrow basis only has to remove what
    rounding lets grow, and its own rounding enters at second order.

    Attributes:
        basis: The stored vectors.
        diagonal: α₁ … αₘ of the tridiagonal matrix after m steps.
        off_diagonal: β₁ … βₘ; the last one is the length of what is left outside the basis.
    """

    def __init__(
        self,
        operator: SymmetricOperator,
        start: Tensor,
        max_iterations: int,
        basis_dtype: torch.dtype | None,
        basis_device: Device | None,
    ) -> None:
        """Reserve the basis; no product is taken yet.

        Args:
            operator: Symmetric operator on `(n,)` vectors.
            start: First vector, shape `(n,)`, of any length but zero.
            max_iterations: Most steps; n if that is less.
            basis_dtype: Dtype of the stored basis; the start vector's by default.
            basis_device: Device of the stored basis; the start vector's by default.
        """
        self._operator = operator
        self.dimension = len(start)
        self._capacity = min(max_iterations, self.dimension)
        self.basis = _Basis(self._capacity, start, basis_dtype, basis_device)
        # What a rounded basis fails to remove: its rounding of what its rounding let grow.
        self._noise = max(
            10 * torch.finfo(start.dtype).eps, torch.finfo(basis_dtype or start.dtype).eps ** 2
        )
        self.diagonal: list[float] = []
        self.off_diagonal: list[float] = []
        self._previous = torch.zeros_like(start)
        self._current = start / torch.linalg.vector_norm(start)

    def step(self) -> None:
        """Multiply once and extend the basis and the tridiagonal matrix by one row."""
        self.basis.append(self._current)
        remainder = self._operator(self._current).clone()
        alpha = torch.dot(self._current, remainder)
        remainder -= alpha * self._current
        if self.off_diagonal:
            remainder -= self.off_diagonal[-1] * self._previous
        # Twice is enough (Kahan, in Parlett 1998, section 6.9); once is not, when `remainder`
        # is small beside the product it came from.
        for _ in range(2):
            self.basis.remove_from(remainder)
        beta = torch.linalg.vector_norm(remainder)
        self.diagonal.append(alpha.item())
        self.off_diagonal.append(beta.item())
        self._previous, self._current = self._current, remainder / beta

    @property
    def exhausted(self) -> bool:
        """Whether no step is left, by budget or by dimension."""
        return len(self.diagonal) == self._capacity

    @property
    def finite(self) -> bool:
        """Whether the last product was finite."""
        return math.isfinite(self.diagonal[-1]) and math.isfinite(self.off_diagonal[-1])

    @property
    def invariant(self) -> bool:
        """Whether the part of the last product outside the basis is rounding noise.

        Going on from noise that lies in the span of the basis would store a row twice, and from
        there the orthogonalisation amplifies instead of removing.
        """
        scale = max(abs(entry) for entry in self.diagonal + self.off_diagonal)
        return self.off_diagonal[-1] <= self._noise * scale

    def ritz(self) -> tuple[Tensor, Tensor]:
        """Eigenvalues `(m,)`, ascending, and eigenvectors `(m, m)` of the tridiagonal matrix."""
        diagonal = torch.tensor(self.diagonal, dtype=torch.float64)
        matrix = torch.diag(diagonal)
        if len(diagonal) > 1:
            beside = torch.tensor(self.off_diagonal[:-1], dtype=torch.float64)
            matrix += torch.diag(beside, 1) + torch.diag(beside, -1)
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors


def lanczos(
    operator: SymmetricOperator,
    generator: torch.Generator,
    *,
    n_largest: int = 1,
    n_smallest: int = 1,
    max_iterations: int = 100,
    tolerance: float = 1e-4,
    basis_dtype: torch.dtype | None = None,
    basis_device: Device | None = None,
) -> LanczosResult:
    """Eigenpairs at both ends of the spectrum, by Lanczos with full reorthogonalisation.

    Costs one product per step and one per returned pair (for its residual), and stores
    `max_iterations` vectors. A bfloat16 basis halves that against float32; Ritz vectors, being
    sums of stored ones, then carry its relative rounding u = 2⁻⁸, so residuals stagnate at or
    below u·‖H‖, and eigenvalues, in which it enters squared, at or below u²·‖H‖.

    Args:
        operator: Symmetric operator on `(n,)` vectors.
        generator: Draws the isotropic start vector.
        n_largest: Pairs wanted at the upper end.
        n_smallest: Pairs wanted at the lower (most negative) end.
        max_iterations: Most steps, at least `n_largest + n_smallest`.
        tolerance: Residual norm relative to the largest |Ritz value| at which a pair counts.
        basis_dtype: Dtype of the stored basis; the operator's by default.
        basis_device: Device of the stored basis, "cpu" for the host; the operator's by default.

    Returns:
        Pairs, residuals and status. Fewer pairs come back if the Krylov space is smaller.

    Raises:
        ValueError: If no pair is wanted, or more than `max_iterations`.

    Source:
        Lanczos 1950; Parlett, The Symmetric Eigenvalue Problem, 1998, chapters 4, 6 and 13.
    """
    wanted = n_largest + n_smallest
    if min(n_largest, n_smallest) < 0 or wanted < 1:
        raise ValueError(f"need n_largest, n_smallest >= 0 and one pair: {n_largest}, {n_smallest}")
    if max_iterations < wanted:
        raise ValueError(f"max_iterations {max_iterations} is less than the {wanted} pairs wanted")
    start = gaussian(operator, generator)
    recurrence = Recurrence(operator, start, max_iterations, basis_dtype, basis_device)
    status = _iterate(recurrence, n_largest, n_smallest, tolerance)
    return _extract(operator, recurrence, status, n_largest, n_smallest, tolerance)


def _iterate(
    recurrence: Recurrence, n_largest: int, n_smallest: int, tolerance: float
) -> LanczosStatus:
    """Step until the estimated residuals |βₘ·sₘᵢ| meet the tolerance or no step is left."""
    while True:
        tick()
        recurrence.step()
        steps = len(recurrence.diagonal)
        if not recurrence.finite:
            return LanczosStatus.NONFINITE
        if steps == recurrence.dimension:
            return LanczosStatus.CONVERGED
        if recurrence.invariant:
            return LanczosStatus.BREAKDOWN
        due = steps % _STEPS_PER_CHECK == 0 or recurrence.exhausted
        if due and steps >= n_largest + n_smallest:
            values, vectors = recurrence.ritz()
            estimates = (recurrence.off_diagonal[-1] * vectors[-1]).abs()
            ends = torch.cat([estimates[:n_smallest], estimates[steps - n_largest :]])
            if ends.max() <= tolerance * values.abs().max():
                return LanczosStatus.CONVERGED
        if recurrence.exhausted:
            return LanczosStatus.MAX_ITERATIONS


def _extract(
    operator: SymmetricOperator,
    recurrence: Recurrence,
    status: LanczosStatus,
    n_largest: int,
    n_smallest: int,
    tolerance: float,
) -> LanczosResult:
    """Ritz pairs with true residuals; a pair that only seemed converged demotes the status."""
    steps = len(recurrence.diagonal)
    if status is LanczosStatus.NONFINITE:
        undefined = _undefined_pairs(operator)
        return LanczosResult(undefined, undefined, status, steps, steps)
    values, vectors = recurrence.ritz()
    upper = torch.arange(steps - 1, max(steps - 1 - n_largest, -1), -1)
    lower = torch.arange(min(n_smallest, steps))
    largest = _pairs(operator, recurrence.basis.combine(vectors[:, upper]))
    smallest = _pairs(operator, recurrence.basis.combine(vectors[:, lower]))
    residuals = torch.cat([largest.residuals, smallest.residuals])
    if not residuals.max() <= tolerance * values.abs().max():
        status = LanczosStatus.STAGNATED if status is LanczosStatus.CONVERGED else status
    products = steps + len(residuals)
    return LanczosResult(largest, smallest, status, steps, products, values, vectors[0] ** 2)


def _pairs(operator: SymmetricOperator, vectors: Tensor) -> Eigenpairs:
    """Pairs of unit `vectors`, `(n, k)`, with their Rayleigh quotients.

    Those equal the Ritz values but for rounding, which enters them squared. The Ritz values of a
    narrow basis have it at first order, through its lost orthogonality, and the product that the
    residual needs anyway gives the better number.
    """
    values, residuals = [], []
    for vector in vectors.unbind(1):
        tick()
        product = operator(vector)
        values.append(torch.dot(vector, product).item())
        residuals.append(torch.linalg.vector_norm(product - values[-1] * vector).item())
    return Eigenpairs(
        torch.tensor(values, dtype=torch.float64),
        vectors,
        torch.tensor(residuals, dtype=torch.float64),
    )


def _undefined_pairs(operator: SymmetricOperator) -> Eigenpairs:
    undefined = torch.full((1,), math.nan, dtype=torch.float64)
    vector = torch.full((operator.shape[0], 1), math.nan).to(operator.device, operator.dtype)
    return Eigenpairs(undefined, vector, undefined)
