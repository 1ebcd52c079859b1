"""Normalisation layers set to their neutral values, on several architectures."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.errors import ConfigError
from healing.randomness import named_generator
from healing.training.healing_loop import heal
from healing.training.norm_reset import norm_layers, reset_norms

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}  # fmt: skip


def others(model) -> dict[str, torch.Tensor]:
    norms = tuple(norm_layers(model))
    return {n: p.detach().clone() for n, p in model.named_parameters() if not n.startswith(norms)}


def test_nano_has_gains_of_one_and_biases_of_zero_and_nothing_else_changes(nano):
    before, identities = others(nano.model), [id(p) for p in nano.model.parameters()]
    assert float((nano.model.gpt_neox.final_layer_norm.weight.detach() - 1).abs().max()) > 0.01
    reset_norms(nano.model)
    layers = norm_layers(nano.model)
    assert len(layers) == 2 * 4 + 1  # two per block, one behind the last
    for layer in layers.values():
        assert bool((layer.weight == 1).all())
        assert bool((layer.bias == 0).all())
    after = others(nano.model)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [id(p) for p in nano.model.parameters()] == identities  # an optimiser may hold them


@pytest.mark.parametrize(
    ("config", "kind"),
    [(LlamaConfig(**SIZES), LlamaRMSNorm), (Gemma2Config(**SIZES), Gemma2RMSNorm)],
)
def test_a_reset_layer_only_normalises_however_its_gain_is_written(config, kind):
    """Gemma multiplies with 1 + weight: a weight of 1 would double everything."""
    model = AutoModelForCausalLM.from_config(config)
    layers = norm_layers(model)
    assert {type(layer) for layer in layers.values()} == {kind}
    for layer in layers.values():
        layer.weight.data.normal_(generator=named_generator(0, "gain"))
    reset_norms(model)
    x = torch.randn(5, 16, generator=named_generator(0, "x"))
    expected = x / x.square().mean(-1, keepdim=True).sqrt()
    for layer in layers.values():
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


class Bare(torch.nn.Module):
    pass


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ConfigError, match=r"--reset-norms: Bare has no normalisation layer"):
        reset_norms(Bare())


def test_a_layer_that_the_architecture_does_not_initialise_is_refused(nano, monkeypatch):
    monkeypatch.setattr(type(nano.model), "_init_weights", lambda self, module: None)
    with pytest.raises(ConfigError, match=r"does not say how .*norm.* \(LayerNorm\) begins"):
        reset_norms(nano.model)


def test_healing_starts_from_neutral_gains_and_reports_the_collapsed_state_as_it_came(
    nano, corpus, probe
):
    windows = corpus.windows("train", nano.tokenizer, 64)
    before = probe.measure(nano.model)
    # A rate so small that the weights stay: what is left is the reset.
    config = resolve_from_presets(
        HealConfig(model="nano", healing_steps=1, sequence_length=64, reset_norms=True,
                   healing_optimizer="sgd", healing_lr=1e-30)
    )  # fmt: skip
    records = list(heal(nano, config, windows, probe, before, named_generator(0, "sft")))
    assert records[0].measurement is before
    assert bool((nano.model.gpt_neox.final_layer_norm.weight == 1).all())
    assert records[1].measurement.loss > before.loss + 0.1  # the healthy gains were worth that


def test_no_steps_reset_nothing(nano, corpus, probe):
    windows = corpus.windows("train", nano.tokenizer, 64)
    gain = nano.model.gpt_neox.final_layer_norm.weight.detach().clone()
    config = resolve_from_presets(
        HealConfig(model="nano", healing_steps=0, sequence_length=64, reset_norms=True)
    )
    measured = probe.measure(nano.model)
    list(heal(nano, config, windows, probe, measured, named_generator(0, "sft")))
    assert torch.equal(nano.model.gpt_neox.final_layer_norm.weight, gain)
