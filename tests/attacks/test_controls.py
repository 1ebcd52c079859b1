"""Arms that are functions of one strength: closed forms, dense algebra, exact ends; the readout."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from healing.attacks.arms.sharpened_spectrum import sharpened
from healing.attacks.context import prepare_arm
from healing.attacks.damage_matching import matched
from healing.attacks.noise import gaussian_noise, low_rank_noise, noise_draws, rotated
from healing.attacks.strength import NoiseArm
from healing.attacks.weight_change import WeightChange, snapshot
from healing.config.attack import AttackConfig
from healing.config.resolve import resolve_from_presets
from healing.errors import CheckpointError, ConfigError, MatchError
from healing.measurements.probe import Probe
from healing.measurements.spectrum import effective_rank
from healing.models.blocks import block_matrices, block_outputs, readout_parameters
from healing.models.checkpoints import HEALED_KIND, save_checkpoint
from healing.models.loading import LoadedModel, load_model, state_digest, untrained_model
from healing.progress import Safe, without_safe_points
from healing.randomness import named_generator


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=named_generator(seed, "matrix"))


# --- noise of low rank ----------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 4])
def test_low_rank_noise_has_its_rank_and_the_norm_of_every_matrix(rank):
    healthy = {"a": torch.zeros(30, 20), "b": torch.zeros(5, 40)}
    noise = low_rank_noise(healthy, {"a": 3.0, "b": 0.25}, rank, named_generator(0, "n"))
    for name, norm in (("a", 3.0), ("b", 0.25)):
        values = scipy.linalg.svdvals(noise[name].double().numpy())
        assert (values > 1e-5 * values[0]).sum() == rank
        assert np.sqrt((values**2).sum()) == pytest.approx(norm, rel=1e-6)
    again = low_rank_noise(healthy, {"a": 3.0, "b": 0.25}, rank, named_generator(0, "n"))
    assert all(torch.equal(noise[k], again[k]) for k in noise)


def test_factors_of_low_rank_noise_are_gaussian():
    """An entry is a product of two independent normals: kurtosis 3·3 = 9, where a normal has 3."""
    draws = named_generator(0, "kurtosis")
    ratios = []
    for _ in range(400):
        e = low_rank_noise({"a": torch.zeros(40, 40)}, {"a": 1.0}, 1, draws)["a"].double()
        ratios.append(float(e.pow(4).mean() / e.pow(2).mean() ** 2))
    # Of finite vectors 9·((n/(n+2))²) = 8.16; 400 matrices leave a standard error of about 0.11.
    assert np.mean(ratios) == pytest.approx(9.0 * (40 / 42) ** 2, abs=0.4)


class Linear(nn.Module):
    """Two equal blocks, each one matrix: what the arms know as a model."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(size, size, bias=False) for _ in range(2))
        with torch.no_grad():
            for block in self.blocks:
                block.weight.copy_(torch.eye(size))


def test_noise_of_rank_one_collapses_a_linear_map_as_the_closed_form_says():
    """W = I + s·uvᵀ, |u| = |v| = 1, has n − 2 singular values 1 and two more, whose product is
    |1 + s·u·v| (the determinant) and whose squares sum to 2 + 2s·u·v + s² (the trace of WᵀW).
    Isotropic inputs come out with these standard deviations.
    """
    size, model = 12, Linear(12)
    change = WeightChange(model)
    matrices = {name: change.healthy[name] for name in block_matrices(model)}
    noise = low_rank_noise(matrices, dict.fromkeys(matrices, 1.0), 1, named_generator(3, "n"))
    arm = NoiseArm(model, noise, None, change)
    name = "blocks.1.weight"
    overlap = float(noise[name].double().trace())  # uᵀv
    ranks = []
    for strength in (0.0, 0.5, 3.0, 40.0, 1e6):
        arm.place(strength)
        weight = model.blocks[1].weight.detach().double()
        total, product = (
            2.0 + 2.0 * strength * overlap + strength**2,
            abs(1.0 + strength * overlap),
        )
        root = math.sqrt(max(total**2 - 4.0 * product**2, 0.0))
        pair = math.sqrt((total + root) / 2.0), product / math.sqrt((total + root) / 2.0)
        p = np.array([*pair, *[1.0] * (size - 2)])
        p /= p.sum()
        ranks.append(float(effective_rank(torch.linalg.eigvalsh(weight @ weight.T))))
        assert ranks[-1] == pytest.approx(math.exp(-(p * np.log(p)).sum()), rel=1e-3)
    assert ranks == sorted(ranks, reverse=True)
    assert ranks[0] == pytest.approx(size)
    assert ranks[-1] == pytest.approx(1.0, abs=1e-3)


