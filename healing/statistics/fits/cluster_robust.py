"""Least squares whose standard errors hold where observations of a cluster depend on one another.

Bias-reduced sandwich (CR2: Bell & McCaffrey 2002) with Satterthwaite degrees of freedom for every
coefficient (Pustejovsky & Tipton 2018), working model: independent errors of one variance. With few
clusters the plain sandwich is too small and its normal quantiles are too; these are not.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from healing.statistics.intervals import FloatArray, Interval, with_t_bounds

SINGULAR = 1e-10
"""Eigenvalues below this are directions that a cluster alone determines: they have no residual."""


@dataclass(frozen=True, eq=False)
class ClusterRobustFit:
    """Coefficients of a regression with their cluster-robust errors.

    ``coefficients``, ``standard_errors`` and ``degrees_of_freedom`` have the shape ``(columns,)``.
    """

    coefficients: FloatArray
    standard_errors: FloatArray
    degrees_of_freedom: FloatArray
    residuals: FloatArray
    n_clusters: int

    def interval(self, column: int, confidence: float) -> Interval:
        """Student t interval of a coefficient; ``n`` is the number of clusters."""
        nan, point = math.nan, float(self.coefficients[column])
        found = Interval(nan, point, nan, self.n_clusters, "cluster-robust (CR2)", confidence)
        df = float(self.degrees_of_freedom[column])
        return with_t_bounds(found, float(self.standard_errors[column]), df)


def _inverse_root(matrix: FloatArray) -> FloatArray:
    """Symmetric A with A·M·A = projection on what M does not annihilate."""
    values, vectors = np.linalg.eigh(matrix)
    roots = np.where(values > SINGULAR, 1.0 / np.sqrt(np.maximum(values, SINGULAR)), 0.0)
    inverse: FloatArray = (vectors * roots) @ vectors.T
    return inverse


def cluster_robust(
    design: FloatArray, response: FloatArray, clusters: Sequence[Hashable]
) -> ClusterRobustFit:
    """Ordinary least squares with CR2 errors.

    V = B(Σ_g X_gᵀA_g e_g e_gᵀA_g X_g)B with B = (XᵀX)⁻¹ and A_g = (I − X_gBX_gᵀ)^(−1/2); degrees of
    freedom of a coefficient: (Σ p_gᵀp_g)²/ΣΣ(p_gᵀp_h)² with p_g = (I − H)_gᵀA_gX_gBc.

    Args:
        design: of full column rank, shape ``(n, columns)``.
        response: shape ``(n,)``.
        clusters: one label per observation.

    Raises:
        ValueError: the columns are linearly dependent, there are no more observations than columns,
            or fewer than two clusters.
    """
    n, columns = design.shape
    if np.linalg.matrix_rank(design) < columns:
        raise ValueError("the columns of the design depend on one another; leave one out")
    if n <= columns:
        raise ValueError(f"{n} observations for {columns} columns; pass more observations")
    places: dict[Hashable, list[int]] = {}
    for place, label in enumerate(clusters):
        places.setdefault(label, []).append(place)
    if len(places) < 2:
        raise ValueError(f"{len(places)} cluster; pass at least two")
    bread = np.linalg.inv(design.T @ design)
    coefficients = bread @ (design.T @ response)
    residuals = response - design @ coefficients
    annihilator = np.eye(n) - design @ bread @ design.T
    scores, loadings = [], []
    for members in places.values():
        rows: NDArray[np.intp] = np.asarray(members, dtype=np.intp)
        adjusted = _inverse_root(annihilator[np.ix_(rows, rows)]) @ design[rows] @ bread
        scores.append(residuals[rows] @ adjusted)
        loadings.append(annihilator[:, rows] @ adjusted)
    standard_errors = np.sqrt((np.array(scores) ** 2).sum(axis=0))
    p = np.array(loadings)  # (clusters, n, columns)
    gram = np.einsum("gnc,hnc->cgh", p, p)
    traces = np.trace(gram, axis1=1, axis2=2)
    with np.errstate(invalid="ignore", divide="ignore"):
        degrees = traces**2 / (gram**2).sum(axis=(1, 2))
    return ClusterRobustFit(coefficients, standard_errors, degrees, residuals, len(places))
