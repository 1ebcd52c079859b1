"""ρ from inputs and output gradients against ρ from dense weight gradients, by kind of model."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from healing.attacks import gram_alignment
from healing.attacks.alignment import (
    AlignmentBaselines,
    gradients_of,
    random_sequences,
    sequence_alignment,
    sequence_alignments,
)
from healing.attacks.catalyst_search import search_catalyst, token_gradient
from healing.attacks.gram_alignment import (
    BATCH_BYTES,
    alignments,
    gram_layers,
    linear_layers,
    sequences_per_batch,
)
from healing.curvature.hessian import LeadingSubspace, twice_differentiable_attention
from healing.curvature.subspaces import (
    HessianSubspace,
    MatrixSubspace,
    SingularSubspace,
    product_energy,
)
from healing.models.blocks import block_matrices, next_token_loss
from healing.randomness import named_generator

WORDS = {"vocab_size": 210, "bos_token_id": 0, "eos_token_id": 0}
SHAPE = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 2, "max_position_embeddings": 64}  # fmt: skip
GRAM = {
    "gpt2 (Conv1D)": transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, **WORDS),
    "neox": transformers.GPTNeoXConfig(**SHAPE, **WORDS),
    "llama": transformers.LlamaConfig(num_key_value_heads=1, **SHAPE, **WORDS),
    "opt (rows of tokens)": transformers.OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=16, **WORDS,
    ),
    "falcon (a subclass of nn.Linear)": transformers.FalconConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, **WORDS
    ),
}  # fmt: skip
DENSE = {
    "mamba (a matrix of no layer)": transformers.MambaConfig(
        hidden_size=16, state_size=4, num_hidden_layers=2, **WORDS
    ),
    "mixtral (a router's matrix)": transformers.MixtralConfig(
        num_key_value_heads=1, num_local_experts=2, **SHAPE, **WORDS
    ),
}


def model_of(config: transformers.PreTrainedConfig) -> transformers.PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
    model.config.use_cache = False
    return model


def sequences(count: int = 5, length: int = 9) -> torch.Tensor:
    return random_sequences(count, length, 210, named_generator(0, "sequences"))


def subspace_of(model: nn.Module) -> SingularSubspace:
    return SingularSubspace.of(block_matrices(model), 0.8)


def one_by_one(model, subspace, rows) -> list[float]:
    return [sequence_alignment(model, subspace, row) for row in rows]


def loss_in_float64(logits, labels, vocab_size, **_options):
    """transformers' own takes logits in float32."""
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", GRAM)
@pytest.mark.parametrize("length", [4, 30])  # Gram matrices, and products where they are smaller
def test_the_batch_equals_dense_gradients_one_by_one(kind, length):
    model = model_of(GRAM[kind])
    subspace, rows = subspace_of(model), sequences(length=length)
    found = alignments(model, subspace, rows)
    assert found == pytest.approx(one_by_one(model, subspace, rows), rel=1e-5)
    assert len({round(rho, 4) for rho in found}) == 5  # each sequence has its own


@pytest.mark.parametrize("kind", ["gpt2 (Conv1D)", "llama"])
@pytest.mark.parametrize("length", [4, 30])
def test_in_float64_they_agree_to_ten_digits(kind, length):
    model = model_of(GRAM[kind]).double()
    model.loss_function = loss_in_float64
    subspace, rows = subspace_of(model), sequences(length=length)
    with twice_differentiable_attention(model):
        found = alignments(model, subspace, rows)
        assert found == pytest.approx(one_by_one(model, subspace, rows), rel=1e-10)


@pytest.mark.parametrize("kind", DENSE)
def test_models_with_other_matrices_take_the_dense_way(kind):
    model = model_of(DENSE[kind])
    assert gram_layers(model) is None
    subspace, rows = subspace_of(model), sequences(2)
    assert alignments(model, subspace, rows) is None
    assert sequence_alignments(model, subspace, rows) == one_by_one(model, subspace, rows)