# --- sharpened spectra ----------------------------------------------------------------------


@pytest.mark.parametrize("strength", [0.3, 1.0, 20.0, 300.0])
def test_a_sharpened_matrix_against_scipy(tiny, corpus, strength):
    change = WeightChange(tiny.model)
    arm = prepare_arm(settings("sharpened_spectrum"), tiny, corpus, change).arm
    arm.place(strength)
    matrices = block_matrices(tiny.model)
    for name, parameter in tiny.model.named_parameters():
        if name not in matrices:
            assert torch.equal(parameter, change.healthy[name])
            continue
        healthy = change.healthy[name].double().numpy()
        left, values, right = scipy.linalg.svd(healthy, full_matrices=False)
        powers = np.exp((1.0 + strength) * (np.log(values) - np.log(values[0])))
        powers *= np.sqrt((values**2).sum() / (powers**2).sum())
        expected = torch.tensor(left @ np.diag(powers) @ right).float()
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-5)
        assert float(parameter.detach().norm()) == pytest.approx(np.linalg.norm(healthy), rel=1e-5)


def test_sharpening_keeps_norm_and_order_and_ends_in_one_direction():
    values = torch.linalg.svdvals(matrix(9, 7).double())
    last = float(values.log().diff().abs().sum())
    for strength in (0.5, 2.0, 8.0):
        found = sharpened(values, strength)
        assert float(found.norm()) == pytest.approx(float(values.norm()))
        assert bool((found.diff() < 0).all())
        spread = float(found.log().diff().abs().sum())
        assert spread > last  # every ratio of neighbours grows
        last = spread
    torch.testing.assert_close(sharpened(values, 0.0), values)
    assert float(sharpened(values, 1e4)[1:].sum()) < 1e-12
    assert float(sharpened(torch.zeros(3, dtype=torch.float64), 2.0).sum()) == 0.0


# --- turned changes -------------------------------------------------------------------------


def test_a_rotated_change_keeps_its_singular_values_and_no_direction():
    change = matrix(40, 25)
    turned = [rotated(change, named_generator(seed, "turn")) for seed in range(60)]
    wanted = scipy.linalg.svdvals(change.double().numpy())
    np.testing.assert_allclose(scipy.linalg.svdvals(turned[0].numpy()), wanted, rtol=1e-10)
    cosines = [float((t * change).sum() / change.norm().square()) for t in turned]
    # Uniform on both sides: mean 0, standard deviation about 1/√(40·25) = 0.032.
    assert np.mean(cosines) == pytest.approx(0.0, abs=0.013)
    assert np.std(cosines) == pytest.approx(1.0 / math.sqrt(1000), rel=0.35)


def test_a_frame_is_uniform_and_not_of_one_sign():
    """LAPACK's Q of a Gaussian matrix has a preferred sign; turned rank-one changes show it."""
    one = torch.zeros(6, 6)
    one[0, 0] = 1.0
    corner = [float(rotated(one, named_generator(s, "sign"))[0, 0]) for s in range(200)]
    assert np.mean(np.array(corner) > 0) == pytest.approx(0.5, abs=0.12)


# --- arms on a model ------------------------------------------------------------------------


def settings(arm: str, **changes) -> AttackConfig:
    values = {"baseline_draws": 3, "attack_steps": 4, "measurement_interval": 2,
              "trajectory_interval": 0, "sequence_length": 64, "batch_size": 4}  # fmt: skip
    return resolve_from_presets(AttackConfig(model="nano", arm=arm, **(values | changes)))


@pytest.fixture
def small_probe(probe) -> Probe:
    return Probe(probe.windows[:6])


