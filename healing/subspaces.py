"""The low-curvature subspace of each weight matrix, and how much of a gradient lies in it.

For a weight matrix W (m×n) with leading singular vectors U (m×k), V (n×k) holding a given share of
its energy Σσ², the subspace N is spanned by what U and V leave: P_N(G) = (I−UUᵀ) G (I−VVᵀ) (the
null-space projection of AlphaEdit, arXiv 2410.02355, taken on the weights instead of activations).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class MatrixSubspace:
    """Leading singular subspace of one matrix.

    Attributes:
        left: U, (m, k), orthonormal columns.
        right: V, (n, k), orthonormal columns.
    """

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, energy: float) -> MatrixSubspace:
        """The fewest leading singular directions whose Σσ² reaches ``energy`` of the total."""
        u, s, vt = torch.linalg.svd(weight.detach().double(), full_matrices=False)
        share = s.square().cumsum(0) / s.square().sum()
        k = int((share < energy).sum()) + 1
        return cls(u[:, :k].to(weight.dtype), vt[:k].T.to(weight.dtype).contiguous())

    @property
    def dimension(self) -> int:
        """Dimension (m−k)(n−k) of N."""
        (m, k), n = self.left.shape, self.right.shape[0]
        return (m - k) * (n - k)

    def project(self, gradient: torch.Tensor) -> torch.Tensor:
        """P_N(G), (m, n)."""
        inner = gradient - self.left @ (self.left.T @ gradient)
        return inner - (inner @ self.right) @ self.right.T


@dataclass(frozen=True)
class LowCurvatureSubspace:
    """N of a whole model: one :class:`MatrixSubspace` per matrix, fixed at healthy weights."""

    matrices: Mapping[str, MatrixSubspace]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], energy: float) -> LowCurvatureSubspace:
        """Subspaces of the given matrices at one energy share."""
        return cls({name: MatrixSubspace.of(w, energy) for name, w in weights.items()})

    def alignment(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ρ = Σ‖P_N G‖² / Σ‖G‖² over the matrices; scalar, differentiable, NaN for G = 0."""
        inside = torch.stack(
            [space.project(gradients[name]).square().sum() for name, space in self.matrices.items()]
        )
        total = torch.stack([gradients[name].square().sum() for name in self.matrices])
        return inside.sum() / total.sum()

    @property
    def isotropic_alignment(self) -> float:
        """Expected ρ of a gradient without preferred direction: dim N over all dimensions."""
        spaces = self.matrices.values()
        total = sum(s.left.shape[0] * s.right.shape[0] for s in spaces)
        return sum(s.dimension for s in spaces) / total
