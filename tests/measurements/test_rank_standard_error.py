"""Standard errors of the effective rank against recomputed resamples and repeated sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from healing.measurements.covariance import Moments
from healing.measurements.rank_standard_error import (
    RankInfluence,
    bootstrap_error,
    bootstrap_ranks,
    bootstrap_weights,
    linear_error,
)
from healing.randomness import named_generator
from tests.measurements.test_covariance import hidden_states, moments_of, reference_rank


def windows_of(hidden: torch.Tensor) -> Moments:
    return moments_of(hidden, per_window=True)


def influence_of(hidden: torch.Tensor) -> RankInfluence:
    """Without keeping windows apart, in chunks."""
    influence = RankInfluence(moments_of(hidden))
    for part in hidden.split(7):
        influence.add(part)
    return influence


def test_bootstrap_of_whole_sample_is_the_estimate():
    moments = windows_of(hidden_states())
    once = torch.ones(1, 12, dtype=torch.float64)
    expected = moments.spectrum().effective_rank
    assert float(bootstrap_ranks(moments, once)[0]) == pytest.approx(expected, rel=1e-10)


def test_bootstrap_resample_equals_recomputed_rows():
    hidden = hidden_states()
    weights = bootstrap_weights(3, 12, named_generator(0, "weights"))
    assert torch.equal(weights.sum(1), torch.full((3,), 12.0, dtype=torch.float64))
    for weight, rank in zip(weights, bootstrap_ranks(windows_of(hidden), weights), strict=True):
        drawn = hidden.repeat_interleave(weight.long(), dim=0)[:, 1:].reshape(-1, 6).double()
        assert float(rank) == pytest.approx(reference_rank(drawn.numpy()), rel=1e-9)


def test_influence_is_the_derivative_by_a_windows_weight():
    """Against central differences of the bootstrap's own formula, an outlier left out of both."""
    hidden = hidden_states()
    hidden[2, 7] *= 100.0
    moments, h = windows_of(hidden), 1e-5
    up, down = (torch.ones(12, 12, dtype=torch.float64) + s * h * torch.eye(12) for s in (1, -1))
    slopes = (bootstrap_ranks(moments, up) - bootstrap_ranks(moments, down)) / (2 * h)
    found = influence_of(hidden).per_window()
    # Central differences err by h² and by rounding over h: both about 1e-10 here.
    torch.testing.assert_close(found, slopes, rtol=1e-6, atol=1e-9)
    assert float(found.sum()) == pytest.approx(0.0, abs=1e-9)


def test_linearised_error_agrees_with_the_bootstrap():
    hidden = hidden_states(windows=60)
    weights = bootstrap_weights(2000, 60, named_generator(0, "weights"))
    bootstrap = float(bootstrap_ranks(windows_of(hidden), weights).std())
    # 2,000 resamples give the bootstrap's own error 1.6 %; the linearisation is of first order.
    assert linear_error([influence_of(hidden)]) == pytest.approx(bootstrap, rel=0.15)


def test_standard_error_matches_repeated_sampling():
    ranks, errors = [], []
    for seed in range(120):
        moments = windows_of(hidden_states(windows=40, seed=seed))
        ranks.append(moments.spectrum().effective_rank)
        errors.append(bootstrap_error([moments], named_generator(seed, "bootstrap")))
    # The standard deviation of 120 draws is known to about 6.5 % (1/√(2·119)); three of those.
    assert np.mean(errors) == pytest.approx(np.std(ranks, ddof=1), rel=0.2)


def test_blocks_are_resampled_together():
    hidden = hidden_states()
    moments, influence = windows_of(hidden), influence_of(hidden)
    one = bootstrap_error([moments], named_generator(0, "bootstrap"))
    # Two copies of one block are perfectly correlated: averaging them must not shrink the error.
    same_twice = bootstrap_error([moments, moments], named_generator(0, "bootstrap"))
    assert same_twice == pytest.approx(one, rel=1e-9)
    assert linear_error([influence, influence]) == pytest.approx(linear_error([influence]))