@pytest.fixture
def attacked(tiny, tmp_path) -> tuple[str, dict[str, torch.Tensor]]:
    """A checkpoint of tiny after a change of every tensor, and its weights; tiny is healthy."""
    healthy = snapshot(dict(tiny.model.named_parameters()))
    generator = named_generator(0, "attack")
    with torch.no_grad():
        for parameter in tiny.model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    path = tmp_path / "attacked.pt"
    save_checkpoint(path, tiny.model, 1, "attack", {"model": "nano", "arm": "random_text"})
    state = snapshot(dict(tiny.model.named_parameters()))
    with torch.no_grad():
        for name, parameter in tiny.model.named_parameters():
            parameter.copy_(healthy[name])
    return str(path), state


def test_a_ray_ends_in_its_attack_and_begins_in_the_healthy_model(tiny, corpus, attacked):
    path, state = attacked
    with torch.no_grad():  # so far from the attack's that W₀ + (W − W₀) is not W in float32
        tiny.model.gpt_neox.final_layer_norm.weight.mul_(1e5)
    change = WeightChange(tiny.model)
    arm = prepare_arm(settings("ray", direction_checkpoint=path), tiny, corpus, change).arm
    for strength, expected in ((1.0, state), (0.0, change.healthy)):
        arm.place(strength)
        for name, parameter in tiny.model.named_parameters():
            assert torch.equal(parameter, expected[name]), (name, strength)
    for strength in (0.25, 1.7):
        arm.place(strength)
        for name, parameter in tiny.model.named_parameters():
            start, end = change.healthy[name].double(), state[name].double()
            expected = (start + strength * (end - start)).float()
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-5, atol=1e-6)


def test_an_unmatched_ray_ends_at_its_strength(tiny, corpus, attacked, small_probe):
    path, state = attacked
    config = settings("ray", direction_checkpoint=path)
    healthy, change = small_probe.measure(tiny.model), WeightChange(tiny.model)
    arm = prepare_arm(config, tiny, corpus, change).arm
    records = list(without_safe_points(arm.run(tiny, config, small_probe, healthy, change)))
    assert [r.step for r in records] == [0, 2, 4]
    assert all(torch.equal(p, state[n]) for n, p in tiny.model.named_parameters())


@pytest.mark.parametrize("arm", ["low_rank_noise", "sharpened_spectrum", "rotated_change", "ray"])
def test_strength_zero_is_a_bitwise_no_op(tiny, corpus, attacked, arm):
    digest = state_digest(tiny.model.state_dict())
    named = {"ray": "direction_checkpoint", "rotated_change": "reference_checkpoint"}
    given = {named[arm]: attacked[0]} if arm in named else {}
    made = prepare_arm(settings(arm, **given), tiny, corpus, WeightChange(tiny.model)).arm
    made.place(0.7)
    assert state_digest(tiny.model.state_dict()) != digest
    made.place(0.0)
    assert state_digest(tiny.model.state_dict()) == digest


@pytest.mark.parametrize("arm", ["low_rank_noise", "rotated_change"])
def test_norms_are_the_references_in_the_matrices_and_nothing_else_moves(
    tiny, corpus, attacked, arm
):
    path, state = attacked
    change = WeightChange(tiny.model)
    made = prepare_arm(settings(arm, reference_checkpoint=path), tiny, corpus, change).arm
    made.place(1.0)
    matrices = block_matrices(tiny.model)
    assert set(made.noise) == set(matrices)
    for name, delta in change.delta(tiny.model).items():
        wanted = float((state[name] - change.healthy[name]).norm()) if name in matrices else 0.0
        assert float(delta.norm()) == pytest.approx(wanted, rel=1e-5, abs=0.0)


def test_draws_are_numbered_streams_of_their_own():
    """The first is the arm's own stream, as it was before there were others."""
    config = settings("low_rank_noise", seed=3)
    own = torch.randn(4, generator=named_generator(3, "attack", "low_rank_noise"))
    first = torch.randn(4, generator=noise_draws(config))
    second = torch.randn(4, generator=noise_draws(replace(config, noise_draw=1)))
    other = torch.randn(4, generator=noise_draws(replace(config, noise_draw=2)))
    assert torch.equal(first, own)
    assert not torch.equal(first, second)
    assert not torch.equal(second, other)


