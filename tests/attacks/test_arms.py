"""Attack arms: projections against dense algebra, one driver for all, and what each arm does."""

from __future__ import annotations

import copy
import math

import pytest
import scipy.linalg
import torch
from tokenizers import processors

from healing.attacks.alignment import (
    gradients_of,
    random_sequences,
    sequence_alignment,
    sequence_alignments,
    sequence_loss,
)
from healing.attacks.arms.spectral import mean_spectral_entropy
from healing.attacks.catalyst_search import Catalyst, propose_swaps, search_catalyst, token_gradient
from healing.attacks.context import prepare_arm
from healing.attacks.loop import gradient_step, run_attack
from healing.attacks.noise import gaussian_noise
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.resolve import resolve_from_presets
from healing.curvature.subspaces import MatrixSubspace, SingularSubspace
from healing.errors import CheckpointError, ConfigError
from healing.measurements.probe import Probe
from healing.models.blocks import block_matrices
from healing.models.checkpoints import COLLAPSED_KIND, HEALED_KIND, save_checkpoint
from healing.models.loading import LoadedModel, load_model, state_digest
from healing.progress import Safe, without_safe_points
from healing.randomness import named_generator
from tests.measurements.test_covariance import reference_rank
from tests.measurements.test_probe import hand_written_loss


