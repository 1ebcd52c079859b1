"""Measurements that compare states, against other formulas and another library."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, kl_divergence

from healing.config.heal import HealConfig
from healing.config.shared import BaseConfig
from healing.curvature.flat_weights import put_weights, weights_of
from healing.errors import ConfigError
from healing.measurements import extra_metrics
from healing.measurements.probe import Probe
from healing.models.blocks import block_outputs
from healing.randomness import named_generator
from healing.training.methods.lora import adapted

ALL = ("cka", "agreement", "weight_distance")


def noise(model: nn.Module, scale: float, seed: int = 0) -> None:
    """Add Gaussian noise to all weights, in place."""
    generator = named_generator(seed, "noise")
    before = weights_of(model)
    put_weights(model, before + scale * torch.randn(len(before), generator=generator))


class Toy(nn.Module):
    """Two blocks and logits; the blocks' outputs are looked up by token, so that they can be set.

    Its hidden size of 6 is more than its three tokens per window, and no row is like another.
    """

    class Block(nn.Module):
        def __init__(self, table: torch.Tensor) -> None:
            super().__init__()
            self.table = nn.Parameter(table)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.table[ids]

    def __init__(self, tokens: int = 64, hidden: int = 6, seed: int = 0) -> None:
        super().__init__()
        draws = named_generator(seed, "toy")
        tables = [torch.randn(tokens, hidden, generator=draws) for _ in range(2)]
        self.blocks = nn.ModuleList([self.Block(t) for t in tables])
        self.head = nn.Parameter(torch.randn(hidden, tokens, generator=draws))

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        last = [block(input_ids) for block in self.blocks][-1]
        return SimpleNamespace(logits=last @ self.head)


def toy_windows(count: int = 40, length: int = 5) -> torch.Tensor:
    return torch.randint(64, (count, length), generator=named_generator(5, "windows"))


def hsic_cka(x: np.ndarray, y: np.ndarray) -> float:
    """tr(KHLH)/√(tr(KHKH)·tr(LHLH)) of the rows' Gram matrices, K = XXᵀ, L = YYᵀ."""
    n = len(x)
    h = np.eye(n) - 1 / n
    a, b = h @ (x @ x.T) @ h, h @ (y @ y.T) @ h
    return float(np.trace(a @ b) / np.sqrt(np.trace(a @ a) * np.trace(b @ b)))


def states(model: nn.Module, windows: torch.Tensor) -> list[np.ndarray]:
    """Rows of every block but those of first tokens, (rows, hidden)."""
    with torch.no_grad(), block_outputs(model) as outputs:
        model(input_ids=windows)
        return [h[:, 1:].flatten(0, 1).double().numpy() for h in outputs]