def test_what_gives_a_direction_is_checked(tiny, corpus, tmp_path):
    path = tmp_path / "x.pt"
    for arm, kind, message in (("none", "", "is of the arm none"),
                               ("haep", HEALED_KIND, "holds healed weights")):  # fmt: skip
        extra = (kind,) if kind else ()
        save_checkpoint(path, tiny.model, 0, "x", {"model": "nano", "arm": arm}, *extra)
        config = settings("ray", direction_checkpoint=str(path))
        with pytest.raises(CheckpointError, match=message):
            prepare_arm(config, tiny, corpus, WeightChange(tiny.model))
    # Matched noise is no reference, and a direction like any other.
    save_checkpoint(path, tiny.model, 0, "x", {"model": "nano", "arm": "low_rank_noise"})
    config = settings("ray", direction_checkpoint=str(path))
    prepare_arm(config, tiny, corpus, WeightChange(tiny.model))
    for arm in ("low_rank_noise", "reinitialised"):
        save_checkpoint(path, tiny.model, 0, "x", {"model": "nano", "arm": arm})
        config = settings("low_rank_noise", reference_checkpoint=str(path))
        with pytest.raises(CheckpointError, match=f"is of the arm {arm}"):
            prepare_arm(config, tiny, corpus, WeightChange(tiny.model))


# --- the untrained model --------------------------------------------------------------------


def test_the_untrained_model_has_the_initial_distribution_and_no_trained_weight(nano, corpus):
    change = WeightChange(nano.model)
    config = settings("reinitialised")
    arm = prepare_arm(config, nano, corpus, change).arm
    assert arm.steps(config) == 1
    arm.place(1.0)
    drawn = 0
    for name, parameter in nano.model.named_parameters():
        values = parameter.detach()
        if "norm" in name or name.endswith("bias"):
            constant = 1.0 if "norm.weight" in name else 0.0
            assert bool((values == constant).all()), name
            continue
        drawn += 1
        # GPT-NeoX: N(0, 0.02²). Standard errors: 0.02/√n of the mean, 0.02/√(2n) of the deviation.
        n = values.numel()
        assert float(values.mean()) == pytest.approx(0.0, abs=5 * 0.02 / math.sqrt(n)), name
        assert float(values.std()) == pytest.approx(0.02, abs=5 * 0.02 / math.sqrt(2 * n)), name
        # Two independent draws of 24 bits: a handful of equal numbers would be chance.
        assert int((values == change.healthy[name]).sum()) <= 5, name
    assert drawn == 4 * 4 + 2


def test_the_untrained_model_draws_from_its_own_stream_alone(nano):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()

    def digest(seed: int) -> str:
        return state_digest(untrained_model(nano, named_generator(seed, "u")).state_dict())

    found = [digest(0), digest(0), digest(1)]
    assert found[0] == found[1] != found[2]
    assert torch.equal(torch.random.get_rng_state(), state)
    with ThreadPoolExecutor(3) as pool:
        noisy = pool.submit(lambda: [torch.randn(1000) for _ in range(300)])
        together = list(pool.map(digest, [0, 1, 0, 1]))
        noisy.result()
    assert together == [found[0], found[2]] * 2


# --- noise on the readout -------------------------------------------------------------------

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
LLAMA = {**SMALL, "vocab_size": 2048, "intermediate_size": 48}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(**LLAMA, tie_word_embeddings=False), {"lm_head.weight", "model.norm.weight"}),
        (LlamaConfig(**LLAMA, tie_word_embeddings=True), {"model.norm.weight"}),
        (
            GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=2048),
            {"transformer.ln_f.weight", "transformer.ln_f.bias"},
        ),
    ],
)
def test_readout_is_what_no_block_sees(config, expected):
    model = AutoModelForCausalLM.from_config(config).eval()
    found = readout_parameters(model)
    assert set(found) == expected
    tokens = torch.arange(12)[None]

    def outputs() -> tuple[list[torch.Tensor], torch.Tensor]:
        with torch.no_grad(), block_outputs(model) as hidden:
            logits = model(input_ids=tokens).logits
            return list(hidden), logits

    before, logits = outputs()
    with torch.no_grad():
        for parameter in found.values():
            parameter.add_(torch.randn(parameter.shape, generator=named_generator(0, "r")))
    after, others = outputs()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.allclose(logits, others)