def test_a_layer_used_twice_takes_the_dense_way():
    model = model_of(GRAM["llama"])
    first, second = model.model.layers
    first.mlp.gate_proj = first.mlp.up_proj = nn.Linear(16, 24, bias=False)
    assert linear_layers(model) is not None  # one owner, two calls
    assert gram_layers(model) is None
    tied = model_of(GRAM["llama"])
    first, second = tied.model.layers
    second.mlp.up_proj.weight = first.mlp.up_proj.weight
    assert linear_layers(tied) is None  # two owners
    rows = sequences(2)
    for other in (model, tied):
        subspace = subspace_of(other)
        assert sequence_alignments(other, subspace, rows) == one_by_one(other, subspace, rows)


def test_a_use_that_no_hook_sees_is_found_by_trying():
    model = model_of(GRAM["llama"])
    mlp = model.model.layers[0].mlp
    plain = mlp.forward
    mlp.forward = lambda x: plain(x) + x @ mlp.gate_proj.weight.T @ mlp.down_proj.weight.T
    assert linear_layers(model) is not None
    assert gram_layers(model) is None


def test_an_output_scaled_in_place_is_found_by_trying():
    model = model_of(GRAM["llama"])
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: mlp.down_proj(torch.tanh(mlp.up_proj(x)) * mlp.gate_proj(x)).mul_(3.0)
    assert gram_layers(model) is None


def test_the_hessian_subspace_takes_the_dense_way(tiny, monkeypatch):
    shapes = {name: p.shape for name, p in block_matrices(tiny.model).items()}
    n = sum(shape.numel() for shape in shapes.values())
    basis = LeadingSubspace(torch.randn(n, 2, generator=named_generator(0, "basis")))
    subspace, rows = HessianSubspace(shapes, basis), sequences(2)
    monkeypatch.setattr(gram_alignment, "alignments", None)  # calling it would raise
    assert sequence_alignments(tiny.model, subspace, rows) == one_by_one(tiny.model, subspace, rows)


