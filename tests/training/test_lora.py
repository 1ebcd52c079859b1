"""Low-rank healing against dense references, closed forms and full healing."""

from __future__ import annotations

import sys

import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from entrypoints import heal as heal_command
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.errors import ConfigError
from healing.measurements.probe import Probe
from healing.models.blocks import block_outputs
from healing.models.checkpoints import read_checkpoint
from healing.models.loading import load_model
from healing.models.token_loss import training_loss
from healing.randomness import named_generator
from healing.registry import METHODS
from healing.training.healing_loop import heal, replay_healthy
from healing.training.methods.lora import adapted, check, linear_layers, n_trainable
from healing.training.trainer import Trainer

RANK = 3


def settings(**changes) -> HealConfig:
    values = {"model": "nano", "healing_steps": 4, "measurement_interval": 2, "batch_size": 4,
              "sequence_length": 64, "healing_method": "lora", "lora_rank": RANK}  # fmt: skip
    return resolve_from_presets(HealConfig(**(values | changes)))


def draws(seed: int = 0) -> torch.Generator:
    return named_generator(seed, "adapters")


def copy_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=101, n_positions=32, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config).eval()


def ids_for(model: nn.Module) -> torch.Tensor:
    size = (4, 16)
    return torch.randint(model.config.vocab_size, size, generator=named_generator(0, "ids"))


@pytest.fixture(params=["nano", "gpt2"])
def model(request, nano):
    return nano.model if request.param == "nano" else gpt2()


@pytest.fixture
def windows(corpus, nano):
    return corpus.windows("train", nano.tokenizer, 64)


@pytest.fixture
def small_probe(probe) -> Probe:
    return Probe(probe.windows[:4])


def test_every_linear_layer_of_the_blocks_is_adapted_and_nothing_else(nano):
    per_block = ["attention.dense", "attention.query_key_value", "mlp.dense_4h_to_h",
                 "mlp.dense_h_to_4h"]  # fmt: skip
    assert sorted(linear_layers(nano.model)) == [
        f"gpt_neox.layers.{i}.{name}" for i in range(4) for name in per_block
    ]
    names = {n.split(".", 3)[3] for n in linear_layers(gpt2())}
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


def test_adapters_start_as_the_model_itself_bit_for_bit(model):
    ids, before = ids_for(model), copy_of(model)
    plain = model(input_ids=ids).logits
    with adapted(model, settings(), draws()):
        assert torch.equal(model(input_ids=ids).logits, plain)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def train(model: nn.Module, config: HealConfig, steps: int = 3) -> Trainer:
    trainer = Trainer(model, config)
    for _ in range(steps):
        trainer.step(ids_for(model))
    return trainer


def test_merging_keeps_the_function_and_changes_matrices_by_rank_r(model):
    ids, before = ids_for(model), copy_of(model)
    parameters = {n: id(p) for n, p in model.named_parameters()}
    targets = {f"{name}.weight" for name in linear_layers(model)}
    with adapted(model, settings(), draws()):
        train(model, settings())
        inside = model(input_ids=ids).logits.detach()
    merged = model(input_ids=ids).logits
    assert (merged - inside).abs().max() < 1e-4 * inside.abs().max()
    assert (merged - inside).norm() < 1e-5 * inside.norm()
    assert {n: id(p) for n, p in model.named_parameters()} == parameters
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")
    for name, value in model.state_dict().items():
        change = (value - before[name]).double()
        if name in targets:
            # Rounding of the merged float32 weight leaves singular values of about 1e-7·|W|.
            tolerance = 1e-6 * float(value.norm())
            assert 0 < torch.linalg.matrix_rank(change, atol=tolerance, rtol=0.0) <= RANK
            assert float(torch.linalg.matrix_norm(change, 2)) > 20 * tolerance
        else:
            assert torch.equal(value, before[name]), name