def matrix(m: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(m, n, generator=named_generator(seed, "matrix"), dtype=torch.float64)


# --- the low-curvature subspace -------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_projection_equals_dense_complement_from_scipy(shape):
    weight, gradient = matrix(*shape), matrix(*shape, seed=1)
    u, s, vt = scipy.linalg.svd(weight.numpy())
    energy = (s**2).cumsum() / (s**2).sum()
    k = int((energy < 0.8).sum()) + 1
    left, right = torch.tensor(u[:, k:]), torch.tensor(vt[k:].T)
    expected = left @ left.T @ gradient @ right @ right.T
    space = MatrixSubspace.of(weight, 0.8)
    torch.testing.assert_close(space.project(gradient), expected, rtol=1e-10, atol=1e-12)
    assert float(space.coordinates(gradient).norm()) == pytest.approx(float(expected.norm()))
    assert space.dimension == (shape[0] - k) * (shape[1] - k)
    assert space.size == weight.numel()


def test_directions_of_no_energy_are_left_out_of_n_where_all_energy_is_asked_for():
    """A matrix of rank 2: orthonormal whatever the two directions without energy are."""
    weight = matrix(9, 2) @ matrix(2, 6, seed=1)
    space = MatrixSubspace.of(weight, 1 - 1e-12)
    assert space.k == 2
    everything = MatrixSubspace.of(weight, 1.0)
    identity = torch.eye(everything.k, dtype=torch.float64)
    torch.testing.assert_close(everything.leading.T @ everything.leading, identity)


def test_projection_is_idempotent_and_orthogonal():
    space = MatrixSubspace.of(matrix(8, 6), 0.7)
    inside = space.project(matrix(8, 6, seed=1))
    torch.testing.assert_close(space.project(inside), inside)
    u, _, vt = scipy.linalg.svd(matrix(8, 6).numpy())
    left, right = torch.tensor(u[:, : space.k]), torch.tensor(vt[: space.k].T)
    assert float((left.T @ inside).norm()) < 1e-12
    assert float((inside @ right).norm()) < 1e-12


def test_energy_of_a_rank_two_matrix():
    weight = torch.diag(torch.tensor([3.0, 1.0, 0.0, 0.0], dtype=torch.float64))
    # Energies 9 and 1 of 10: 0.9 needs one direction, 0.95 two.
    assert MatrixSubspace.of(weight, 0.9).k == 1
    assert MatrixSubspace.of(weight, 0.95).k == 2


def test_alignment_is_the_share_of_the_squared_norm():
    weights = {"a": matrix(8, 6), "b": matrix(5, 5, seed=2)}
    subspace = SingularSubspace.of(weights, 0.8)
    gradients = {"a": matrix(8, 6, seed=3), "b": matrix(5, 5, seed=4)}
    inside = sum(
        float(subspace.matrices[k].project(g).square().sum()) for k, g in gradients.items()
    )
    total = sum(float(g.square().sum()) for g in gradients.values())
    assert float(subspace.alignment(gradients)) == pytest.approx(inside / total)
    projected = {k: subspace.matrices[k].project(g) for k, g in gradients.items()}
    assert float(subspace.alignment(projected)) == pytest.approx(1.0)


def test_isotropic_alignment_by_simulation():
    subspace = SingularSubspace.of({"a": matrix(12, 9), "b": matrix(6, 6, seed=2)}, 0.6)
    draws = [
        float(subspace.alignment({"a": matrix(12, 9, seed=s), "b": matrix(6, 6, seed=s + 999)}))
        for s in range(10, 410)
    ]
    # 400 draws with standard deviation about 0.03: three standard errors are 0.005.
    assert sum(draws) / 400 == pytest.approx(subspace.isotropic_alignment, abs=0.006)


def test_energy_inside_and_outside_add_up():
    weights = {"tall": matrix(8, 6), "wide": matrix(4, 7, seed=2)}
    subspace = SingularSubspace.of(weights, 0.8)
    gradients = {"tall": matrix(8, 6, seed=3), "wide": matrix(4, 7, seed=4)}
    projected = subspace.project(gradients)
    inside, outside = subspace.split_energy(gradients)
    assert inside == pytest.approx(sum(float(p.square().sum()) for p in projected.values()))
    assert inside + outside == pytest.approx(
        sum(float(g.square().sum()) for g in gradients.values())
    )
    assert float(subspace.energy_inside(gradients)) == pytest.approx(inside)


def test_weight_change_against_flat_vectors(tiny):
    before = torch.nn.utils.parameters_to_vector(tiny.model.parameters()).detach().double()
    change = WeightChange(tiny.model)
    assert change.relative(tiny.model) == 0.0
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.mul_(1.5).add_(0.01)
    after = torch.nn.utils.parameters_to_vector(tiny.model.parameters()).detach().double()
    expected = float((after - before).norm() / before.norm())
    assert change.relative(tiny.model) == pytest.approx(expected)
    delta = change.delta(tiny.model)
    assert list(delta) == [name for name, _ in tiny.model.named_parameters()]
    moved = torch.cat([d.flatten() for d in delta.values()]).double()
    torch.testing.assert_close(moved, after - before, rtol=0, atol=1e-6)


# --- the catalyst ---------------------------------------------------------------------------


@pytest.fixture
def subspace(tiny) -> SingularSubspace:
    return SingularSubspace.of(block_matrices(tiny.model), 0.9)


def test_token_gradient_against_finite_differences(tiny, subspace):
    """∂ρ/∂(one-hot) along a swap direction, by central differences of the embedding mixture."""
    tiny.model.double()
    space = SingularSubspace.of(block_matrices(tiny.model), 0.9)
    tokens = random_sequences(1, 6, 2048, named_generator(0, "t"))[0]
    gradient = token_gradient(tiny.model, space, tokens)
    embedding = tiny.model.get_input_embeddings().weight.detach()

    def rho(amount: float) -> float:
        mixed = embedding[tokens].clone()
        mixed[2] += amount * (embedding[77] - embedding[tokens[2]])
        loss = tiny.model(inputs_embeds=mixed[None], labels=tokens[None]).loss
        return float(space.alignment(gradients_of(tiny.model, loss)).detach())

    numeric = (rho(1e-4) - rho(-1e-4)) / 2e-4
    exact = float(gradient[2, 77] - gradient[2, tokens[2]])
    # transformers computes the loss in float32, which leaves about 5e-5 at this step.
    assert exact == pytest.approx(numeric, rel=1e-3)


def test_swaps_change_one_token_to_a_steep_one():
    tokens = torch.arange(10)
    gradient = torch.randn(10, 300, generator=named_generator(0, "g"))
    proposals = propose_swaps(tokens, gradient, 50, named_generator(0, "swaps"))
    changed = proposals != tokens
    assert proposals.shape == (50, 10)
    assert int(changed.sum(1).max()) <= 1
    for row, column in changed.nonzero().tolist():
        better = (gradient[column] > gradient[column, proposals[row, column]]).sum()
        assert int(better) < 64


def test_search_only_improves_and_reports_the_true_alignment(tiny, subspace):
    baseline = random_sequences(4, 8, 2048, named_generator(0, "b"))
    found = search_catalyst(
        tiny.model, subspace, baseline, length=8, steps=4, candidates=6,
        generator=named_generator(0, "search"),
    )  # fmt: skip
    assert list(found.history) == sorted(found.history)
    assert found.history[-1] > found.history[0]
    direct = sequence_alignment(tiny.model, subspace, found.tokens)
    assert found.alignment == pytest.approx(direct, rel=1e-6)
    assert found.evaluations == 25
    assert len(found.random_alignments) == 4


def test_search_that_beats_no_baseline_has_failed():
    tokens = torch.zeros(4, dtype=torch.int64)
    randoms = (0.10, 0.11, 0.12)  # mean 0.11, standard deviation 0.01
    assert Catalyst(tokens, 0.1501, (0.1, 0.1501), randoms, 2).status == "found"
    assert Catalyst(tokens, 0.1499, (0.1, 0.1499), randoms, 2).status == "failed"
    beaten = Catalyst(tokens, 0.3, (0.1, 0.3), (*randoms, 0.31), 2)
    assert beaten.status == "failed"
    assert beaten.metrics()["random_alignment_max"] == 0.31
    assert Catalyst(tokens, 0.15, (0.1,), randoms, 2).metrics()["catalyst_z_score"] == (
        pytest.approx(4.0)
    )


def test_attack_objective_is_hand_written_cross_entropy_of_the_next_token(nano, probe):
    tokens = probe.windows[0]
    loss = float(sequence_loss(nano.model, tokens).detach())
    assert loss == pytest.approx(hand_written_loss(nano.model, tokens[None]), rel=1e-5)


def test_token_gradient_leaves_attention_as_it_was(nano):
    space = SingularSubspace.of(block_matrices(nano.model), 0.9)
    before = torch.backends.cuda.flash_sdp_enabled(), nano.model.config._attn_implementation
    token_gradient(nano.model, space, torch.arange(6))
    after = torch.backends.cuda.flash_sdp_enabled(), nano.model.config._attn_implementation
    assert after == before == (True, "sdpa")


# --- arms and driver ------------------------------------------------------------------------


def settings(arm: str, **changes) -> AttackConfig:
    values = {"search_steps": 1, "search_candidates": 2, "baseline_draws": 3, "attack_steps": 4,
              "measurement_interval": 2, "sequence_length": 64, "batch_size": 4,
              "rayleigh_draws": 0, "trajectory_interval": 0}  # fmt: skip
    return resolve_from_presets(AttackConfig(model="nano", arm=arm, **(values | changes)))


def run(nano, corpus, probe, config):
    healthy = probe.measure(nano.model)
    change = WeightChange(nano.model)
    made = prepare_arm(config, nano, corpus, change)
    events = run_attack(nano, made.arm, config, probe, healthy, change)
    records = list(without_safe_points(events))
    return records, change, made.catalyst


@pytest.fixture
def small_probe(probe) -> Probe:
    return Probe(probe.windows[:6])


BASELINES = {"alignment_random_tokens", "alignment_clean_text", "alignment_isotropic"}
OWN = {"alignment", "alignment_weight_change"}
KAPPA = {"kappa", "update_alignment"}


def alignment_metrics(record) -> set[str]:
    names = set(record.metrics())
    return {name for name in names if name.startswith("alignment")} | names & KAPPA


@pytest.mark.parametrize("arm", ["haep", "random_tokens", "random_text"])
def test_arms_of_one_sequence_log_alignment_and_its_baselines_at_both_ends(
    nano, corpus, small_probe, arm
):
    config = settings(arm, attack_steps=6, target_rank_reduction=1.0)
    records, _, catalyst = run(nano, corpus, small_probe, config)
    assert [r.step for r in records] == [0, 2, 4, 6]
    assert records[-1].weight_change > 0
    assert [alignment_metrics(r) for r in records] == [
        BASELINES | {"alignment"}, OWN | KAPPA, OWN | KAPPA, BASELINES | OWN | KAPPA,
    ]  # fmt: skip
    assert (catalyst is not None) == (arm == "haep")


def test_an_attack_that_ends_early_ends_with_baselines(nano, corpus, small_probe):
    config = settings("random_tokens", attack_steps=6, target_rank_reduction=1e-6)
    records, _, _ = run(nano, corpus, small_probe, config)
    assert [r.step for r in records] == [0, 2]
    assert alignment_metrics(records[-1]) == BASELINES | OWN | KAPPA


def test_baselines_in_between_are_an_option(nano, corpus, small_probe):
    config = settings("random_tokens", attack_steps=6, measurement_interval=1,
                      target_rank_reduction=1.0, baseline_interval=4)  # fmt: skip
    records, _, _ = run(nano, corpus, small_probe, config)
    assert [r.step for r in records if alignment_metrics(r) >= BASELINES] == [0, 4, 6]


CURVED = {"haep": {}, "random_text": {"warmup_steps": 2}, "gaussian_noise": {},
          "spectral": {"attack_lr": 0.003, "attack_optimizer": "sgd"}}  # fmt: skip


@pytest.mark.parametrize("arm", CURVED)
def test_points_of_the_curve_change_no_result(corpus, small_probe, arm):
    """Rank and loss, to the last bit of the weights, with and without the points in between."""
    found = {}
    for every in (0, 1, 2):
        loaded = load_model("nano")
        config = settings(arm, attack_steps=7, measurement_interval=3, baseline_interval=2,
                          target_rank_reduction=1.0, trajectory_interval=every,
                          **CURVED[arm])  # fmt: skip
        records, _, _ = run(loaded, corpus, small_probe, config)
        found[every] = records, state_digest(loaded.model.state_dict())
    steps = {every: [r.step for r in records] for every, (records, _) in found.items()}
    assert steps == {0: [0, 3, 6, 7], 1: [*range(8)], 2: [0, 2, 3, 4, 6, 7]}
    (plain, weights), *others = found.values()
    for records, digest in others:
        assert digest == weights
        same = [r for r in records if r.step in steps[0]]
        assert [(r.metrics(), r.outcome) for r in same] == [(r.metrics(), r.outcome) for r in plain]


def test_a_point_of_the_curve_ends_no_attack(corpus, small_probe):
    """The rank is below the target at the third step already, and is asked for at the fourth."""
    changes = {"attack_steps": 12, "measurement_interval": 4, "attack_lr": 0.05}
    whole = settings("random_tokens", **changes, trajectory_interval=1, target_rank_reduction=1.0)
    records, _, _ = run(load_model("nano"), corpus, small_probe, whole)
    ranks = [r.measurement.effective_rank for r in records]
    share = 1.0 - 1.001 * max(ranks[3:5]) / ranks[0]
    assert share > 0.05
    for every, steps in ((0, [0, 4]), (1, [0, 1, 2, 3, 4])):
        config = settings("random_tokens", **changes, trajectory_interval=every,
                          target_rank_reduction=share)  # fmt: skip
        records, _, _ = run(load_model("nano"), corpus, small_probe, config)
        assert [r.step for r in records] == steps
        # As the last one it has the baselines; those in between have ρ alone.
        assert alignment_metrics(records[-1]) == BASELINES | OWN | KAPPA
        assert all(alignment_metrics(r) == OWN | KAPPA for r in records[1:-1])


@pytest.mark.parametrize("arm", ["spectral", "gaussian_noise", "none"])
def test_arms_without_a_subspace_decompose_nothing_unless_asked(
    nano, corpus, small_probe, arm, monkeypatch
):
    asked, _, _ = run(load_model("nano"), corpus, small_probe, settings(arm, alignment="always"))
    own = {"spectral": OWN | KAPPA, "gaussian_noise": {"alignment_weight_change"}, "none": set()}
    assert alignment_metrics(asked[-1]) == BASELINES | own[arm]

    def refuse(*_):
        raise AssertionError("decomposed")

    monkeypatch.setattr(MatrixSubspace, "of", refuse)
    for alignment in ("by_arm", "never"):
        loaded = load_model("nano")
        records, _, _ = run(loaded, corpus, small_probe, settings(arm, alignment=alignment))
        assert not any(alignment_metrics(r) for r in records)
        # Watching changes nothing: the same states to the last digit.
        assert [r.measurement.metrics() for r in records] == [
            r.measurement.metrics() for r in asked
        ]


def test_haep_searches_in_the_subspace_though_alignment_is_not_measured(nano, corpus, small_probe):
    config = settings("haep_oracle", alignment="never")
    records, change, catalyst = run(nano, corpus, small_probe, config)
    assert catalyst.alignment >= catalyst.history[0] > 0
    assert not any(alignment_metrics(r) for r in records)
    outside = set(dict(nano.model.named_parameters())) - set(block_matrices(nano.model))
    assert not any(bool(change.delta(nano.model)[name].any()) for name in outside)


def test_sham_is_a_bitwise_no_op(nano, corpus, small_probe):
    before = state_digest(nano.model.state_dict())
    records, _, _ = run(nano, corpus, small_probe, settings("none"))
    assert state_digest(nano.model.state_dict()) == before
    assert len(records) == 1


def test_noise_of_zero_scale_is_a_bitwise_no_op(nano, corpus, small_probe):
    before = state_digest(nano.model.state_dict())
    run(nano, corpus, small_probe, settings("gaussian_noise", noise_scale=0.0))
    assert state_digest(nano.model.state_dict()) == before


def test_matched_noise_has_the_norm_of_every_tensor_of_the_attack(
    nano, corpus, small_probe, tmp_path
):
    _, change, _ = run(nano, corpus, small_probe, settings("random_tokens"))
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, nano.model, 4, "attack", {"model": "nano"})
    wanted = {k: float(d.norm()) for k, d in change.delta(nano.model).items()}
    fresh = load_model("nano", "cpu")
    config = settings("gaussian_noise", reference_checkpoint=str(path))
    _, noise, _ = run(fresh, corpus, small_probe, config)
    for name, delta in noise.delta(fresh.model).items():
        # float32 addition to the weights rounds each entry by up to 6e-8 of the weight.
        assert float(delta.norm()) == pytest.approx(wanted[name], rel=1e-3, abs=1e-6)


