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
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from healing.curvature import LeadingSubspace


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

    def alignment(self, gradients: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ρ = Σ‖P_N G‖² / Σ‖G‖² over the parameters; scalar, differentiable, NaN for G = 0."""
        return _energy(self.project(gradients), self.names) / _energy(gradients, self.names)

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
        inside_g, inside_w = self.project(gradients), self.project(update)
        norms = [
            float(_energy(part, self.names).sqrt())
            for part in (
                inside_w,
                inside_g,
                {name: update[name] - inside_w[name] for name in self.names},
                {name: gradients[name] - inside_g[name] for name in self.names},
            )
        ]
        n_update, n_gradient, s_update, s_gradient = norms
        total = n_update**2 + s_update**2
        return {
            "kappa": (
                (n_update / n_gradient) / (s_update / s_gradient)
                if n_gradient * s_update * s_gradient
                else math.nan
            ),
            "update_alignment": n_update**2 / total if total else math.nan,
        }


def _energy(tensors: Mapping[str, torch.Tensor], names: tuple[str, ...]) -> torch.Tensor:
    return torch.stack([tensors[name].square().sum() for name in names]).sum()


@dataclass(frozen=True)
class SingularSubspace(LowCurvatureSubspace):
    """One :class:`MatrixSubspace` per matrix."""

    matrices: Mapping[str, MatrixSubspace]

    @classmethod
    def of(cls, weights: Mapping[str, torch.Tensor], energy: float) -> SingularSubspace:
        """Subspaces of the given matrices at one energy share."""
        return cls({name: MatrixSubspace.of(w, energy) for name, w in weights.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """The matrices."""
        return tuple(self.matrices)

    def project(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """(I−UUᵀ) G (I−VVᵀ) of every matrix."""
        return {name: space.project(gradients[name]) for name, space in self.matrices.items()}

    @property
    def isotropic_alignment(self) -> float:
        """Σ(m−k)(n−k) / Σmn."""
        spaces = self.matrices.values()
        total = sum(s.left.shape[0] * s.right.shape[0] for s in spaces)
        return sum(s.dimension for s in spaces) / total


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

    @property
    def isotropic_alignment(self) -> float:
        """1 − k/n."""
        n, k = self.leading.basis.shape
        return 1.0 - k / n
