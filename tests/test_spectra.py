"""Spectral numbers against closed forms, scipy's SVD and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from healing.randomness import named_generator
from healing.spectra import (
    CentredRows,
    Spectrum,
    bootstrap_weights,
    effective_rank,
    keep_mask,
    mean_rank_standard_error,
    spectral_entropy,
)


def hidden_states(windows: int = 12, tokens: int = 20, d: int = 6, seed: int = 0) -> torch.Tensor:
    scales = torch.linspace(1.0, 0.1, d)
    return torch.randn(windows, tokens, d, generator=named_generator(seed, "hidden")) * scales


def reference_rank(rows: np.ndarray) -> float:
    """Roy & Vetterli's definition through scipy's SVD of the centred matrix."""
    sigma = scipy.linalg.svdvals(rows - rows.mean(0))
    p = sigma / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


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


def test_spectrum_equals_scipy_svd_of_the_same_rows():
    hidden = hidden_states()
    rows = hidden[:, 1:].reshape(-1, 6).double().numpy()  # no outliers here: only first tokens go
    spectrum = CentredRows.of(hidden).spectrum()
    sigma = scipy.linalg.svdvals(rows - rows.mean(0))
    np.testing.assert_allclose(spectrum.singular_values.numpy(), sigma, rtol=1e-10)
    assert spectrum.effective_rank == pytest.approx(reference_rank(rows), rel=1e-10)
    assert spectrum.rows == 12 * 19


def test_other_spectral_numbers_by_hand():
    spectrum = Spectrum(torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64), 100, 0.0)
    assert spectrum.participation_ratio == pytest.approx(49 / 21)
    assert spectrum.stable_rank == pytest.approx(7 / 4)
    assert spectrum.spectral_gap == pytest.approx(2.0)
    assert spectrum.enough_rows
    assert not Spectrum(torch.ones(30, dtype=torch.float64), 100, 0.0).enough_rows


def test_first_token_and_outlying_norms_are_left_out():
    hidden = torch.ones(2, 5, 3)
    hidden[:, 0] = 7.0  # the first token: out whatever its norm
    hidden[1, 2] *= 10.5  # over 10 x the median norm
    hidden[1, 3] *= 9.5  # under it
    expected = torch.ones(2, 5, dtype=torch.bool)
    expected[:, 0] = False
    expected[1, 2] = False
    assert torch.equal(keep_mask(hidden), expected)
    assert CentredRows.of(hidden).dropped_share == pytest.approx(1 / 8)


def test_the_first_token_would_change_the_rank():
    hidden = hidden_states()
    hidden[:, 0] = 8.0 * torch.randn(12, 6, generator=named_generator(1, "sink"))
    rank = CentredRows.of(hidden).spectrum().effective_rank
    rows = hidden[:, 1:].reshape(-1, 6).double().numpy()
    with_first = hidden.reshape(-1, 6).double().numpy()
    assert rank == pytest.approx(reference_rank(rows), rel=1e-10)
    assert abs(reference_rank(with_first) - rank) > 0.05


def test_constant_offset_is_removed():
    hidden = hidden_states()
    plain = CentredRows.of(hidden).spectrum().effective_rank
    assert CentredRows.of(hidden + 2.0).spectrum().effective_rank == pytest.approx(plain, rel=1e-5)


def test_nonfinite_states_give_nan_not_a_number():
    for bad in (math.inf, math.nan):
        hidden = hidden_states()
        hidden[3, 4, 1] = bad
        rows = CentredRows.of(hidden)
        assert math.isnan(rows.spectrum().effective_rank)
        assert rows.dropped_share == 0
        assert math.isnan(mean_rank_standard_error([rows], named_generator(0, "b")))


def test_bootstrap_of_whole_sample_is_the_estimate():
    rows = CentredRows.of(hidden_states())
    once = torch.ones(1, 12, dtype=torch.float64)
    assert float(rows.bootstrap_ranks(once)[0]) == pytest.approx(
        rows.spectrum().effective_rank, rel=1e-10
    )


def test_bootstrap_resample_equals_recomputed_rows():
    hidden = hidden_states()
    weights = bootstrap_weights(3, 12, named_generator(0, "weights"))
    assert torch.equal(weights.sum(1), torch.full((3,), 12.0, dtype=torch.float64))
    for weight, rank in zip(weights, CentredRows.of(hidden).bootstrap_ranks(weights), strict=True):
        drawn = hidden.repeat_interleave(weight.long(), dim=0)[:, 1:].reshape(-1, 6).double()
        assert float(rank) == pytest.approx(reference_rank(drawn.numpy()), rel=1e-9)


def test_linearised_error_agrees_with_the_bootstrap():
    rows = CentredRows.of(hidden_states(windows=60))
    weights = bootstrap_weights(2000, 60, named_generator(0, "weights"))
    bootstrap = float(rows.bootstrap_ranks(weights).std())
    linear = float(rows.rank_influence().square().sum().sqrt())
    # 2,000 resamples give the bootstrap's own error 1.6 %; the linearisation is of first order.
    assert linear == pytest.approx(bootstrap, rel=0.15)
    assert float(rows.rank_influence().sum()) == pytest.approx(0.0, abs=1e-9)


def test_standard_error_matches_repeated_sampling():
    ranks, errors = [], []
    for seed in range(120):
        rows = CentredRows.of(hidden_states(windows=40, seed=seed))
        ranks.append(rows.spectrum().effective_rank)
        errors.append(mean_rank_standard_error([rows], named_generator(seed, "bootstrap")))
    # The standard deviation of 120 draws is known to about 6.5 % (1/√(2·119)); three of those.
    assert np.mean(errors) == pytest.approx(np.std(ranks, ddof=1), rel=0.2)


def test_blocks_are_resampled_together():
    rows = CentredRows.of(hidden_states())
    one = mean_rank_standard_error([rows], named_generator(0, "bootstrap"))
    same_twice = mean_rank_standard_error([rows, rows], named_generator(0, "bootstrap"))
    # Two copies of one block are perfectly correlated: averaging them must not shrink the error.
    assert same_twice == pytest.approx(one, rel=1e-9)