def test_noise_reference_of_another_model_is_refused(nano, corpus, small_probe, tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, load_model("micro").model, 0, "attack", {})
    config = settings("gaussian_noise", reference_checkpoint=str(path))
    with pytest.raises(CheckpointError, match="is not an attack on model nano"):
        run(nano, corpus, small_probe, config)


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"arm": "haep"}, HEALED_KIND, "holds healed weights"),
        ({"arm": "none"}, COLLAPSED_KIND, "is of the arm none"),
        ({"arm": "gaussian_noise"}, COLLAPSED_KIND, "is of the arm gaussian_noise"),
        ({"healthy_digest": "dead"}, COLLAPSED_KIND, "was made from other healthy weights"),
    ],
)
def test_noise_reference_has_to_be_an_attack_on_these_weights(
    nano, corpus, small_probe, tmp_path, config, kind, message
):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, nano.model, 0, "x", {"model": "nano", **config}, kind)
    with pytest.raises(CheckpointError, match=message):
        run(nano, corpus, small_probe, settings("gaussian_noise", reference_checkpoint=str(path)))


def test_noise_norms_and_independence():
    healthy = {"a": torch.zeros(40, 50), "b": torch.zeros(30)}
    noise = gaussian_noise(healthy, {"a": 2.0, "b": 0.5}, named_generator(0, "noise"))
    assert float(noise["a"].norm()) == pytest.approx(2.0, rel=1e-5)
    assert float(noise["b"].norm()) == pytest.approx(0.5, rel=1e-5)
    # Kurtosis of a normal is 3; 2,000 draws give it a standard error of √(24/2000) = 0.11.
    standard = noise["a"] / noise["a"].std()
    assert float(standard.pow(4).mean()) == pytest.approx(3.0, abs=0.45)


