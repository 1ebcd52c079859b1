"""Bases from Gram matrices against scipy's singular vectors."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from healing.curvature import subspaces
from healing.curvature.subspaces import MatrixSubspace
from healing.models.blocks import block_matrices
from healing.randomness import named_generator


def with_spectrum(shape: tuple[int, int], singular: torch.Tensor) -> torch.Tensor:
    """A float64 matrix of random singular vectors and the given σ."""
    m, n = shape
    draws = torch.randn(2, max(m, n), len(singular), generator=named_generator(0, "vectors"))
    left, right = (
        torch.linalg.qr(d[:size].double())[0] for d, size in zip(draws, shape, strict=True)
    )
    return (left * singular) @ right.T


def projector(columns) -> torch.Tensor:
    basis = torch.as_tensor(columns)
    return basis @ basis.T


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (40, 40)])
@pytest.mark.parametrize("least", [1e-1, 3e-3, 1e-5])  # the last by the singular vectors themselves
def test_projectors_are_those_of_the_singular_vectors(shape, least):
    """σ from 1 down to ``least``, all but the last two of them leading."""
    singular = torch.logspace(0, torch.tensor(least).log10().item(), 40, dtype=torch.float64)
    weight = with_spectrum(shape, singular)
    energies = singular.square().cumsum(0) / singular.square().sum()
    space = MatrixSubspace.of(weight, float(energies[37] + energies[36]) / 2)
    assert space.k == 38
    u, _, vt = scipy.linalg.svd(weight.numpy(), full_matrices=False)
    long, short = (vt.T, u) if space.wide else (u, vt.T)
    expected = [projector(long[:, :38].copy()), projector(short[:, 38:].copy())]
    for basis, wanted in zip((space.leading, space.rest), expected, strict=True):
        assert float((projector(basis) - wanted).abs().max()) <= 1e-8
        assert torch.allclose(
            basis.T @ basis, torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-9
        )


def test_ordinary_weights_need_no_singular_vectors(nano, monkeypatch):
    monkeypatch.setattr(subspaces, "split_by_svd", None)  # calling it would raise
    for weight in block_matrices(nano.model).values():
        space = MatrixSubspace.of(weight, 0.99)
        tall = weight.detach().T if space.wide else weight.detach()
        u, s, vt = scipy.linalg.svd(tall.double().numpy(), full_matrices=False)
        assert space.k == int(((s**2).cumsum() / (s**2).sum() < 0.99).sum()) + 1
        # Stored in float32.
        torch.testing.assert_close(
            projector(space.leading), projector(u[:, : space.k].copy()).float(), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            projector(space.rest), projector(vt[space.k :].T.copy()).float(), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize(("energy", "by_svd"), [(0.999, False), (1.0, True)])
def test_small_leading_values_are_not_divided_by(energy, by_svd, monkeypatch):
    """σ = 1 ten times and 1e-4 ten times: all energy takes the small ones in."""
    used = []
    plain = subspaces.split_by_svd
    monkeypatch.setattr(subspaces, "split_by_svd", lambda *a: (used.append(1), plain(*a))[1])
    singular = torch.tensor([1.0] * 10 + [1e-4] * 10, dtype=torch.float64)
    space = MatrixSubspace.of(with_spectrum((30, 20), singular), energy)
    assert bool(used) == by_svd
    identity = torch.eye(space.k, dtype=torch.float64)
    assert torch.allclose(space.leading.T @ space.leading, identity, rtol=0, atol=1e-9)