def test_batches_follow_from_shapes_alone(monkeypatch):
    model = model_of(GRAM["llama"])
    # Per token twice in + out of q, k, v, o and three of the MLP in two blocks, and 3 rows of 210.
    numbers = 2 * 2 * (32 + 24 + 24 + 32 + 3 * 40) + 3 * 210
    most = BATCH_BYTES // 4 // (9 * numbers)
    assert sequences_per_batch(model, 9, most) == most
    assert sequences_per_batch(model, 9, 2 * most + 1) == -(-(2 * most + 1) // 3)
    subspace, rows = subspace_of(model), sequences()
    together = alignments(model, subspace, rows)
    batches = []
    model.register_forward_pre_hook(
        lambda _module, _args, given: batches.append(len(given["input_ids"])), with_kwargs=True
    )
    monkeypatch.setattr(gram_alignment, "BATCH_BYTES", 4 * 4 * 9 * numbers)
    assert alignments(model, subspace, rows) == pytest.approx(together, rel=1e-6)
    assert batches == [3, 2]
    # A model whose matrices take more than that has batches as large as they are.
    monkeypatch.setattr(gram_alignment, "BATCH_BYTES", 0)
    matrices = 2 * (2 * 256 + 2 * 128 + 3 * 384)
    assert sequences_per_batch(model, 1, 100) == max(1, 2 * matrices // numbers) < 100


def test_modes_hooks_and_gradients_are_left_as_they_were(tiny):
    subspace = subspace_of(tiny.model)
    tiny.model.train()
    sequence_alignments(tiny.model, subspace, sequences(2))
    assert tiny.model.training
    tiny.model.eval()
    assert all(not layer._forward_hooks for layer in gram_layers(tiny.model).values())
    assert all(p.grad is None and p.requires_grad for p in tiny.model.parameters())


@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize("tokens", [3, 40])
def test_energies_of_a_product_against_the_product(shape, tokens):
    def draw(*size):
        return torch.randn(*size, generator=named_generator(0, str(size)), dtype=torch.float64)

    space = MatrixSubspace.of(draw(*shape), 0.8)
    rows, columns = draw(2, tokens, shape[0]), draw(2, tokens, shape[1])
    inside, total = space.energies_of_product(rows, columns)
    for i in range(2):
        gradient = rows[i].T @ columns[i]
        assert float(inside[i]) == pytest.approx(float(space.project(gradient).square().sum()))
        assert float(total[i]) == pytest.approx(float(gradient.square().sum()), rel=1e-12)


def test_small_factors_make_the_smaller_matrix(monkeypatch):
    """Three tokens: 3×3 matrices; a hundred: the product itself."""
    sizes = []
    plain = torch.Tensor.double
    monkeypatch.setattr(
        torch.Tensor, "double", lambda self: (sizes.append(self.shape), plain(self))[1]
    )
    product_energy(torch.ones(3, 12), torch.ones(3, 7))
    product_energy(torch.ones(100, 12), torch.ones(100, 7))
    assert sizes == [(3, 3), (3, 3), (12, 7)]


@pytest.mark.parametrize("kind", ["gpt2 (Conv1D)", "llama"])
def test_the_derivative_for_swaps_equals_the_one_through_dense_gradients(kind, monkeypatch):
    model, tokens = model_of(GRAM[kind]), sequences(1)[0]
    subspace = subspace_of(model)
    found = token_gradient(model, subspace, tokens)
    monkeypatch.setattr("healing.attacks.catalyst_search.differentiable_alignment", lambda *_: None)
    expected = token_gradient(model, subspace, tokens)
    torch.testing.assert_close(found.float(), expected, rtol=1e-3, atol=1e-5 * expected.abs().max())


def test_a_search_chooses_the_rounds_best_and_the_first_of_equals(tiny, monkeypatch):
    subspace = subspace_of(tiny.model)
    given = iter([[0.5, 0.1, 0.2, 0.3], [0.4, 0.7, 0.6, 0.7], [math.nan, 0.7, 0.1, 0.2]])
    proposed = []

    def answers(_model, _subspace, rows):
        proposed.append(rows)
        return next(given)

    monkeypatch.setattr("healing.attacks.catalyst_search.sequence_alignments", answers)
    found = search_catalyst(
        tiny.model, subspace, sequences(3), length=9, steps=2, candidates=4,
        generator=named_generator(0, "search"),
    )  # fmt: skip
    assert found.history == (0.5, 0.7, 0.7)
    assert found.random_alignments == (0.1, 0.2, 0.3)
    assert torch.equal(found.tokens, proposed[1][1])


def test_the_derivative_is_taken_anew_where_the_sequence_has_changed_alone(tiny, monkeypatch):
    """Rounds two and four bring nothing better."""
    subspace = subspace_of(tiny.model)
    given = iter([[0.5, 0.1, 0.2, 0.3], [0.6], [0.2], [0.7], [0.7], [0.1]])
    taken, proposed = [], []

    def derivative(_model, _subspace, tokens):
        taken.append(tokens)
        return token_gradient(_model, _subspace, tokens)

    def answers(_model, _subspace, rows):
        proposed.append(rows)
        return next(given)

    monkeypatch.setattr("healing.attacks.catalyst_search.token_gradient", derivative)
    monkeypatch.setattr("healing.attacks.catalyst_search.sequence_alignments", answers)
    search_catalyst(
        tiny.model, subspace, sequences(3), length=9, steps=5, candidates=1,
        generator=named_generator(0, "search"),
    )  # fmt: skip
    expected = [proposed[0][0], proposed[1][0], proposed[3][0]]
    assert len(taken) == 3
    assert all(map(torch.equal, taken, expected))


def test_baselines_are_those_of_dense_gradients(tiny):
    subspace, rows = subspace_of(tiny.model), sequences(6)
    baselines = AlignmentBaselines(subspace, rows, sequences(1, 9)[0])
    numbers = baselines.metrics(tiny.model)
    dense = one_by_one(tiny.model, subspace, rows[:4])
    assert numbers["alignment_random_tokens"] == pytest.approx(sum(dense) / 4, rel=1e-5)
    clean = subspace.alignment(gradients_of(tiny.model, next_token_loss(tiny.model, rows[:1])))
    assert numbers["alignment_clean_text"] == pytest.approx(float(clean), rel=1e-5)
    assert set(numbers) == {
        "alignment_random_tokens", "alignment_clean_text", "alignment_isotropic"
    }  # fmt: skip
    nothing = {name: torch.zeros_like(p) for name, p in block_matrices(tiny.model).items()}
    assert baselines.of_change(nothing) == {}