def test_spectral_objective_is_the_log_of_the_measured_rank(nano, corpus):
    windows = corpus.windows("attack", nano.tokenizer, 64)[:8]
    entropy = float(mean_spectral_entropy(nano.model, windows).detach())
    ranks = []
    with torch.no_grad():
        states = nano.model(input_ids=windows, output_hidden_states=True).hidden_states
    for block in range(3):
        rows = states[block + 1][:, 1:].reshape(-1, 48).double().numpy()
        ranks.append(math.log(reference_rank(rows)))
    # The last block differs (hidden_states holds it after the final norm): compare three of four.
    last = 4 * entropy - sum(ranks)
    assert 0 < last < math.log(48)


def test_spectral_arm_collapses_the_rank(nano, corpus, small_probe):
    records, _, _ = run(
        nano, corpus, small_probe,
        settings("spectral", attack_steps=20, measurement_interval=5, target_rank_reduction=0.5),
    )  # fmt: skip
    assert records[-1].measurement.effective_rank < 0.5 * records[0].measurement.effective_rank
    assert records[-1].step < 20  # it stopped when the target was reached
    assert all(r.outcome.finite for r in records)


def test_a_name_that_no_arm_has_is_refused_instead_of_run_as_another(nano, corpus):
    config = resolve_from_presets(AttackConfig(model="nano"))
    object.__setattr__(config, "arm", "mystery")
    with pytest.raises(ConfigError, match="unknown arm 'mystery': choose one of haep, "):
        prepare_arm(config, nano, corpus, WeightChange(nano.model))


