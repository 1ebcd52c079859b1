"""Chunked losses against transformers' own, with plain logits and with capped ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from healing.measurements.probe import Probe
from healing.models import token_loss
from healing.models.blocks import next_token_loss
from healing.models.token_loss import plain_head, token_losses, training_loss
from healing.randomness import named_generator
from healing.training.precision import Precision

SHAPE = {
    "vocab_size": 331,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}


def random_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
        "gpt2": lambda: GPT2LMHeadModel(
            GPT2Config(
                vocab_size=331, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
            )
        ),
        # The output matrix has a bias.
        "phi": lambda: PhiForCausalLM(PhiConfig(**SHAPE, bos_token_id=0, eos_token_id=0)),
        # Logits are capped: 30·tanh(x/30).
        "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8)),
    }[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return model


@pytest.fixture
def windows(small_chunks) -> torch.Tensor:
    # 3·40 tokens in chunks of 50: neither a multiple of the other.
    return torch.randint(331, (3, 41), generator=named_generator(0, "ids"))


@pytest.fixture
def small_chunks(monkeypatch):
    options = nn.LinearCrossEntropyOptions(batch_chunk_size=50, chunking_method=None)
    monkeypatch.setattr(token_loss, "_OPTIONS", options)
    monkeypatch.setattr(token_loss, "CHUNK_TOKENS", 50)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2"])
def test_losses_are_those_of_the_models_own_logits(name, windows):
    model = random_model(name)
    with torch.no_grad():
        logits = model(input_ids=windows).logits.double()
    scores = torch.log_softmax(logits[:, :-1], -1)
    expected = -scores.gather(-1, windows[:, 1:, None]).flatten()
    found = token_losses(model, windows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert (plain_head(model) is None) == (name == "gemma2")


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi", "gemma2"])
def test_gradients_are_those_of_the_models_own_loss(name, windows):
    """Tied embeddings (gpt2) gather the gradient of both uses."""
    model = random_model(name)
    own = torch.autograd.grad(next_token_loss(model, windows), list(model.parameters()))
    loss = training_loss(model, windows)
    loss.backward()
    torch.testing.assert_close(loss, next_token_loss(model, windows), rtol=1e-6, atol=0.0)
    for parameter, expected in zip(model.parameters(), own, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)


def test_a_soft_cap_is_seen_however_small_the_logits_are(windows):
    model = random_model("gemma2")
    with torch.no_grad():
        model.get_output_embeddings().weight *= 1e-4
    assert plain_head(model) is None


def test_a_model_is_tried_once(windows):
    model, calls = random_model("llama"), []
    model.base_model.register_forward_hook(lambda *_: calls.append(1))
    token_losses(model, windows)
    token_losses(model, windows)
    assert len(calls) == 2 + 2  # twice in the trial, once in each call


def test_frozen_output_matrix(windows):
    """As under adapters: only what is trained has a gradient."""
    model = random_model("llama")
    model.get_output_embeddings().weight.requires_grad_(False)
    training_loss(model, windows).backward()
    assert model.get_output_embeddings().weight.grad is None
    expected = torch.autograd.grad(
        next_token_loss(model, windows), [model.model.layers[0].mlp.up_proj.weight]
    )
    found = model.model.layers[0].mlp.up_proj.weight.grad
    torch.testing.assert_close(found, expected[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("number_format", ["bf16", "fp16"])
def test_autocast_rounds_the_logits_and_neither_loss_nor_gradients(name, number_format, windows):
    """transformers' own loss makes the logits in the low format and all after them in float32."""
    model, precision = random_model(name), Precision(number_format)
    exact = float(next_token_loss(model, windows).detach())

    def run(loss):
        model.zero_grad()
        with precision.forward(windows.device):
            value = loss(model, windows)
        (value * 2.0**10).backward()  # as a gradient scaler does
        return value.detach(), [p.grad / 2.0**10 for p in model.parameters()]

    found, gradients = run(training_loss)
    own, expected = run(next_token_loss)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, own, rtol=1e-6, atol=0.0)
    assert float(found) != exact
    digits = {"bf16": 2.0**-7, "fp16": 2.0**-10}[number_format]
    for mine, theirs in zip(gradients, expected, strict=True):
        assert mine.dtype == torch.float32
        assert float((mine - theirs).norm()) <= digits * float(theirs.norm())


def test_pure_low_formats_take_the_models_own_loss(windows):
    model = random_model("llama").to(torch.bfloat16)
    assert torch.equal(training_loss(model, windows), next_token_loss(model, windows))


def largest_allocation(action) -> int:
    """Bytes of the largest tensor that anything inside allocates, fused operations included."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        action()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_tensor_of_batch_tokens_vocabulary_in_probe_or_step(nano, probe):
    """nano's vocabulary is 2,048: the logits of 1,024 probe tokens are 8.4 MB, a chunk's 4.2."""
    plain_head(nano.model)
    chunk = 4 * token_loss.CHUNK_TOKENS * 2048
    assert largest_allocation(lambda: probe.measure(nano.model)) <= chunk
    step = training_loss(nano.model, probe.windows)
    assert largest_allocation(step.backward) <= chunk
    assert largest_allocation(lambda: training_loss(nano.model, probe.windows)) <= chunk
    with Precision("bf16").forward(probe.windows.device):
        step = training_loss(nano.model, probe.windows)
        assert largest_allocation(lambda: training_loss(nano.model, probe.windows)) <= chunk
    assert largest_allocation(step.backward) <= chunk
    # The check can fail: transformers' own loss holds them all.
    assert largest_allocation(lambda: next_token_loss(nano.model, probe.windows)) > 1.9 * chunk


def test_a_loss_that_is_not_finite_stays_so(nano, probe):
    with torch.no_grad():
        nano.model.get_output_embeddings().weight[5] = math.nan
    assert math.isnan(training_loss(nano.model, probe.windows[:2]).item())
    assert Probe(probe.windows[:2]).measure(nano.model).nonfinite_tokens == 126
