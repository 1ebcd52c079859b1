"""Curvature in the attacks: Hessian subspace, amplification κ, oracle, warm-up, Rayleigh rank."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import scipy.linalg
import torch
from torch import nn
from transformers import GPTNeoXForCausalLM

from healing.attacks import clean_hessian as clean_hessian_module
from healing.attacks.alignment import gradients_of, sequence_loss
from healing.attacks.clean_hessian import clean_hessian, hessian_subspace, rayleigh_rank
from healing.attacks.context import prepare_arm, warmup_batches
from healing.attacks.loop import prime_first_moment, run_attack, warm_second_moment
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.resolve import resolve_from_presets
from healing.curvature.subspaces import SingularSubspace
from healing.errors import ConfigError
from healing.measurements.probe import Probe
from healing.models.blocks import block_matrices
from healing.models.loading import LoadedModel, load_model, state_digest
from healing.progress import without_safe_points
from healing.randomness import named_generator
from healing.training.optimizers import make_optimizer

SMALL = {"search_steps": 1, "search_candidates": 2, "baseline_draws": 3, "attack_steps": 2,
         "measurement_interval": 1, "sequence_length": 32, "batch_size": 2, "curvature_tokens": 64,
         "rayleigh_draws": 3, "target_rank_reduction": 1.0}  # fmt: skip


def settings(**changes) -> AttackConfig:
    return resolve_from_presets(AttackConfig(model="nano", **({**SMALL} | changes)))


def run(loaded, corpus, config):
    probe = Probe(corpus.windows("probe", loaded.tokenizer, 32)[:4])
    healthy, change = probe.measure(loaded.model), WeightChange(loaded.model)
    made = prepare_arm(config, loaded, corpus, change)
    warmup = warmup_batches(config, loaded, corpus)
    events = run_attack(loaded, made.arm, config, probe, healthy, change, warmup)
    records = without_safe_points(events)
    return list(records), change, made


@pytest.fixture
def small(tiny) -> LoadedModel:
    """One untrained block of hidden size 8: 768 matrix entries."""
    config = copy.deepcopy(tiny.model.config)
    config.hidden_size, config.intermediate_size, config.num_hidden_layers = 8, 32, 1
    model = GPTNeoXForCausalLM(config).eval()
    generator = named_generator(0, "small")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4, generator=generator)
    return LoadedModel("nano", model, tiny.tokenizer, "")


@pytest.fixture
def dense_hessian(small, corpus) -> torch.Tensor:
    """Hessian of the clean loss in small's block matrices, in float32, by a loop over its rows."""
    operator = clean_hessian(settings(), small, corpus)
    parameters = list(block_matrices(small.model).values())
    windows = corpus.windows("attack", small.tokenizer, 32, 64)
    small.model.set_attn_implementation("eager")
    logits = small.model(windows).logits[:, :-1]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    gradient = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)]
    )
    assert operator.shape == (len(gradient), len(gradient))
    blocks = []
    for rows in torch.eye(len(gradient)).split(256):
        parts = torch.autograd.grad(
            gradient, parameters, rows, retain_graph=True, is_grads_batched=True
        )
        blocks.append(torch.cat([part.flatten(1) for part in parts], dim=1))
    return torch.cat(blocks)


def test_hessian_subspace_against_the_dense_eigenvectors(small, corpus, dense_hessian):
    operator = clean_hessian(settings(), small, corpus)
    values, vectors = scipy.linalg.eigh(dense_hessian.double().numpy())
    k = 1 + max(range(5), key=lambda i: values[-1 - i] - values[-2 - i])  # where the gap is widest
    found = hessian_subspace(operator, small.model, k, named_generator(0, "start"))
    leading = torch.tensor(vectors[:, -k:].copy())
    largest = found.pairs.largest.values
    # Each Ritz value lies within its residual of an eigenvalue (Parlett 1998, theorem 4.5.1).
    errors = (largest - torch.tensor(values[-k:][::-1].copy())).abs()
    assert bool((errors <= found.pairs.largest.residuals + 1e-5 * values[-1]).all())
    assert found.metrics()["hessian_lambda_min"] == pytest.approx(values[0], abs=0.01 * values[-1])
    draw = torch.randn(len(values), generator=named_generator(1, "v"))
    shapes = {n: p.shape for n, p in block_matrices(small.model).items()}
    parts = draw.split([s.numel() for s in shapes.values()])
    gradients = {n: g.view(s) for (n, s), g in zip(shapes.items(), parts, strict=True)}
    inside = found.subspace.project(gradients)
    flat = torch.cat([inside[n].flatten() for n in shapes]).double()
    expected = draw.double() - leading @ (leading.T @ draw.double())
    # Davis & Kahan: the span turns by at most residual over gap.
    angle = float(found.pairs.largest.residuals.square().sum().sqrt()) / (
        values[-k] - values[-k - 1]
    )
    assert float((flat - expected).norm() / draw.norm()) < angle < 0.5
    share = float(found.subspace.alignment(gradients))
    assert share == pytest.approx(float(expected.square().sum() / draw.square().sum()), abs=1e-3)
    assert found.subspace.isotropic_alignment == 1 - k / len(values)


