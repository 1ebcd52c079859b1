"""Greedy continuations: against transformers' own, and without touching any random stream."""

from __future__ import annotations

import torch

from healing.measurements.continuations import NOT_COMPUTED, continued, openings_of
from healing.measurements.probe import Probe


def test_they_are_what_transformers_generates_greedily(nano, probe):
    found = openings_of(probe.windows)
    length = found.true.shape[1]
    ours = continued(nano.model, found.openings, length)
    theirs = nano.model.generate(
        found.openings, attention_mask=torch.ones_like(found.openings), do_sample=False,
        max_new_tokens=length, min_new_tokens=length, pad_token_id=0,
    )  # fmt: skip
    assert torch.equal(ours, theirs[:, found.openings.shape[1] :])


def test_openings_and_what_follows_are_the_probes_own_windows(probe):
    found = openings_of(probe.windows)
    assert found.openings.shape == (4, 16)
    assert found.true.shape == (4, 24)
    joined = torch.cat([found.openings, found.true], dim=1)
    whole = probe.windows[:, : joined.shape[1]]
    assert all(any(torch.equal(row, window) for window in whole) for row in joined)
    assert len({tuple(row.tolist()) for row in joined}) == 4


def test_short_windows_and_a_single_one_have_openings_too():
    found = openings_of(torch.arange(8)[None])
    assert found.openings.tolist() == [[0, 1]]
    assert found.true.tolist() == [[2, 3, 4, 5, 6, 7]]


def test_nothing_is_drawn_and_the_mode_is_restored(nano, probe):
    nano.model.train()
    before = torch.random.get_rng_state()
    first = continued(nano.model, openings_of(probe.windows).openings, 5)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert nano.model.training
    assert torch.equal(first, continued(nano.model, openings_of(probe.windows).openings, 5))


def test_a_model_that_cannot_compute_says_nothing(nano, probe: Probe):
    with torch.no_grad():
        next(nano.model.parameters()).fill_(float("nan"))
    said = continued(nano.model, openings_of(probe.windows).openings, 3)
    assert (said == NOT_COMPUTED).all()