def test_attack_stops_on_a_step_that_is_not_finite(nano, corpus, small_probe):
    healthy, change = small_probe.measure(nano.model), WeightChange(nano.model)
    config = settings("random_tokens", attack_steps=10)
    arm = prepare_arm(config, nano, corpus, change).arm
    weight = next(iter(block_matrices(nano.model).values()))
    arm.objective = lambda: (weight * math.inf).sum()  # type: ignore[attr-defined]
    events = run_attack(nano, arm, config, small_probe, healthy, change)
    records = list(without_safe_points(events))
    assert [r.step for r in records] == [0, 1]
    assert not records[-1].outcome.finite
    assert records[-1].weight_change == 0.0


@pytest.mark.parametrize("arm", ["random_tokens", "gaussian_noise"])
def test_every_step_ends_in_a_safe_point_and_measured_ones_after_their_record(
    nano, corpus, small_probe, arm
):
    healthy, change = small_probe.measure(nano.model), WeightChange(nano.model)
    config = settings(arm, attack_steps=5, target_rank_reduction=1.0)
    made = prepare_arm(config, nano, corpus, change).arm
    events = [
        f"safe {e.done}" if isinstance(e, Safe) else f"record {e.step}"
        for e in made.run(nano, config, small_probe, healthy, change)
    ]
    assert events == [
        "record 0", "safe 1", "record 2", "safe 2", "safe 3", "record 4", "safe 4",
        "record 5", "safe 5",
    ]  # fmt: skip