@pytest.fixture
def hurt(corpus, tmp_path):
    """Makes a healthy untied or tied model, its probe, and a reference of lower rank and higher
    loss: matrices with random columns emphasised, readout scaled up.
    """

    def make(tied: bool, readout: float) -> tuple[LoadedModel, Probe, str]:
        loaded = load_tiny(corpus, tied)
        probe = Probe(corpus.windows("probe", loaded.tokenizer, 32)[:20])
        healthy = snapshot(dict(loaded.model.named_parameters()))
        with torch.no_grad():
            for parameter in block_matrices(loaded.model).values():
                u, s, v = torch.linalg.svd(parameter, full_matrices=False)
                parameter.copy_((u * (s.square() / s.mean())) @ v)
            for parameter in readout_parameters(loaded.model).values():
                parameter.mul_(readout)
        path = tmp_path / "reference.pt"
        save_checkpoint(path, loaded.model, 1, "x", {"model": "nano", "arm": "haep"})
        with torch.no_grad():
            for name, parameter in loaded.model.named_parameters():
                parameter.copy_(healthy[name])
        return loaded, probe, str(path)

    return make


def load_tiny(corpus, tied: bool) -> LoadedModel:
    tokenizer = load_model("nano").tokenizer
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**LLAMA, tie_word_embeddings=tied), attn_implementation="sdpa"
    ).eval()
    generator = named_generator(0, "tiny")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0.0, 0.3, generator=generator)
    model.config.use_cache = False
    return LoadedModel("nano", model, tokenizer, state_digest(model.state_dict()))


def test_a_match_of_rank_and_loss_goes_on_after_any_strength_and_tries_none_again(
    hurt, corpus, monkeypatch
):
    loaded, probe, path = hurt(False, 4.0)
    change, healthy = WeightChange(loaded.model), probe.measure(loaded.model)
    config = settings("low_rank_noise", reference_checkpoint=path, match="rank+loss")
    measured = []
    measure = Probe.measure
    monkeypatch.setattr(Probe, "measure", lambda *given: measured.append(1) or measure(*given))

    def run(kept=None, points=10**6):
        """Records up to so many safe points, the state there, and what was measured."""
        for name, parameter in loaded.model.named_parameters():
            parameter.data.copy_(change.healthy[name])
        arm = prepare_arm(config, loaded, corpus, change).arm
        del measured[:]
        records = []
        for event in matched(loaded, arm, config, probe, healthy, change, kept):
            if not isinstance(event, Safe):
                records.append(event)
                continue
            points -= 1
            if points == 0:
                return records, event.state(), len(measured)
        return records, snapshot(dict(loaded.model.named_parameters())), len(measured)

    whole, weights, count = run()
    readout = [r.step for r in whole if "readout_scale" in r.diagnostics]
    assert len(readout) > 1
    assert readout[0] > 2, "both searches have more than one strength"
    # After the first strength, about the change from one search to the other, and after the last.
    for number in sorted({1, readout[0] - 1, readout[0], len(whole) - 1}):
        before, kept, first = run(points=number)
        after, again, second = run(kept)
        assert [r.metrics() for r in before + after] == [
            pytest.approx(r.metrics(), rel=0, abs=0, nan_ok=True) for r in whole
        ]
        assert all(torch.equal(again[name], weight) for name, weight in weights.items())
        assert first + second == count, number