def test_rayleigh_rank_of_an_eigenvector_and_of_the_dense_quotients(small, corpus, dense_hessian):
    operator = clean_hessian(settings(), small, corpus)
    dense = dense_hessian.double()
    values, vectors = torch.linalg.eigh(dense)
    shapes = [p.shape for p in block_matrices(small.model).values()]
    names = list(block_matrices(small.model))

    def as_gradients(v: torch.Tensor) -> dict[str, torch.Tensor]:
        parts = v.float().split([s.numel() for s in shapes])
        return {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}

    top = rayleigh_rank(operator, as_gradients(vectors[:, -1]), 8, named_generator(0, "r"))
    assert top["rayleigh_quotient"] == pytest.approx(float(values[-1]), rel=1e-3)
    assert top["rayleigh_percentile"] == 100.0
    assert top["rayleigh_random_max"] < float(values[-1])
    low = rayleigh_rank(operator, as_gradients(vectors[:, 0]), 8, named_generator(0, "r"))
    assert low["rayleigh_percentile"] == 0.0
    # Random directions have the mean curvature tr(H)/n; eight of them scatter by a few percent.
    spread = math.sqrt(2.0) * float(dense.square().sum().sqrt()) / len(values)
    assert low["rayleigh_random_mean"] == pytest.approx(
        float(dense.trace()) / len(values), abs=4 * spread / math.sqrt(8)
    )


def test_the_hessian_is_taken_on_the_attack_split(small, corpus):
    operator = clean_hessian(settings(curvature_tokens=32, batch_size=1), small, corpus)
    windows = corpus.windows("attack", small.tokenizer, 32, 32)
    expected = gradients_of(small.model, sequence_loss(small.model, windows[0]))
    flat = torch.cat([g.flatten() for g in expected.values()])
    torch.testing.assert_close(operator.gradient(), flat, rtol=1e-5, atol=1e-8)


def test_a_lanczos_basis_that_does_not_fit_is_refused_before_it_is_made(small, corpus, monkeypatch):
    operator = clean_hessian(settings(), small, corpus)
    monkeypatch.setattr(clean_hessian_module, "LARGE", 1)
    free = SimpleNamespace(available=2 * 46 * 768 - 1)  # one byte less than 46 bfloat16 vectors
    monkeypatch.setattr(clean_hessian_module.psutil, "virtual_memory", lambda: free)
    with pytest.raises(ConfigError, match=r"46 Lanczos vectors.*--hessian-directions"):
        hessian_subspace(operator, small.model, 1, named_generator(0, "start"))
    free.available += 1
    assert hessian_subspace(operator, small.model, 1, named_generator(0, "start")).pairs.products


# --- amplification --------------------------------------------------------------------------


def test_kappa_is_one_for_a_scaled_gradient_and_the_ratio_of_scales_otherwise():
    draws = named_generator(0, "m")
    weight, gradient = (torch.randn(9, 7, generator=draws, dtype=torch.float64) for _ in range(2))
    subspace = SingularSubspace.of({"w": weight}, 0.8)
    same = subspace.amplification({"w": gradient}, {"w": -0.3 * gradient})
    assert same["kappa"] == pytest.approx(1.0)
    inside = subspace.project({"w": gradient})["w"]
    stretched = {"w": 5.0 * inside + 2.0 * (gradient - inside)}
    assert subspace.amplification({"w": gradient}, stretched)["kappa"] == pytest.approx(2.5)
    energy = float((5 * inside).square().sum())
    assert subspace.amplification({"w": gradient}, stretched)["update_alignment"] == (
        pytest.approx(energy / float(stretched["w"].square().sum()))
    )
    nothing = subspace.amplification({"w": gradient}, {"w": torch.zeros_like(gradient)})
    assert math.isnan(nothing["kappa"])
    assert math.isnan(nothing["update_alignment"])


def test_sgd_amplifies_nothing_and_adam_favours_the_small(corpus):
    kappa = {}
    for name in ("sgd", "adamw"):
        records, _, _ = run(load_model("nano"), corpus, settings(attack_optimizer=name))
        assert "kappa" not in records[0].metrics()
        kappa[name] = records[1].metrics()["kappa"]
    assert kappa["sgd"] == pytest.approx(1.0, abs=2e-3)  # float32 weights round the update
    assert kappa["adamw"] > 1.2


def test_kappa_of_adams_first_step_is_that_of_the_sign(corpus):
    """AdamW's first update is lr·g/(|g| + eps·…): the sign where g is far above eps."""
    loaded = load_model("nano")
    config = settings(attack_steps=1, search_steps=0)
    tokens = prepare_arm(config, loaded, corpus, WeightChange(loaded.model)).catalyst.tokens
    gradients = gradients_of(loaded.model, sequence_loss(loaded.model, tokens))
    subspace = SingularSubspace.of(block_matrices(loaded.model), config.subspace_energy)
    signs = {n: g / (g.abs() + 1e-8) for n, g in gradients.items()}
    expected = subspace.amplification(gradients, signs)
    records, _, _ = run(loaded, corpus, config)
    assert records[1].metrics()["kappa"] == pytest.approx(expected["kappa"], rel=1e-3)
    assert records[1].metrics()["update_alignment"] == pytest.approx(
        expected["update_alignment"], rel=1e-3
    )