def test_gradient_step_reports_the_gradient_norm():
    parameter = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    outcome = gradient_step(optimizer, 0.5 * parameter.square().sum())
    assert (outcome.objective, outcome.grad_norm) == (12.5, 5.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([2.7, 3.6]))


def test_all_arms_share_optimiser_and_budget(nano, corpus, small_probe, monkeypatch):
    made = []
    original = torch.optim.AdamW

    def spy(parameters, **options):
        made.append(options)
        return original(parameters, **options)

    monkeypatch.setattr(torch.optim, "AdamW", spy)
    for arm in ("haep", "spectral", "random_tokens", "random_text"):
        records, _, _ = run(load_model("nano"), corpus, small_probe, settings(arm))
        assert records[-1].step <= 4
    assert all(options == made[0] for options in made)
    assert len(made) == 4


def test_measuring_more_often_does_not_change_the_attack(nano, corpus, small_probe):
    digests = []
    for interval in (1, 4):
        model = load_model("nano")
        run(model, corpus, small_probe, settings("spectral", measurement_interval=interval,
                                                 target_rank_reduction=1.0))  # fmt: skip
        digests.append(state_digest(model.model.state_dict()))
    assert digests[0] == digests[1]


def test_weight_change_by_hand():
    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    change = WeightChange(layer)
    with torch.no_grad():
        layer.weight.add_(torch.tensor([[0.0, 1.0]]))
    assert change.relative(layer) == pytest.approx(0.2)