def test_only_the_adapters_are_trained(model):
    config = settings()
    expected = n_trainable(model, config)
    assert expected == sum(RANK * sum(m.weight.shape) for m in linear_layers(model).values())
    base = {id(p) for p in model.parameters()}
    with adapted(model, config, draws()):
        trainer = train(model, config, 1)
        held = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        assert not base & {id(p) for p in held}
        assert sum(p.numel() for p in held) == expected
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert METHODS.load("full").n_trainable(model, config) == sum(
        p.numel() for p in model.parameters()
    )


class OneLayer(nn.Module):
    """A block list of one linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 4, bias=False)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[0](x)


def test_gradients_are_the_closed_form():
    """With G = ∂L/∂W: ∂L/∂B = s·G Aᵀ and ∂L/∂A = s·Bᵀ G, s = α/r."""
    model, generator = OneLayer(), named_generator(0, "closed")
    config = settings(lora_rank=2, lora_alpha=6.0)
    x, target = (torch.randn(7, n, generator=generator) for n in (5, 4))
    with adapted(model, config, draws()):
        layer = model.layers[0]
        a, b = layer.lora_A["healing"].weight, layer.lora_B["healing"].weight
        assert torch.equal(b, torch.zeros(4, 2))
        with torch.no_grad():
            b.normal_(generator=generator)
        (model(x) * target).sum().backward()
        outer = target.T @ x
        assert torch.allclose(b.grad, 3.0 * outer @ a.T, rtol=1e-5, atol=1e-5)
        assert torch.allclose(a.grad, 3.0 * b.T @ outer, rtol=1e-5, atol=1e-5)
        expected = x @ (layer.base_layer.weight + 3.0 * b @ a).T
        assert torch.allclose(model(x), expected, rtol=1e-5, atol=1e-5)


def test_checkpointed_activations_give_the_same_gradients(nano):
    found = []
    for checkpointing in (False, True):
        model = load_model("nano").model
        if checkpointing:
            model.activation_checkpointing_enable()
        with adapted(model, settings(), draws()):
            model.train()
            training_loss(model, ids_for(model)).backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-8) for a, b in zip(*found, strict=True))


def test_an_exception_leaves_the_plain_model(nano):
    names = list(nano.model.state_dict())
    with pytest.raises(KeyboardInterrupt), adapted(nano.model, settings(), draws()):
        raise KeyboardInterrupt
    assert list(nano.model.state_dict()) == names
    assert all(p.requires_grad for p in nano.model.parameters())


def test_the_seed_decides_and_the_global_generator_is_left_alone(nano):
    starts = []
    for seed, outside in ((0, 1), (0, 2), (3, 1)):
        torch.manual_seed(outside)
        before = torch.get_rng_state()
        with adapted(nano.model, settings(), draws(seed)):
            starts.append(nano.model.gpt_neox.layers[0].attention.dense.lora_A.healing.weight)
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


def test_blocks_are_found_while_adapted(nano):
    with adapted(nano.model, settings(), draws()), block_outputs(nano.model) as outputs:
        nano.model(input_ids=torch.zeros(1, 4, dtype=torch.long))
        assert [tuple(h.shape) for h in outputs] == [(1, 4, 48)] * 4


def healed(windows, probe, **changes):
    loaded, config = load_model("nano"), settings(**changes)
    collapsed = probe.measure(loaded.model)
    order = named_generator(0, "sft")
    records = list(heal(loaded, config, windows, probe, collapsed, order))
    return loaded.model, records


def test_healing_measures_the_adapted_model_and_leaves_it_merged(windows, small_probe):
    model, records = healed(windows, small_probe)
    last = small_probe.measure(model)
    assert records[-1].measurement.loss == pytest.approx(last.loss, rel=1e-5)
    assert records[-1].measurement.loss != records[0].measurement.loss
    again, _ = healed(windows, small_probe)
    other, _ = healed(windows, small_probe, lora_rank=2)
    states = [m.state_dict() for m in (model, again, other)]
    assert all(torch.equal(states[1][k], v) for k, v in states[0].items())
    assert not all(torch.equal(states[2][k], v) for k, v in states[0].items())


def test_the_method_does_not_change_the_data_order(windows, small_probe):
    """The first loss is that of the same batch by the same model."""
    losses = [
        healed(windows, small_probe, healing_method=m, healing_steps=1)[1][-1].train_loss
        for m in ("full", "lora")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_the_control_takes_the_same_method(nano, windows):
    before = copy_of(nano.model)
    replay_healthy(nano, settings(), windows, named_generator(0, "sft"), 2)
    changed = {k for k, v in nano.model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {f"{name}.weight" for name in linear_layers(nano.model)}


def test_autocast_trains_adapters_in_float32(nano):
    config = settings(precision="bf16")
    with adapted(nano.model, config, draws()):
        trainer = train(nano.model, config, 1)
        held = trainer.optimizer.param_groups[0]["params"]
        assert {p.dtype for p in held} == {torch.float32}
        assert trainer.taken == 1


def test_adapters_get_ten_times_the_rate():
    for model in ("nano", "70m"):
        full = resolve_from_presets(HealConfig(model=model)).healing_lr
        assert (
            resolve_from_presets(HealConfig(model=model, healing_method="lora")).healing_lr
            == 10 * full
        )
    given = resolve_from_presets(HealConfig(model="nano", healing_method="lora", healing_lr=0.5))
    assert given.healing_lr == 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precision": "bf16", "precision_mode": "pure"}, "use --precision-mode autocast"),
        ({"healing_optimizer": "sgd"}, "give a number with --healing-optimizer sgd"),
        ({"healing_method": "dora"}, "--healing-method must be one of full, lora; got 'dora'"),
        ({"lora_rank": 0}, "--lora-rank must be at least 1 and at most"),
        ({"lora_alpha": 0.0}, "--lora-alpha must be above 0, got 0"),
    ],
)
def test_contradictions_are_named(changes, message):
    with pytest.raises(ConfigError, match=message):
        HealConfig(**({"model": "nano", "healing_method": "lora"} | changes))
    HealConfig(healing_method="lora", healing_optimizer="sgd", healing_lr=0.1)


def test_blocks_without_linear_layers_are_named():
    model = OneLayer()
    model.layers[0] = nn.LayerNorm(3)
    with (
        pytest.raises(ConfigError, match="the blocks of OneLayer hold no linear layer"),
        adapted(model, settings(), draws()),
    ):
        pass


def test_a_missing_library_is_one_line_before_anything_is_loaded(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    METHODS.load("full").check(settings(healing_method="full"))
    with pytest.raises(ConfigError, match=r"pip install 'llm-healing\[lora\]'"):
        check(settings())
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("."))
    arguments = ["--model", "nano", "--healing-method", "lora", "--arm", "none"]
    result = CliRunner().invoke(heal_command.main, arguments)
    assert result.exit_code == 1
    (line,) = [ln for ln in result.stderr.splitlines() if ln.startswith("error: ")]
    assert "needs the library peft" in line
    assert "llm-healing[lora]" in line


@pytest.mark.slow
def test_end_to_end(store):
    arguments = ["--model", "nano", "--sequence-length", "64", "--probe-tokens", "1024",
                 "--arm", "none", "--healing-steps", "2", "--healing-method", "lora",
                 "--lora-rank", "2", "--sham", "true", "--verbosity", "quiet"]  # fmt: skip
    result = CliRunner().invoke(heal_command.main, arguments)
    assert result.exit_code == 0, result.output
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    runs = client.search_runs([experiment], "tags.stage = 'heal'")
    # 4 blocks x 2 x ((48+144) + (48+48) + (48+192) + (192+48))
    assert {r.data.params["n_trainable_params"] for r in runs} == {"6144"}
    assert {r.data.params["heal.healing_method"] for r in runs} == {"lora"}
    assert {r.data.params["n_params"] for r in runs} == {"309792"}
    assert len(runs) == 2  # the run and its sham
    (path, *_) = sorted(store.rglob("checkpoint_post_healing.pt"))
    healed_state, plain = read_checkpoint(path).state, load_model("nano").model.state_dict()
    assert list(healed_state) == list(plain)
    changed = {k for k, v in healed_state.items() if not torch.equal(v, plain[k])}
    assert changed
    assert all(k.startswith("gpt_neox.layers") and k.endswith("weight") for k in changed)
