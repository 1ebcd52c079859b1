"""Streamed moments against numpy and scipy's SVD of the whole matrix of rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from healing.measurements import covariance
from healing.measurements.covariance import SURE_RATIO, MomentAccumulator, Moments, spectra
from healing.randomness import named_generator


def hidden_states(windows: int = 12, tokens: int = 20, d: int = 6, seed: int = 0) -> torch.Tensor:
    scales = torch.linspace(1.0, 0.1, d)
    return torch.randn(windows, tokens, d, generator=named_generator(seed, "hidden")) * scales


def moments_of(hidden: torch.Tensor, *, chunk: int = 5, per_window: bool = False) -> Moments:
    """Passed in chunks of windows, and a second time where the accumulator asks for it."""
    limit = None
    while True:
        accumulator = MomentAccumulator(per_window=per_window, limit=limit)
        for part in hidden.split(chunk):
            accumulator.add(part)
        moments = accumulator.finish()
        if not accumulator.stale(moments):
            return moments
        assert limit is None, "the exact limit is never stale"
        limit = moments.limit


def kept_rows(hidden: torch.Tensor) -> np.ndarray:
    """All at once, in numpy: tokens but the first, norm at most 10 x the (lower) median."""
    rows = hidden[:, 1:].reshape(-1, hidden.shape[-1]).double().numpy()
    norms = np.sqrt((rows**2).sum(1))
    return rows[norms <= 10 * np.sort(norms)[(len(norms) - 1) // 2]]


def reference_rank(rows: np.ndarray) -> float:
    """Roy & Vetterli's definition through scipy's SVD of the centred matrix."""
    sigma = scipy.linalg.svdvals(rows - rows.mean(0))
    p = sigma / sigma.sum()
    return float(np.exp(-np.sum(p * np.log(p))))


@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_spectrum_equals_scipy_svd_of_the_same_rows(chunk, per_window):
    hidden = hidden_states()
    rows = kept_rows(hidden)
    moments = moments_of(hidden, chunk=chunk, per_window=per_window)
    spectrum = moments.spectrum()
    sigma = scipy.linalg.svdvals(rows - rows.mean(0))
    np.testing.assert_allclose(spectrum.singular_values.numpy(), sigma, rtol=1e-10)
    assert spectrum.effective_rank == pytest.approx(reference_rank(rows), rel=1e-10)
    assert spectrum.rows == moments.rows == len(rows) == 12 * 19
    np.testing.assert_allclose(moments.mean.numpy(), rows.mean(0), rtol=1e-12, atol=1e-14)


def test_covariance_is_numpys():
    hidden = hidden_states() + 3.0
    expected = np.cov(kept_rows(hidden).T, bias=True)
    np.testing.assert_allclose(moments_of(hidden).covariance().numpy(), expected, rtol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    spread=st.floats(0.0, 3.0),
    chunk=st.integers(1, 12),
    per_window=st.booleans(),
)
def test_rows_are_chosen_by_the_median_of_all_however_they_come(seed, spread, chunk, per_window):
    """Norms over several decades: rows on both sides of every limit, in any order."""
    draw = named_generator(seed, "scale")
    hidden = hidden_states(seed=seed)
    hidden = hidden * torch.exp(spread * torch.randn(12, 20, 1, generator=draw))
    rows = kept_rows(hidden)
    moments = moments_of(hidden, chunk=chunk, per_window=per_window)
    assert moments.rows == len(rows)
    assert moments.dropped_share == pytest.approx(1 - len(rows) / (12 * 19), abs=1e-12)
    assert moments.spectrum().effective_rank == pytest.approx(reference_rank(rows), rel=1e-8)


def test_rows_that_were_taken_too_early_cost_a_second_pass():
    hidden = torch.randn(10, 30, 4, generator=named_generator(0, "x"))
    hidden[:2] *= 100.0  # the first chunk's median is 100 x that of all
    first = MomentAccumulator()
    for part in hidden.split(2):
        first.add(part)
    moments = first.finish()
    assert first.stale(moments)
    assert moments_of(hidden, chunk=2).rows == len(kept_rows(hidden)) < moments.rows


def test_a_median_that_grows_needs_no_second_pass():
    hidden = torch.randn(10, 30, 4, generator=named_generator(0, "x"))
    hidden[:2] /= 100.0
    accumulator = MomentAccumulator()
    for part in hidden.split(2):
        accumulator.add(part)
    moments = accumulator.finish()
    assert not accumulator.stale(moments)
    assert moments.rows == len(kept_rows(hidden)) == 10 * 29
    assert SURE_RATIO < 10


def test_a_common_offset_far_larger_than_the_spread_leaves_the_spectrum():
    """As in collapsed blocks: without the shift, 1e6 of offset leaves no digit of 1e-3² in 1e12."""
    hidden = hidden_states().double() * 1e-3
    plain = moments_of(hidden).spectrum().singular_values
    moved = moments_of(hidden + 1e6).spectrum().singular_values
    # float64 itself holds 1e6 + x to 1e-10: a relative 1e-6 of the smallest spread here, 1e-4.
    torch.testing.assert_close(moved, plain, rtol=1e-5, atol=0.0)


def test_the_first_token_would_change_the_rank():
    hidden = hidden_states()
    hidden[:, 0] = 8.0 * torch.randn(12, 6, generator=named_generator(1, "sink"))
    rank = moments_of(hidden).spectrum().effective_rank
    with_first = hidden.reshape(-1, 6).double().numpy()
    assert rank == pytest.approx(reference_rank(kept_rows(hidden)), rel=1e-10)
    assert abs(reference_rank(with_first) - rank) > 0.05


def test_peak_counts_first_tokens_and_outliers():
    hidden = hidden_states()
    hidden[3, 0, 2], hidden[4, 5, 1] = -700.0, 500.0
    moments = moments_of(hidden)
    assert moments.peak == 700.0
    assert moments.dropped_share == pytest.approx(1 / (12 * 19))


@pytest.mark.parametrize("per_window", [False, True])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("where", [0, 3, 11])
def test_nonfinite_states_give_nan_not_a_number(bad, where, per_window):
    hidden = hidden_states()
    hidden[where, 4, 1] = bad
    moments = moments_of(hidden, per_window=per_window)
    assert not moments.finite
    assert math.isnan(moments.spectrum().effective_rank)
    assert moments.dropped_share == 0
    assert moments.rows == 12 * 19
    assert math.isnan(moments.peak) == math.isnan(bad)


def test_identical_rows_have_no_spectrum():
    moments = moments_of(torch.ones(4, 5, 3))
    assert moments.rows == 16
    assert math.isnan(moments.spectrum().effective_rank)


@pytest.mark.parametrize("stacked", [1, 2, 9])
def test_blocks_decomposed_together_have_the_bits_of_each_alone(monkeypatch, stacked):
    """One of them holds a state that is not finite; eigenvalues of LAPACK, matrix by matrix."""
    states = [hidden_states(seed=seed) for seed in range(5)]
    states[2][0, 3, 1] = math.inf
    blocks = [moments_of(hidden) for hidden in states]
    calls = []
    plain = torch.linalg.eigvalsh
    monkeypatch.setattr(torch.linalg, "eigvalsh", lambda x: (calls.append(len(x)), plain(x))[1])
    monkeypatch.setattr(covariance, "STACK_BYTES", stacked * 8 * 6**2)
    found = spectra(blocks)
    assert calls == {1: [1, 1, 1, 1], 2: [2, 2], 9: [4]}[stacked]
    for number, (block, spectrum) in enumerate(zip(blocks, found, strict=True)):
        if number == 2:
            assert bool(spectrum.eigenvalues.isnan().all())
        else:
            alone = plain(block.covariance()).flip(0).clamp_min(0)
            assert torch.equal(spectrum.eigenvalues, alone)
            rank = reference_rank(kept_rows(states[number]))
            assert spectrum.effective_rank == pytest.approx(rank, rel=1e-9)
        assert (spectrum.rows, spectrum.dropped_share) == (block.rows, block.dropped_share)