# --- oracle ---------------------------------------------------------------------------------


def test_oracle_moves_within_the_subspace_alone(corpus):
    loaded = load_model("nano")
    config = settings(arm="haep_oracle", attack_optimizer="sgd", attack_lr=0.1)
    records, change, made = run(loaded, corpus, config)
    delta = change.delta(loaded.model)
    matrices = block_matrices(loaded.model)
    assert all(bool(delta[n].any()) for n in matrices)
    assert not any(bool(d.any()) for n, d in delta.items() if n not in matrices)
    final = records[-1].metrics()
    assert final["alignment_weight_change"] == pytest.approx(1.0, abs=1e-3)
    assert final["update_alignment"] == pytest.approx(1.0, abs=1e-3)
    assert "kappa" not in final
    # The same catalyst as haep's of the same seed: the projection is the only difference.
    twin = load_model("nano")
    other = prepare_arm(settings(arm="haep"), twin, corpus, WeightChange(twin.model))
    assert torch.equal(made.catalyst.tokens, other.catalyst.tokens)


def test_adam_leaves_the_subspace_even_with_projected_gradients(corpus):
    records, _, _ = run(load_model("nano"), corpus, settings(arm="haep_oracle"))
    assert records[-1].metrics()["alignment_weight_change"] < 0.95


def test_attack_in_the_hessian_subspace_reports_its_pairs(corpus):
    config = settings(subspace="hessian", hessian_directions=2)
    records, _, made = run(load_model("nano"), corpus, config)
    assert made.solver_statuses["hessian_status"] in ("converged", "max_iterations", "stagnated")
    numbers = made.curvature_metrics
    assert numbers["hessian_lambda_max"] >= numbers["hessian_lambda_k"] > 0
    assert records[0].metrics()["alignment_isotropic"] > 0.9999
    assert 0 <= numbers["rayleigh_percentile"] <= 100


@pytest.mark.parametrize(("model", "tokens", "draws"), [("micro", 1024, 16), ("160m", 256, 8)])
def test_a_large_model_is_asked_for_an_eighth_of_the_curvature(model, tokens, draws):
    config = resolve_from_presets(AttackConfig(model=model))
    assert (config.curvature_tokens, config.rayleigh_draws) == (tokens, draws)
    assert (
        resolve_from_presets(AttackConfig(model=model, curvature_tokens=512)).curvature_tokens
        == 512
    )


# --- warm-up --------------------------------------------------------------------------------


def test_warm_up_moves_the_second_moment_and_nothing_else(nano, corpus):
    config = settings(warmup_steps=3)
    before = state_digest(nano.model.state_dict())
    rate = float(config.attack_lr)
    optimizer = make_optimizer(config.attack_optimizer, nano.model.parameters(), rate)
    clean = list(warmup_batches(config, nano, corpus))
    assert len(clean) == 3
    warm_second_moment(optimizer, nano.model, clean)
    assert state_digest(nano.model.state_dict()) == before
    assert [g["lr"] for g in optimizer.param_groups] == [config.attack_lr]
    name, parameter = next(iter(block_matrices(nano.model).items()))
    expected = torch.zeros_like(parameter)
    for batch in clean:
        loss = nano.model(input_ids=batch, labels=batch).loss
        gradient = gradients_of(nano.model, loss)[name]
        expected = 0.999 * expected + 0.001 * gradient.square()
    state = optimizer.state[parameter]
    torch.testing.assert_close(state["exp_avg_sq"], expected, rtol=1e-4, atol=1e-12)
    assert float(state["step"]) == 3


class Slope:
    """An arm whose objective has the gradient −2 in its one parameter."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self.parameter = parameter

    def give_gradients(self) -> None:
        self.parameter.grad = torch.tensor([-2.0])


def test_the_first_step_after_the_warm_up_is_as_long_as_without():
    """Warmed on gradients of the attack's own size, AdamW takes steps of one learning rate."""
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=0.0, weight_decay=0.0)
    for _ in range(20):
        parameter.grad = torch.tensor([2.0])  # clean text pulls the other way
        optimizer.step()
    prime_first_moment(optimizer, Slope(parameter))
    optimizer.param_groups[0]["lr"] = 1.0
    for step in (1.0, 2.0, 3.0):
        parameter.grad = torch.tensor([-2.0])
        optimizer.step()
        assert float(parameter.detach()) == pytest.approx(step, rel=1e-4)


def test_warm_up_changes_the_attack(corpus):
    digests = set()
    for steps in (0, 2):
        loaded = load_model("nano")
        run(loaded, corpus, settings(warmup_steps=steps))
        digests.add(state_digest(loaded.model.state_dict()))
    assert len(digests) == 2