@pytest.mark.parametrize("arm", ["haep", "random_tokens"])
def test_padding_rows_of_the_vocabulary_are_never_fed(tiny, corpus, arm):
    """All ids above the tokenizer's are padding: here nine in ten rows, of steeper gradient."""
    padded = copy.deepcopy(tiny.model)
    padded.resize_token_embeddings(20_480, mean_resizing=False)
    with torch.no_grad():
        padded.get_input_embeddings().weight[2048:] *= 10.0
    loaded = LoadedModel("nano", padded, tiny.tokenizer, "digest")
    assert loaded.vocabulary == 2048
    config = resolve_from_presets(
        AttackConfig(model="nano", arm=arm, search_steps=3, rayleigh_draws=0)
    )
    made = prepare_arm(config, loaded, corpus, WeightChange(padded))
    fed = []
    padded.register_forward_pre_hook(
        lambda _module, _args, given: fed.append(int(given["input_ids"].max())), with_kwargs=True
    )
    made.arm.fixed_objective()
    assert int(made.arm.baselines.random.max()) < 2048
    assert 0 < max(fed) < 2048


@pytest.fixture
def begun(nano) -> LoadedModel:
    """Nano with a tokenizer that puts a token in front of every text, as Llama 2's does."""
    tokenizer = copy.deepcopy(nano.tokenizer)
    first = tokenizer.convert_ids_to_tokens(FIRST)
    tokenizer.bos_token = first
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{first} $A", special_tokens=[(first, FIRST)]
    )
    return LoadedModel("nano", nano.model, tokenizer, "digest")


FIRST = 77


def test_what_begins_every_text_begins_every_sequence_and_is_never_swapped(
    begun, corpus, monkeypatch
):
    evaluated = []

    def spy(*args):
        evaluated.append(args[2])
        return sequence_alignments(*args)

    monkeypatch.setattr("healing.attacks.catalyst_search.sequence_alignments", spy)
    config = settings("haep", search_candidates=64, catalyst_length=8)
    made = prepare_arm(config, begun, corpus, WeightChange(begun.model))
    rows = torch.cat(evaluated)
    assert len(rows) == 1 + 3 + 64
    assert (rows[:, 0] == FIRST).all()
    # Without a fixed position 64 swaps would leave the first one alone once in 5,000 searches.
    start, swapped = rows[0], rows[4:]
    assert {int((row != start).sum()) for row in swapped} <= {0, 1}
    assert set((swapped != start).any(0).nonzero().flatten().tolist()) == set(range(1, 8))
    assert made.catalyst.tokens[0] == FIRST
    assert not (made.arm.baselines.random[:, 1:] == FIRST).all()


@pytest.mark.parametrize("arm", ["random_tokens", "random_text"])
def test_token_controls_begin_with_it_too(begun, corpus, arm):
    fed = []
    begun.model.register_forward_pre_hook(
        lambda _module, _args, given: fed.append(given["input_ids"]), with_kwargs=True
    )
    made = prepare_arm(settings(arm), begun, corpus, WeightChange(begun.model))
    fed.clear()  # what the trial of the model's layers was given
    made.arm.fixed_objective()
    assert len(fed) == 1
    assert fed[0][0, 0] == FIRST != fed[0][0, 1]


def test_a_spectral_attack_on_what_cannot_be_computed_ends_instead_of_raising(nano, corpus):
    """Eigenvalues of a matrix that is not finite raise."""
    with torch.no_grad():
        nano.model.get_input_embeddings().weight[:] = 1e30
    config = settings("spectral")
    probe = Probe(corpus.windows("probe", nano.tokenizer, 32)[:4])
    healthy, change = probe.measure(nano.model), WeightChange(nano.model)
    made = prepare_arm(config, nano, corpus, change)
    events = run_attack(nano, made.arm, config, probe, healthy, change)
    records = list(without_safe_points(events))
    assert [r.step for r in records] == [0, 1]
    assert not records[-1].outcome.finite
    # Measuring and the next forward pass have the gradients' room.
    assert all(p.grad is None for p in nano.model.parameters())