def test_cka_of_nano_is_that_of_centred_gram_matrices(nano, corpus):
    windows = corpus.windows("probe", nano.tokenizer, 32, 512)
    before = states(nano.model, windows)
    probe = Probe(windows, extra=("cka",)).remembering("healthy", nano.model)
    noise(nano.model, 0.05)
    found = probe.measure(nano.model).extra
    expected = [hsic_cka(x, y) for x, y in zip(before, states(nano.model, windows), strict=True)]
    values = [found[f"extra/cka_block_{index:02d}"] for index in range(4)]
    assert values == pytest.approx(expected, rel=1e-5)
    assert found["extra/cka_mean"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert 0.05 < min(values) < max(values) < 0.99


def test_cka_leaves_out_the_rows_that_are_outliers_of_either_state():
    model, windows = Toy(), toy_windows()
    for token, block in ((7, 0), (9, 1)):
        model.blocks[block].table.data[token] *= 1e3  # healthy outliers
    before = states(model, windows)
    probe = Probe(windows, extra=("cka",)).remembering("healthy", model)
    noise(model, 0.3)
    model.blocks[0].table.data[11] *= 1e3  # and one of now
    rows = windows[:, 1:].flatten().numpy()
    after = states(model, windows)
    found = probe.measure(model).extra
    for block, out in ((0, (7, 11)), (1, (9,))):
        kept = ~np.isin(rows, out)
        expected = hsic_cka(before[block][kept], after[block][kept])
        assert found[f"extra/cka_block_{block:02d}"] == pytest.approx(expected, rel=1e-6)


def test_cka_sees_neither_rotation_nor_scale_and_of_strangers_its_floor():
    model, windows = Toy(), toy_windows(200)
    probe = Probe(windows, extra=("cka",)).remembering("healthy", model)
    turned, _ = torch.linalg.qr(torch.randn(6, 6, generator=named_generator(1, "q")))
    with torch.no_grad():
        model.blocks[0].table.copy_(3.0 * model.blocks[0].table @ turned + 5.0)
        model.blocks[1].table.zero_().add_(1.0)
    found = probe.measure(model).extra
    assert found["extra/cka_block_00"] == pytest.approx(1.0, abs=1e-5)
    assert math.isnan(found["extra/cka_block_01"])  # a state that does not vary
    assert math.isnan(found["extra/cka_mean"])
    # A table of 64 independent rows has 64 samples, however many tokens are read.
    stranger = probe.measure(Toy(seed=9)).extra
    spectra = [
        m.spectra for m in (Probe(windows).measure(Toy()), Probe(windows).measure(Toy(seed=9)))
    ]
    floor = math.sqrt(math.prod(s[0].participation_ratio for s in spectra)) / 64
    assert stranger["extra/cka_block_00"] == pytest.approx(floor, rel=0.5)


def test_cka_of_a_state_that_cannot_be_computed_is_nan(nano, corpus):
    windows = corpus.windows("probe", nano.tokenizer, 32, 512)
    probe = Probe(windows, extra=ALL).remembering("healthy", nano.model)
    with torch.no_grad():
        nano.model.gpt_neox.layers[2].mlp.dense_4h_to_h.bias[0] = math.nan
    found = probe.measure(nano.model).extra
    nans = [math.isnan(found[f"extra/cka_block_{index:02d}"]) for index in range(4)]
    assert nans == [False, False, True, True]
    assert math.isnan(found["extra/agreement_kl"])
    assert found["extra/agreement_top1"] == 0.0
    assert math.isnan(found["extra/weight_distance_healthy"])


@pytest.mark.parametrize("kind", ["head", "logits"])
def test_agreement_is_that_of_torch_distributions(kind, nano, corpus):
    """Of a model whose logits are its head times its states, and of one about which nothing is
    known.
    """
    if kind == "head":
        model, windows = nano.model, corpus.windows("probe", nano.tokenizer, 48, 1500)
    else:
        model, windows = Toy(), toy_windows()

    def distributions() -> Categorical:
        with torch.no_grad():
            return Categorical(logits=model(input_ids=windows).logits[:, :-1].double())

    healthy = distributions()
    probe = Probe(windows, extra=("agreement",)).remembering("healthy", model)
    noise(model, 0.03 if kind == "head" else 0.3)
    now = distributions()
    found = probe.measure(model).extra
    expected = float(kl_divergence(healthy, now).mean())
    assert found["extra/agreement_kl"] == pytest.approx(expected, rel=1e-4)
    assert abs(float(kl_divergence(now, healthy).mean()) / expected - 1) > 0.01  # not the other way
    same = (healthy.probs.argmax(-1) == now.probs.argmax(-1)).double().mean()
    assert found["extra/agreement_top1"] == pytest.approx(100 * float(same))
    assert 5 < found["extra/agreement_top1"] < 95


def test_weight_distance_is_that_of_all_weights(nano, corpus):
    windows = corpus.windows("probe", nano.tokenizer, 32, 64)
    healthy = weights_of(nano.model).double().numpy()
    probe = Probe(windows, extra=("weight_distance",)).remembering("healthy", nano.model)
    noise(nano.model, 0.1)
    assert set(probe.measure(nano.model).extra) == {"extra/weight_distance_healthy"}
    collapsed = weights_of(nano.model).double().numpy()
    probe = probe.remembering("collapsed", nano.model)
    noise(nano.model, 0.1, seed=1)
    now = weights_of(nano.model).double().numpy()
    found = probe.measure(nano.model).extra
    for name, reference in (("healthy", healthy), ("collapsed", collapsed)):
        expected = np.linalg.norm(now - reference) / np.linalg.norm(reference)
        assert found[f"extra/weight_distance_{name}"] == pytest.approx(expected, rel=1e-9)


def test_adapters_count_as_what_they_add(nano, corpus):
    pytest.importorskip("peft")
    windows = corpus.windows("probe", nano.tokenizer, 32, 64)
    probe = Probe(windows, extra=ALL).remembering("healthy", nano.model)
    config = HealConfig(model="nano", healing_method="lora", lora_rank=2)
    with adapted(nano.model, config, named_generator(0, "lora")):
        for name, parameter in nano.model.named_parameters():
            if "lora_" in name:
                nn.init.normal_(parameter, std=0.3, generator=named_generator(0, name))
        inside = probe.measure(nano.model).extra
    merged = probe.measure(nano.model).extra
    assert inside["extra/weight_distance_healthy"] > 0.05
    assert inside == pytest.approx(merged, rel=1e-3)


def test_the_state_itself_is_at_no_distance(nano, probe):
    compared = Probe(probe.windows, extra=ALL).remembering("healthy", nano.model)
    found = compared.measure(nano.model)
    assert found.extra["extra/cka_mean"] == pytest.approx(1.0, abs=1e-6)
    assert found.extra["extra/agreement_top1"] == 100.0
    assert found.extra["extra/agreement_kl"] == 0.0
    assert found.extra["extra/weight_distance_healthy"] == 0.0
    plain = probe.measure(nano.model).metrics()
    assert {k: v for k, v in found.metrics().items() if not k.startswith("extra/")} == plain


def test_a_probe_that_remembers_nothing_is_the_same(nano, probe):
    assert probe.remembering("healthy", nano.model) is probe
    plain = Probe(probe.windows, extra=("accuracy",))
    assert plain.remembering("healthy", nano.model) is plain
    # To the collapsed state only the weights are compared.
    compared = Probe(probe.windows, extra=ALL).remembering("collapsed", nano.model)
    assert set(compared.remembered) == {"weight_distance"}


def test_comparing_with_nothing_is_refused(nano, probe):
    with pytest.raises(ConfigError, match="'cka' compares with the healthy state, and there is"):
        Probe(probe.windows, extra=("cka",)).measure(nano.model)


def test_states_that_would_take_too_much_room_are_refused(nano, probe, monkeypatch):
    monkeypatch.setattr(extra_metrics, "ROOM_BYTES", 2**10)
    monkeypatch.setattr(extra_metrics, "ROOM_SHARE", 0.01)
    for name in ALL:
        with pytest.raises(ConfigError, match=f"'{name}' would keep 0.0 GiB of a state.* lower"):
            Probe(probe.windows, extra=(name,)).remembering("healthy", nano.model)


def test_plug_ins_can_compare_too_and_faulty_ones_are_named(nano, probe, plug_ins):
    text = '''
        """Tokens of the probe then and now."""
        NEEDS = ("healthy",)
        def remember(model, windows):
            return windows.numel()
        def measure(state):
            return {"ratio": state.windows.numel() / state.remembered["healthy"]}
    '''
    plug_ins("tokens", text, "llm_healing.measurements")
    compared = Probe(probe.windows, extra=("tokens",)).remembering("healthy", nano.model)
    assert compared.measure(nano.model).extra == {"extra/tokens_ratio": 1.0}
    plug_ins("forgetful", '"""X."""\nNEEDS = ("healthy",)\ndef measure(state):\n    return {}\n',
             "llm_healing.measurements")  # fmt: skip
    with pytest.raises(ConfigError, match="'forgetful' names NEEDS and has no remember"):
        Probe(probe.windows, extra=("forgetful",)).remembering("healthy", nano.model)
    plug_ins("astray", '"""X."""\nNEEDS = ("dead",)\ndef measure(state):\n    return {}\n',
             "llm_healing.measurements")  # fmt: skip
    with pytest.raises(ConfigError, match=r"'astray' of .*: NEEDS is \('dead',\), not a tuple of"):
        BaseConfig(model="nano", measurements="astray")
