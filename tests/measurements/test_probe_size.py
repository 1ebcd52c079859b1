"""The benchmark of the probe's size: bias by leaving each window out of the probe itself."""

from __future__ import annotations

import pathlib
from dataclasses import replace

import pytest
import torch

from healing.config.attack import AttackConfig
from healing.measurements.probe import Probe
from healing.stages.cells.inputs import resolve_from_model


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """`benchmarks` is no installed package: it is imported from the checkout."""
    monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2])


def test_the_jackknife_is_that_of_probes_without_one_window(nano, corpus):
    from benchmarks.probe_size import jackknife_bias, window_moments

    windows = corpus.windows("probe", nano.tokenizer, 64, 768)
    whole = Probe(windows).measure(nano.model).effective_rank
    count = len(windows)
    without = [
        Probe(torch.cat([windows[:i], windows[i + 1 :]])).measure(nano.model).effective_rank
        for i in range(count)
    ]
    expected = (count - 1) * (sum(without) / count - whole)
    found = jackknife_bias(window_moments(nano.model, windows))
    assert found == pytest.approx(expected, rel=1e-6)
    assert found < -0.1  # an estimated entropy is too low


def test_a_jackknife_needs_two_windows(nano, corpus):
    from benchmarks.probe_size import jackknife_bias, window_moments

    windows = corpus.windows("probe", nano.tokenizer, 64, 64)
    with pytest.raises(ValueError, match="at least two windows, got 1"):
        jackknife_bias(window_moments(nano.model, windows))


def test_sizes_go_on_until_the_text_ends(capsys):
    from benchmarks.probe_size import header, line, readings

    config = resolve_from_model(AttackConfig(model="nano", sequence_length=64))
    found = dict(readings(config, (256, 512, 10**9, 1024), ()))
    assert list(found) == [256, 512]
    assert "1,000,000,000 tokens: " in capsys.readouterr().out
    assert found[256][0].bias < found[512][0].bias < 0.0
    assert found[256][0].error > found[512][0].error
    states = [replace(found[512][0], rank=rank) for rank in (40.0, 20.0, 35.0)]
    row = line(512, states)
    assert "| 75.0 | 20.00 |" in row
    assert row.count("|") == header(["healthy", "collapsed", "healed"]).splitlines()[0].count("|")
