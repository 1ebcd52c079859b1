"""Curvature of the clean loss at the healthy weights: what HAEP's theory speaks of.

The Hessian is that of the mean next-token loss on fixed windows of the ``attack`` split, in all
matrices of the blocks together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypedDict

import psutil
import torch
from torch import nn

from healing.config.attack import AttackConfig
from healing.curvature.hessian import HessianOperator, LeadingSubspace
from healing.curvature.lanczos import LanczosResult, lanczos
from healing.curvature.stochastic_lanczos import QuotientsSoFar, rayleigh_percentile
from healing.curvature.subspaces import HessianSubspace
from healing.data.splits import Corpus
from healing.errors import ConfigError
from healing.models.blocks import block_matrices, next_token_loss
from healing.models.loading import LoadedModel

LANCZOS_TOLERANCE = 1e-2
"""Residual relative to the largest eigenvalue: the span is what counts, not its vectors' digits."""

LARGE = 50_000_000
"""From this many parameters on the Lanczos basis is kept in bfloat16 in host memory."""


def clean_hessian(config: AttackConfig, loaded: LoadedModel, corpus: Corpus) -> HessianOperator:
    """Hessian of the clean loss in the block matrices, exact, in batches of the attack's size.

    Raises:
        CorpusError: The attack split is too small.
    """
    tokens = int(config.curvature_tokens)
    length = min(config.sequence_length, tokens)
    windows = corpus.windows("attack", loaded.tokenizer, length, tokens)
    parts = windows.to(loaded.device).split(int(config.batch_size))
    return HessianOperator(
        loaded.model,
        next_token_loss,
        parts,
        [len(part) for part in parts],
        parameters=block_matrices(loaded.model).values(),
    )


class BasisPlace(TypedDict):
    """Format and device of a Lanczos basis (:func:`healing.curvature.lanczos.lanczos`)."""

    basis_dtype: torch.dtype | None
    basis_device: str | None


def basis_place(parameters: int) -> BasisPlace:
    """Beside the model in its own format; of a large one in bfloat16 in host memory."""
    if parameters >= LARGE:
        return {"basis_dtype": torch.bfloat16, "basis_device": "cpu"}
    return {"basis_dtype": None, "basis_device": None}


@dataclass(frozen=True)
class CleanCurvature:
    """Leading Hessian subspace and how well it was found.

    Attributes:
        subspace: The complement of the leading eigenvectors.
        pairs: Both ends of the spectrum with residuals.
    """

    subspace: HessianSubspace
    pairs: LanczosResult

    def metrics(self) -> dict[str, float]:
        """Eigenvalues (nats per squared unit of weight) and the largest residual ‖Hq−λq‖."""
        largest = self.pairs.largest
        return {
            "hessian_lambda_max": float(largest.values[0]),
            "hessian_lambda_k": float(largest.values[-1]),
            "hessian_lambda_min": float(self.pairs.smallest.values[0]),
            "hessian_largest_residual": float(largest.residuals.max()),
            "hessian_products": float(self.pairs.products),
        }

    @property
    def status(self) -> str:
        """How Lanczos ended."""
        return self.pairs.status.value


def hessian_subspace(
    operator: HessianOperator,
    model: nn.Module,
    directions: int,
    generator: torch.Generator,
    pairs: LanczosResult | None = None,
) -> CleanCurvature:
    """Complement of the ``directions`` leading eigenvectors (largest λ).

    Args:
        operator: Hessian in the block matrices of ``model``.
        model: The healthy model.
        directions: k.
        generator: Draws the start vector.
        pairs: What Lanczos found before, from the same arguments; it is not run again.

    Raises:
        ConfigError: The Lanczos basis does not fit into host memory.
        ValueError: Lanczos met values that are not finite, or fewer than k directions exist.
    """
    pairs = pairs or _leading_pairs(operator, directions, generator)
    shapes = {name: p.shape for name, p in block_matrices(model).items()}
    leading = LeadingSubspace.from_lanczos(pairs, directions)
    return CleanCurvature(HessianSubspace(shapes, leading), pairs)


def _leading_pairs(
    operator: HessianOperator, directions: int, generator: torch.Generator
) -> LanczosResult:
    n = operator.shape[0]
    iterations = min(n, 6 * directions + 40)
    if n >= LARGE:
        require_room(torch.bfloat16.itemsize * iterations * n, iterations)
    with operator.retained_graphs():
        return lanczos(
            operator,
            generator,
            n_largest=directions,
            n_smallest=1,
            max_iterations=iterations,
            tolerance=LANCZOS_TOLERANCE,
            **basis_place(n),
        )


def require_room(needed: int, vectors: int) -> None:
    """Refuse a Lanczos basis that the host cannot hold, before hours are spent on it.

    Raises:
        ConfigError: Fewer than ``needed`` bytes are free.
    """
    available = psutil.virtual_memory().available
    if needed > available:
        raise ConfigError(
            f"--subspace hessian keeps {vectors} Lanczos vectors, {needed / 1e9:.0f} GB of host "
            f"memory for this model, and {available / 1e9:.0f} GB are free: lower "
            "--hessian-directions or use --subspace singular"
        )


def rayleigh_rank(
    operator: HessianOperator,
    gradients: Mapping[str, torch.Tensor],
    draws: int,
    generator: torch.Generator,
    begun: QuotientsSoFar | None = None,
    keep: Callable[[QuotientsSoFar], None] = lambda state: None,
) -> dict[str, float]:
    """Curvature along a gradient, gᵀHg/gᵀg, and its percentile among random directions.

    Low-curvature attacks should come out low. Random directions concentrate at tr(H)/n, so their
    mean is reported beside the percentile.

    Args:
        operator: Hessian in the parameters of ``gradients``, in their order.
        gradients: Parameter name → gradient.
        draws: Random directions.
        generator: Draws them.
        begun: Products that are not taken again.
        keep: Given what there is after every product.
    """
    vector = operator.flatten(gradients.values())
    with operator.retained_graphs():
        ranked = rayleigh_percentile(operator, vector, generator, draws, begun=begun, keep=keep)
    return {
        "rayleigh_quotient": ranked.quotient,
        "rayleigh_percentile": ranked.percentile,
        "rayleigh_random_mean": float(ranked.random_quotients.mean()),
        "rayleigh_random_max": float(ranked.random_quotients.max()),
    }
