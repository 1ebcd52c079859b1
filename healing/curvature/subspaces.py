"""Low-curvature subspaces of a model's weight matrices, and how much of a gradient lies in them.

Two definitions, both fixed at the healthy weights.

Singular: for a weight matrix W (m×n) with leading singular vectors U (m×k), V (n×k) holding a given
share of its energy Σσ², N is spanned by what U and V leave: P_N(G) = (I−UUᵀ) G (I−VVᵀ) (the
null-space projection of AlphaEdit, arXiv 2410.02355, on the weights instead of activations).

Hessian: the complement of the leading eigenvectors of the clean loss's Hessian in all matrices
together (gradients of clean text tend to lie in their span: Gur-Ari et al. 2018, arXiv 1812.04754).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch

from healing.curvature.hessian import LeadingSubspace
from healing.progress import phase


@dataclass(frozen=True)
class MatrixSubspace:
    """What the leading singular directions of one matrix leave.

    Of the longer side the leading directions L are kept, of the shorter side the rest R. Then
    P_N(G) = (I−LLᵀ) G R Rᵀ (for a matrix that is taller than wide), and (I−LLᵀ) G R are its
    coordinates: as few columns as R has, and the same norm.

    Attributes:
        leading: L, (longer side, k), orthonormal columns.
        rest: R, (shorter side, shorter side − k), orthonormal columns.
        wide: Whether the columns are the longer side.
    """

    leading: torch.Tensor
    rest: torch.Tensor
    wide: bool

    @classmethod
    def of(cls, weight: torch.Tensor, energy: float) -> MatrixSubspace:
        """The fewest leading singular directions whose Σσ² reaches ``energy`` of the total."""
        wide = weight.shape[0] < weight.shape[1]
        tall = (weight.T if wide else weight).detach().double()
        leading, rest = split_by_gram(tall, energy) or split_by_svd(tall, energy)
        leading, rest = (x.to(weight.dtype).contiguous() for x in (leading, rest))
        return cls(leading, rest, wide)

    @property
    def k(self) -> int:
        """Leading directions."""
        return self.leading.shape[1]

    @property
    def dimension(self) -> int:
        """Dimension (m−k)(n−k) of N."""
        return (len(self.leading) - self.k) * self.rest.shape[1]

    @property
    def size(self) -> int:
        """Numbers of the matrix, m·n."""
        return len(self.leading) * len(self.rest)

    def coordinates(self, gradient: torch.Tensor) -> torch.Tensor:
        """(I−LLᵀ) G R, (longer side, shorter side − k): ‖coordinates‖ = ‖P_N(G)‖."""
        inner = (gradient.T if self.wide else gradient) @ self.rest
        return inner - self.leading @ (self.leading.T @ inner)

    def project(self, gradient: torch.Tensor) -> torch.Tensor:
        """P_N(G), of the gradient's shape."""
        tall = self.coordinates(gradient) @ self.rest.T
        return tall.T if self.wide else tall

    def energies_of_product(
        self, rows: torch.Tensor, columns: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """‖P_N(G)‖² and ‖G‖² of G = rowsᵀ·columns, with G formed only where that is cheaper.

        P_N acts on the factors: with ``long`` the factor of the longer side and ``short`` the
        other, P_N(G) has the norm of (long (I−LLᵀ))ᵀ (short R). As I−LLᵀ is a projection, the Gram
        matrix of its factor is long longᵀ − (long L)(long L)ᵀ.

        Args:
            rows: (..., tokens, m).
            columns: (..., tokens, n).

        Returns:
            Two float64 tensors (...,), differentiable.
        """
        long, short = (columns, rows) if self.wide else (rows, columns)
        inner, rest = long @ self.leading, short @ self.rest
        if not _grams_are_smaller(long, short):
            outside = long - inner @ self.leading.T
            return product_energy(outside, rest), product_energy(long, short)
        whole = _gram(long)
        return _sum_of_products(whole - _gram(inner), _gram(rest)), _sum_of_products(
            whole, _gram(short)
        )


def _grams_are_smaller(left: torch.Tensor, right: torch.Tensor) -> bool:
    tokens, m, n = *left.shape[-2:], right.shape[-1]
    return tokens * (m + n) <= m * n


def _gram(factor: torch.Tensor) -> torch.Tensor:
    """(..., tokens, tokens), in float64: its entries are summed with both signs."""
    return (factor @ factor.mT).double()


def _sum_of_products(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left * right).sum((-2, -1))


def product_energy(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """‖leftᵀ·right‖² = Σ (left leftᵀ)∘(right rightᵀ), from whichever of the two is smaller.

    For the gradient of a linear layer (inputs and output gradients of one sequence) the Gram form
    needs tokens² numbers instead of a weight's size (Goodfellow 2015, arXiv 1510.01799; "ghost
    norms" of Li et al. 2022, arXiv 2110.05679).

    Args:
        left: (..., tokens, m).
        right: (..., tokens, n).

    Returns:
        float64 (...,), differentiable.
    """
    if _grams_are_smaller(left, right):
        return _sum_of_products(_gram(left), _gram(right))
    return (left.mT @ right).double().square().sum((-2, -1))


LEAST_RATIO = 1e-3
"""Leading σ down to this share of the largest are found from the Gram matrix. It holds their
squares, so that L's columns are orthonormal up to 2e-16/:data:`LEAST_RATIO`²."""


def _leading_count(energies: torch.Tensor, energy: float) -> int:
    share = energies.cumsum(0) / energies.sum()
    return int((share < energy).sum()) + 1


def split_by_gram(tall: torch.Tensor, energy: float) -> tuple[torch.Tensor, torch.Tensor] | None:
    """L and R from the eigenvectors V of WᵀW, with U = WV/σ; ``None`` where a leading σ is too
    small to divide by.
    """
    squares, vectors = (x.flip(-1) for x in torch.linalg.eigh(tall.T @ tall))
    k = _leading_count(squares.clamp_min(0), energy)
    if not bool(squares[k - 1] > LEAST_RATIO**2 * squares[0]):
        return None
    return tall @ (vectors[:, :k] / squares[:k].sqrt()), vectors[:, k:]


def split_by_svd(tall: torch.Tensor, energy: float) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R from the singular vectors themselves."""
    u, s, vt = torch.linalg.svd(tall, full_matrices=False)
    k = _leading_count(s.square(), energy)
    return u[:, :k], vt[k:].T


class LowCurvatureSubspace(ABC):
    """N of a whole model."""

    @property
    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """Parameters that N is a subspace of."""

    @property
    @abstractmethod
    def isotropic_alignment(self) -> float:
        """Expected ρ of a gradient without preferred direction: dim N over all dimensions."""

    @abstractmethod
    def project(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """P_N(G) of the named parameters; differentiable."""

    @abstractmethod
    def energy_inside(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Σ‖P_N T‖² of the named parameters' tensors; scalar, differentiable."""

    @abstractmethod
    def split_energy(self, tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Σ‖P_N T‖² and Σ‖T − P_N T‖²."""

    def alignment(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ρ = Σ‖P_N G‖² / Σ‖G‖² over the parameters; scalar, differentiable, NaN for G = 0."""
        return self.energy_inside(gradients) / _energy(gradients[name] for name in self.names)

    def amplification(
        self, gradients: Mapping[str, torch.Tensor], update: Mapping[str, torch.Tensor]
    ) -> dict[str, float]:
        """How an optimiser favours N over its complement S.

        κ = (‖P_N ΔW‖/‖P_N G‖)/(‖P_S ΔW‖/‖P_S G‖): 1 where ΔW ∝ G (plain SGD), NaN where G or ΔW
        has no part in one of them.

        Args:
            gradients: G of one step.
            update: ΔW of the same step.

        Returns:
            ``kappa`` and ``update_alignment`` = ‖P_N ΔW‖²/‖ΔW‖².
        """
        (n_gradient, s_gradient), (n_update, s_update) = (
            map(math.sqrt, self.split_energy(tensors)) for tensors in (gradients, update)
        )
        total = n_update**2 + s_update**2
        return {
            "kappa": (
                (n_update / n_gradient) / (s_update / s_gradient)
                if n_gradient * s_update * s_gradient
                else math.nan
            ),
            "update_alignment": n_update**2 / total if total else math.nan,
        }


def _energy(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tensor.square().sum() for tensor in tensors]).sum()


@dataclass(frozen=True)
class SingularSubspace(LowCurvatureSubspace):
    """One :class:`MatrixSubspace` per matrix."""

    matrices: Mapping[str, MatrixSubspace]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], energy: float) -> SingularSubspace:
        """Subspaces of the given matrices at one energy share."""
        found = phase("singular bases", weights.items(), len(weights))
        return cls({name: MatrixSubspace.of(w, energy) for name, w in found})

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices."""
        return tuple(self.matrices)

    def project(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(I−UUᵀ) G (I−VVᵀ) of every matrix."""
        return {name: space.project(gradients[name]) for name, space in self.matrices.items()}

    # One matrix at a time: the projections of all together are as large as the model.

    def energy_inside(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """From the coordinates, which have the norm of the projection."""
        return _energy(space.coordinates(tensors[n]) for n, space in self.matrices.items())

    @torch.no_grad()
    def split_energy(self, tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """From the projection of every matrix and what it leaves."""
        inside = outside = 0.0
        for name, space in self.matrices.items():
            tensor = tensors[name]
            projected = space.project(tensor)
            inside += float(projected.square().sum())
            outside += float((tensor - projected).square().sum())
        return inside, outside

    @property
    def isotropic_alignment(self) -> float:
        """Σ(m−k)(n−k) / Σmn."""
        spaces = self.matrices.values()
        return sum(s.dimension for s in spaces) / sum(s.size for s in spaces)


@dataclass(frozen=True)
class HessianSubspace(LowCurvatureSubspace):
    """Complement of k leading Hessian eigenvectors.

    Attributes:
        shapes: Parameter name → shape, in the order of the operator's flat vectors.
        leading: The eigenvectors' span.
    """

    shapes: Mapping[str, torch.Size]
    leading: LeadingSubspace

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters of the Hessian."""
        return tuple(self.shapes)

    def project(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """G − QQᵀg of the flat vector g of all parameters."""
        flat = torch.cat([gradients[name].reshape(-1) for name in self.shapes])
        parts = self.leading.project(flat).split([shape.numel() for shape in self.shapes.values()])
        return {
            name: part.view(shape)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def energy_inside(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """From the projection of all parameters together."""
        return _energy(self.project(tensors).values())

    @torch.no_grad()
    def split_energy(self, tensors: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """From the projection of all parameters together."""
        projected = self.project(tensors)
        outside = (tensors[name] - part for name, part in projected.items())
        return float(_energy(projected.values())), float(_energy(outside))

    @property
    def isotropic_alignment(self) -> float:
        """1 − k/n."""
        n, k = self.leading.basis.shape
        return 1.0 - k / n
