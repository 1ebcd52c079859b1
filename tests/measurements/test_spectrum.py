"""Spectral numbers against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from healing.measurements.spectrum import Spectrum, effective_rank, keep_mask, spectral_entropy


@pytest.mark.parametrize("n", [1, 3, 10])
def test_rank_of_equal_eigenvalues_is_their_number(n):
    values = torch.cat([torch.ones(n, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)])
    assert float(effective_rank(values)) == pytest.approx(n, rel=1e-12)


def test_entropy_of_two_singular_values_by_hand():
    # λ = (9, 1) → σ = (3, 1), p = (3/4, 1/4).
    expected = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    values = torch.tensor([9.0, 1.0], dtype=torch.float64)
    assert float(spectral_entropy(values)) == pytest.approx(expected, rel=1e-12)


def test_scale_changes_nothing_and_zero_is_nan():
    values = torch.tensor([4.0, 2.0, 0.5], dtype=torch.float64)
    assert float(effective_rank(1e-6 * values)) == pytest.approx(float(effective_rank(values)))
    assert math.isnan(float(effective_rank(torch.zeros(3))))


def test_other_spectral_numbers_by_hand():
    spectrum = Spectrum(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), 100, 0.0)
    assert spectrum.participation_ratio == pytest.approx(49 / 21)
    assert spectrum.stable_rank == pytest.approx(7 / 4)
    assert spectrum.spectral_gap == pytest.approx(2.0)
    shares = [4 / 7, 2 / 7, 1 / 7]
    entropy = -sum(p * math.log(p) for p in shares)
    assert spectrum.effective_rank_energy == pytest.approx(math.exp(entropy), rel=1e-12)


def test_first_token_and_outlying_norms_are_left_out():
    hidden = torch.ones(2, 5, 3)
    hidden[:, 0] = 7.0  # the first token: out whatever its norm
    hidden[1, 2] *= 10.5  # over 10 x the median norm
    hidden[1, 3] *= 9.5  # under it
    expected = torch.ones(2, 5, dtype=torch.bool)
    expected[:, 0] = False
    expected[1, 2] = False
    assert torch.equal(keep_mask(hidden), expected)