@pytest.mark.parametrize("tied", [False, True])
def test_rank_is_matched_first_and_then_the_loss_by_the_readout_alone(hurt, corpus, tied):
    loaded, probe, path = hurt(tied, 4.0)
    change, healthy = WeightChange(loaded.model), probe.measure(loaded.model)
    config = settings("low_rank_noise", reference_checkpoint=path, match="rank")
    final = {}
    for match in ("rank", "rank+loss"):
        asked = replace(config, match=match)
        arm = prepare_arm(asked, loaded, corpus, change).arm
        records = list(without_safe_points(matched(loaded, arm, asked, probe, healthy, change)))
        assert [r.step for r in records] == list(range(len(records)))
        final[match] = records[-1], snapshot(dict(loaded.model.named_parameters()))
    (rank, weights), (both, all_weights) = final.values()
    assert both.measurement.effective_rank == rank.measurement.effective_rank  # to the last bit
    assert both.measurement.loss > 1.05 * rank.measurement.loss
    moved = {n for n, w in weights.items() if not torch.equal(w, all_weights[n])}
    assert moved == ({"model.norm.weight"} if tied else {"lm_head.weight"})
    with change.replaced(loaded.model, torch.load(path, weights_only=True)["model_state_dict"]):
        reference = probe.measure(loaded.model)
    assert both.measurement.effective_rank == pytest.approx(reference.effective_rank, rel=0.02)
    assert both.measurement.loss == pytest.approx(reference.loss, rel=0.02)
    numbers = both.diagnostics
    assert numbers["noise_scale"] == rank.diagnostics["noise_scale"]
    assert numbers["readout_scale"] > 0
    assert abs(numbers["readout_match_error_pct"]) <= 2.0


def test_a_loss_that_is_above_the_references_is_refused(hurt, corpus):
    loaded, probe, path = hurt(False, 0.4)
    change, healthy = WeightChange(loaded.model), probe.measure(loaded.model)
    config = settings("low_rank_noise", reference_checkpoint=path, match="rank+loss")
    arm = prepare_arm(config, loaded, corpus, change).arm
    message = r"low_rank_noise reaches the rank .* at a loss of .*, above .*: noise on the readout"
    with pytest.raises(MatchError, match=message):
        list(matched(loaded, arm, config, probe, healthy, change))


# --- configuration --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"arm": "ray"}, "--arm ray needs the weight change of another attack: give --direction"),
        ({"arm": "rotated_change"}, "needs the weight change of another attack: give --reference"),
        (
            {"arm": "ray", "direction_checkpoint": "a", "reference_checkpoint": "b"},
            "--arm ray cannot be matched in norm: give --match rank, ",
        ),
        ({"arm": "haep", "direction_run_id": "a"}, "--direction-run-id belongs to --arm ray, not"),
        ({"arm": "gaussian_noise", "noise_rank": 2}, "--noise-rank belongs to --arm low_rank"),
        ({"arm": "sharpened_spectrum", "noise_draw": 1}, "--noise-draw belongs to --arm gau"),
        ({"arm": "low_rank_noise", "noise_rank": 0}, "--noise-rank must be at least 1 and"),
        ({"arm": "low_rank_noise", "match": "rank+loss"}, "--match rank+loss needs the attack to"),
        (
            {"arm": "ray", "direction_run_id": "a", "direction_checkpoint": "b"},
            "--direction-checkpoint and --direction-run-id exclude each other",
        ),
    ],
)  # fmt: skip
def test_options_of_controls_that_contradict_each_other_are_named(values, message):
    with pytest.raises(ConfigError) as caught:
        AttackConfig(**values)
    assert message in str(caught.value)


def test_readout_noise_has_draws_where_the_arm_has_none():
    values = {"reference_checkpoint": "a", "match": "rank+loss", "noise_draw": 2}
    assert AttackConfig(arm="sharpened_spectrum", **values).noise_draw == 2


def test_gaussian_noise_is_what_it_was_before_there_were_other_kinds():
    """One draw after the other, in name order, from the arm's own stream."""
    healthy = {"b": torch.zeros(3), "a": torch.zeros(2, 2)}
    noise = gaussian_noise(healthy, {"a": 1.0, "b": 2.0}, named_generator(0, "g"))
    stream = named_generator(0, "g")
    first, second = torch.randn(2, 2, generator=stream), torch.randn(3, generator=stream)
    torch.testing.assert_close(noise["a"], first / first.norm())
    torch.testing.assert_close(noise["b"], 2.0 * second / second.norm())
