"""The probe against hand-written cross entropy and a direct pass through the blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from healing.measurements.probe import Measurement, Probe
from healing.measurements.recovery import PANEL
from healing.measurements.spectrum import Spectrum
from healing.models.blocks import transformer_blocks
from healing.models.token_loss import plain_head
from healing.randomness import named_generator
from tests.measurements.test_covariance import moments_of


def hand_written_loss(model: torch.nn.Module, windows: torch.Tensor) -> float:
    """Mean of −ln softmax(logits at t)[token t+1], in numpy float64."""
    with torch.no_grad():
        logits = model(input_ids=windows).logits.double().numpy()
    total, count = 0.0, 0
    for row, ids in zip(logits, windows.numpy(), strict=True):
        for t in range(len(ids) - 1):
            shifted = row[t] - row[t].max()
            total -= shifted[ids[t + 1]] - math.log(np.exp(shifted).sum())
            count += 1
    return total / count


def test_loss_is_hand_written_cross_entropy_of_the_next_token(nano, probe):
    small = Probe(probe.windows[:3])
    measured = small.measure(nano.model).loss
    assert measured == pytest.approx(hand_written_loss(nano.model, small.windows), rel=1e-5)


def test_labels_are_shifted_once_by_the_model_itself(nano, probe):
    """What training minimises (labels=input_ids) is what the probe measures."""
    windows = probe.windows[:4]
    trained = float(nano.model(input_ids=windows, labels=windows).loss.detach())
    assert trained == pytest.approx(hand_written_loss(nano.model, windows), rel=1e-5)
    assert Probe(windows).measure(nano.model).loss == pytest.approx(trained, rel=1e-5)


def test_spectra_are_those_of_every_block_output(nano, probe):
    small = Probe(probe.windows[:6])
    with torch.no_grad():
        states = nano.model(input_ids=small.windows, output_hidden_states=True).hidden_states
    measured = small.measure(nano.model)
    assert len(measured.spectra) == len(transformer_blocks(nano.model)) == 4
    # hidden_states[i] is the output of block i-1; the last one also passed the final layer norm.
    for block in range(3):
        direct = moments_of(states[block + 1]).spectrum()
        torch.testing.assert_close(
            measured.spectra[block].eigenvalues, direct.eigenvalues, rtol=1e-6, atol=1e-9
        )


def test_measuring_in_batches_changes_nothing(nano, probe, monkeypatch):
    whole = probe.measure(nano.model)
    monkeypatch.setattr("healing.measurements.probe.TOKENS_PER_FORWARD", 128)
    parts = probe.measure(nano.model)
    assert parts.loss == pytest.approx(whole.loss, rel=1e-6)
    assert parts.effective_rank == pytest.approx(whole.effective_rank, rel=1e-6)


def test_measuring_leaves_model_and_randomness_alone(nano, probe):
    nano.model.train()
    before = {k: v.clone() for k, v in nano.model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    probe.measure(nano.model, named_generator(0, "bootstrap"))
    assert torch.equal(torch.rand(1), expected)
    assert nano.model.training
    assert all(torch.equal(v, before[k]) for k, v in nano.model.state_dict().items())
    assert not any(block._forward_hooks for block in transformer_blocks(nano.model))


def test_nonfinite_tokens_are_counted_not_skipped(nano, probe):
    small = Probe(probe.windows[:2])
    with torch.no_grad():
        nano.model.get_output_embeddings().weight[5] = math.nan
    measured = small.measure(nano.model)
    assert measured.nonfinite_tokens == small.windows[:, 1:].numel()
    assert math.isnan(measured.loss)
    assert math.isnan(measured.perplexity)


def test_perplexity_overflows_to_infinity():
    spectrum = Spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 10, 0.0)
    assert Measurement(800.0, 0, (spectrum,)).perplexity == math.inf
    assert Measurement(2.0, 0, (spectrum,)).perplexity == pytest.approx(math.e**2)


def test_metric_names_are_the_contract(nano, probe):
    names = set(Probe(probe.windows[:2]).measure(nano.model).metrics())
    assert {"effective_rank", "perplexity", "loss", "spectral_gap"} <= names
    assert {f"layers/effective_rank_{i:02d}" for i in range(4)} <= names


def test_headline_rank_is_the_mean_over_blocks(nano, probe):
    measured = Probe(probe.windows[:4]).measure(nano.model)
    layers = [v for k, v in measured.metrics().items() if k.startswith("layers/")]
    assert measured.effective_rank == pytest.approx(sum(layers) / 4)


def test_standard_error_above_the_bootstraps_size_is_linearised(nano, corpus, monkeypatch):
    probe = Probe.of(corpus, nano, 8192, 64)
    bootstrap = probe.measure(nano.model, named_generator(0, "bootstrap")).rank_standard_error
    monkeypatch.setattr("healing.measurements.probe.BOOTSTRAP_MAX_DIMENSION", 16)
    linear = probe.measure(nano.model, named_generator(0, "bootstrap"))
    # 100 resamples of 16 windows: the bootstrap's own error is 7 %, and it is not linear.
    assert linear.rank_standard_error == pytest.approx(bootstrap, rel=0.3)
    assert linear.effective_rank == pytest.approx(
        probe.measure(nano.model).effective_rank, rel=1e-9
    )


@pytest.mark.parametrize(("share", "passes"), [(1e6, 1), (1e-6, 2)])
def test_states_are_looked_at_twice_and_made_twice_only_where_they_are_large(
    nano, probe, monkeypatch, share, passes
):
    monkeypatch.setattr("healing.measurements.probe.BOOTSTRAP_MAX_DIMENSION", 16)
    monkeypatch.setattr("healing.measurements.probe.TOKENS_PER_FORWARD", 256)
    expected = probe.measure(nano.model, named_generator(0, "bootstrap"))
    plain_head(nano.model)
    seen = []
    transformer_blocks(nano.model)[0].register_forward_pre_hook(lambda *_: seen.append(1))
    monkeypatch.setattr("healing.measurements.probe.KEPT_SHARE", share)
    found = probe.measure(nano.model, named_generator(0, "bootstrap"))
    assert len(seen) == 4 * passes
    assert found.rank_standard_error == expected.rank_standard_error  # to the last bit
    assert found.effective_rank == expected.effective_rank


def test_states_are_kept_up_to_a_multiple_of_the_weights(nano, probe, monkeypatch):
    """16 windows of 64 tokens, 48 wide, out of 4 blocks."""
    monkeypatch.setattr("healing.measurements.probe.BOOTSTRAP_MAX_DIMENSION", 16)
    states = [torch.zeros(2, 64, 48)] * 4
    ratio = 16 * 64 * 48 * 4 / nano.n_params
    for share, expected in ((1.01 * ratio, True), (0.99 * ratio, False)):
        monkeypatch.setattr("healing.measurements.probe.KEPT_SHARE", share)
        assert probe._may_keep(nano.model, states) is expected
    monkeypatch.setattr("healing.measurements.probe.BOOTSTRAP_MAX_DIMENSION", 48)
    assert not probe._may_keep(nano.model, states)  # needed once


def test_states_whose_early_median_misleads_are_measured_in_a_second_pass(nano, probe, monkeypatch):
    """The first windows of far larger norm: as if the rows had come together."""

    def scaled(module, _args, output):
        scale[0] += 1
        return output * (100.0 if scale[0] % 8 == 1 else 1.0)

    plain_head(nano.model)  # tried once per model, with forward passes of its own
    scale = [0]
    monkeypatch.setattr("healing.measurements.probe.TOKENS_PER_FORWARD", 128)
    handle = transformer_blocks(nano.model)[3].register_forward_hook(scaled)
    measured = probe.measure(nano.model)
    handle.remove()
    # 16 windows of 64 tokens in 8 chunks, the first 100 x as large; the pass was made twice.
    assert scale[0] == 16
    assert measured.spectra[3].rows == 14 * 63
    assert measured.spectra[3].dropped_share == pytest.approx(1 / 8)
    assert measured.spectra[0].dropped_share < 1 / 8


def test_the_panel_is_of_the_same_spectra(nano, probe):
    measured = Probe(probe.windows[:6], extra=("accuracy",)).measure(nano.model)
    ranks = [s.effective_rank for s in measured.spectra]
    panel, metrics = measured.panel(), measured.metrics()
    assert (panel["last_block"], panel["min_block"]) == (ranks[-1], min(ranks))
    for name in ("participation_ratio", "stable_rank", "effective_rank_energy"):
        assert panel[name] == metrics[name]
    assert panel["accuracy_top1"] == metrics["extra/accuracy_top1"]
    assert set(panel) == set(PANEL)
