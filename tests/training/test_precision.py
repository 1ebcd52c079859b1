"""Formats, conversions and the first number that is not finite, where the answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.measurements.diagnosis import GRADIENT
from healing.measurements.probe import Probe
from healing.models.loading import load_model
from healing.randomness import named_generator
from healing.stages.cells import inputs
from healing.stages.cells.inputs import resolve_from_model
from healing.training.healing_loop import heal, replay_healthy
from healing.training.nonfinite import (
    diagnose,
    failure_before_training,
    first_nonfinite_parameter,
    forward_failure,
    nonfinite_gradients,
    nonfinite_outputs,
)
from healing.training.precision import Precision, gradient_norm
from healing.training.trainer import MAX_CONSECUTIVE_NONFINITE_STEPS, Trainer

IDS = torch.zeros(1, 4, dtype=torch.int64)


class Scale(nn.Module):
    """Multiplies by one weight."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


class Chain(nn.Module):
    """Embeds every token as `start`, scales it block by block; loss by a function of the result."""

    def __init__(self, *factors: float, start: float = 1.0, loss=torch.sum) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.tensor(start))
        self.blocks = nn.ModuleList(nn.Sequential(Scale(f)) for f in factors)
        self.loss = loss

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None):
        h = self.start * torch.ones(*input_ids.shape, 2)
        for block in self.blocks:
            h = block(h)
        return SimpleNamespace(loss=self.loss(h), logits=h)


def hooks(model: nn.Module) -> int:
    own = sum(len(m._forward_hooks) for m in model.modules())
    return own + sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())


def test_first_module_is_the_innermost_of_the_first_that_overflows():
    model = Chain(1e30, 1e30, 1e30)  # 1e30, then inf, then inf
    with nonfinite_outputs(model) as found:
        model(IDS)
    assert found == ["blocks.1.0", "blocks.1", "blocks.2.0", "blocks.2"]
    failure = diagnose(model, IDS, step=7)
    assert (failure.step, failure.origin, failure.module) == (7, "forward", "blocks.1.0")
    assert forward_failure(model, IDS) == "blocks.1.0"
    assert forward_failure(Chain(2.0), IDS) == ""


def test_a_loss_that_overflows_by_itself_is_the_loss():
    failure = diagnose(Chain(1e30, loss=lambda h: h.square().sum()), IDS, step=1)
    assert (failure.origin, failure.module) == ("forward", "loss")


def test_outputs_within_containers_are_seen():
    class Pair(nn.Module):
        def forward(self, x):
            return {"a": (x, [x / 0.0]), "n": None, "i": torch.tensor([1])}

    model = nn.Sequential(Pair())
    with nonfinite_outputs(model) as found:
        model(torch.ones(1))
    assert found == ["0"]


def test_first_gradient_is_the_first_of_the_backward_pass():
    """loss = √(f₂·√(f₁·h)) at f₁ = 0: the outer root's slope is infinite, so f₂ fails first."""

    class Roots(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Parameter(torch.tensor(3.0))  # registered first, used last
            self.early = nn.Parameter(torch.tensor(0.0))
            self.fine = nn.Parameter(torch.tensor(2.0))

        def forward(self, input_ids, labels=None):
            inner = (self.early * input_ids.float().sum().exp()).sqrt()
            return SimpleNamespace(loss=(self.late * inner).sqrt() + self.fine)

    model = Roots()
    assert math.isfinite(float(model(IDS).loss.detach()))
    failure = diagnose(model, IDS, step=2)
    assert (failure.origin, failure.module) == ("gradient", "late")
    with nonfinite_gradients(model) as found:
        model(IDS).loss.backward()
    assert found == ["late", "early"]


def test_an_infinite_output_that_nothing_uses_is_no_failure():
    class Unused(Chain):
        def forward(self, input_ids, labels=None):
            self.blocks[1](torch.full((1,), 1e30))
            h = self.blocks[0](torch.ones(2))
            return SimpleNamespace(loss=h.sum())

    assert diagnose(Unused(2.0, 1e30), IDS, step=1) is None


def test_a_norm_that_overflows_with_finite_gradients_is_a_gradient_failure():
    model = Chain(1.0, loss=lambda h: 1e25 * h.sum())
    failure = diagnose(model, IDS, step=1)
    assert (failure.origin, failure.module) == ("gradient", "gradient norm")


def test_diagnosing_leaves_no_gradient_hook_or_mode_behind(monkeypatch):
    model = Chain(1.0, 2.0).eval()
    assert diagnose(model, IDS, step=1) is None
    assert hooks(model) == 0
    assert not model.training
    assert all(p.grad is None for p in model.parameters())

    def broken(_):
        raise RuntimeError("no")

    model.loss = broken
    with pytest.raises(RuntimeError, match="no"):
        diagnose(model, IDS, step=1)
    assert hooks(model) == 0
    assert not model.training


def test_first_nonfinite_parameter():
    model = Chain(1.0, math.inf, math.nan)
    assert first_nonfinite_parameter(model) == "blocks.1.0.factor"
    assert first_nonfinite_parameter(Chain(1.0)) == ""


def test_auto_is_bf16_on_an_accelerator_and_fp32_on_the_cpu(monkeypatch):
    config = HealConfig(model="nano")
    assert config.precision == "auto"
    assert resolve_from_presets(config).precision == resolve_from_model(config).precision == "fp32"
    assert resolve_from_presets(config, accelerated=True).precision == "bf16"
    monkeypatch.setattr(inputs, "resolve_device", lambda _: torch.device("cuda"))
    for native, chosen in ((True, "bf16"), (False, "fp32")):
        # Asked with emulation every card says yes.
        has = lambda including_emulation=True, own=native: own or including_emulation  # noqa: E731
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", has)
        assert resolve_from_model(config).precision == chosen
    assert resolve_from_model(HealConfig(model="nano", precision="fp16")).precision == "fp16"


@pytest.mark.parametrize(("name", "largest"), [("fp16", 65504.0), ("bf16", 3.3895313892515355e38)])
def test_headroom_is_the_largest_entry_over_the_formats_largest_number(name, largest):
    assert Precision(name).largest == largest
    found = Precision(name).headroom([6.0, 600.0, math.inf, math.nan])
    assert found[:2] == pytest.approx((6.0 / largest, 600.0 / largest), rel=1e-12)
    assert found[2] == math.inf
    assert math.isnan(found[3])


def test_peaks_count_first_tokens(nano, probe):
    """Of nano, against its hidden states as transformers returns them."""
    found = probe.measure(nano.model).peaks
    with torch.no_grad():
        out = nano.model.gpt_neox(input_ids=probe.windows, output_hidden_states=True)
    # The last of transformers' hidden states is after the final norm, hence not a block's output.
    expected = [float(h.abs().max()) for h in out.hidden_states[1:-1]]
    assert found[:-1] == pytest.approx(expected)
    assert len(found) == 4


def test_pure_weights_are_rounded_and_stay_so_and_buffers_are_left_alone(nano):
    model = nano.model
    before = {k: v.clone() for k, v in model.state_dict().items()}
    frequencies = model.gpt_neox.rotary_emb.inv_freq.clone()
    precision = Precision("fp16", "pure")
    with precision.weights(model):
        assert {p.dtype for p in model.parameters()} == {torch.float16}
        with precision.measuring(model):
            assert {p.dtype for p in model.parameters()} == {torch.float32}
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name].half())
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name].half().float())
    assert torch.equal(model.gpt_neox.rotary_emb.inv_freq, frequencies)
    with pytest.raises(RuntimeError), precision.weights(model):
        raise RuntimeError
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", [Precision(), Precision("bf16"), Precision("fp32", "pure")])
def test_master_weights_are_not_touched(nano, precision):
    before = [p.data_ptr() for p in nano.model.parameters()]
    with precision.weights(nano.model), precision.measuring(nano.model):
        assert [p.data_ptr() for p in nano.model.parameters()] == before


def test_names():
    names = {
        Precision("fp32", "pure"): "fp32", Precision("fp32"): "fp32",
        Precision("bf16"): "bf16 autocast", Precision("fp16", "pure"): "pure fp16",
    }  # fmt: skip
    assert {p: str(p) for p in names} == names


def test_gradient_norm_in_half_precision_does_not_overflow():
    model = nn.ParameterList([nn.Parameter(torch.zeros(1, dtype=torch.float16)) for _ in range(2)])
    for parameter in model:
        parameter.grad = torch.full((1,), 60000.0, dtype=torch.float16)
    # fp16 rounds 60,000 to 59,968 or 60,000 (spacing 32): it is representable.
    assert float(gradient_norm(model, 0.0)) == pytest.approx(60000.0 * math.sqrt(2), rel=1e-6)
    assert float(model[0].grad) == 60000.0
    gradient_norm(model, 1.0)
    assert float(model[0].grad) == pytest.approx(1 / math.sqrt(2), rel=1e-3)


# Training in low precision


def settings(**changes) -> HealConfig:
    values = {"model": "nano", "healing_steps": 8, "measurement_interval": 4, "batch_size": 4,
              "sequence_length": 64}  # fmt: skip
    return resolve_from_presets(HealConfig(**(values | changes)))


@pytest.fixture
def windows(corpus, nano):
    return corpus.windows("train", nano.tokenizer, 64)


@pytest.fixture
def small_probe(probe) -> Probe:
    return Probe(probe.windows[:4])


def damaged(loaded):
    """Weights with noise of half their standard deviation: loss 7.2 instead of 3.0."""
    generator = named_generator(0, "damage")
    with torch.no_grad():
        for p in loaded.model.parameters():
            if p.ndim == 2:
                p += 0.5 * p.std() * torch.randn(p.shape, generator=generator)
    return loaded


def run(loaded, windows, probe, config):
    measured = probe.measure(loaded.model)
    return list(heal(loaded, config, windows, probe, measured, named_generator(0, "sft")))


@pytest.mark.parametrize(
    ("precision", "mode"), [("bf16", "pure"), ("bf16", "autocast"), ("fp16", "autocast")]
)
def test_low_precision_heals(nano, windows, small_probe, precision, mode):
    config = settings(precision=precision, precision_mode=mode)
    records = run(damaged(nano), windows, small_probe, config)
    assert records[-1].measurement.loss < records[0].measurement.loss - 0.2
    assert not records[-1].stalled
    assert records[-1].failure is None
    assert {p.dtype for p in nano.model.parameters()} == {torch.float32}
    exact = run(damaged(load_model("nano")), windows, small_probe, settings())
    # bf16 has 8 bits: the same path to about 1 %, and not the same bits.
    assert records[-1].measurement.loss == pytest.approx(exact[-1].measurement.loss, rel=0.02)
    assert records[-1].measurement.loss != exact[-1].measurement.loss


def test_measuring_does_not_disturb_pure_training(nano, windows, small_probe):
    """The same weights, bit for bit, as a bare bf16 loop that is never measured."""
    config = settings(precision="bf16", precision_mode="pure", measurement_interval=1)
    run(nano, windows, small_probe, config)
    bare = load_model("nano").model
    for parameter in bare.parameters():
        parameter.data = parameter.data.bfloat16()
    optimizer = torch.optim.AdamW(bare.parameters(), lr=1e-3, weight_decay=0.0)
    order = torch.randperm(len(windows), generator=named_generator(0, "sft"))
    for step in range(8):
        ids = windows[order[4 * step : 4 * step + 4]]
        optimizer.zero_grad()
        bare(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    for mine, theirs in zip(nano.model.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, theirs.float())


def test_pure_fp16_adamw_breaks_a_healthy_model_where_arithmetic_says_so(nano, windows):
    """v = (1 − β₂)g² rounds to 0 where |g| is under about 5e-3, and ε = 1e-8 is 0 in fp16: such
    weights move by m/0, those without gradient by 0/0."""
    assert float(torch.tensor(1e-8, dtype=torch.float16)) == 0.0
    config = settings(precision="fp16", precision_mode="pure")
    with Precision("fp16", "pure").weights(nano.model):
        trainer = Trainer(nano.model, config)
        gradients = {}
        for parameter in nano.model.parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p: gradients.update({p: p.grad.double()})
            )
        loss, norm = trainer.step(windows[:4])
        assert math.isfinite(loss)
        assert math.isfinite(norm)
        assert trainer.failure.origin == "update"
        assert trainer.failure.module == next(n for n, _ in nano.model.named_parameters())
        assert trainer.must_stop
        for parameter in nano.model.parameters():
            g = gradients[parameter]
            v_is_zero = (0.001 * g * g).half() == 0
            assert torch.equal(~torch.isfinite(parameter), v_is_zero)
            assert bool(torch.isnan(parameter[g == 0]).all())
        assert int(sum((g == 0).sum() for g in gradients.values())) > 1000


def test_pure_fp16_adamw_heals_with_an_epsilon_that_fp16_has(nano, windows):
    config = settings(precision="fp16", precision_mode="pure")
    with Precision("fp16", "pure").weights(damaged(nano).model):
        optimizer = torch.optim.AdamW(nano.model.parameters(), 1e-3, weight_decay=0.0, eps=1e-4)
        trainer = Trainer(nano.model, config, optimizer)
        losses = [trainer.step(windows[:4])[0] for _ in range(12)]
    assert trainer.failure is None
    assert trainer.taken == 12
    assert losses[-1] < losses[0] - 0.2


def test_a_broken_update_ends_the_run_at_once(nano, windows, small_probe):
    config = settings(precision="fp16", precision_mode="pure")
    records = run(nano, windows, small_probe, config)
    assert [r.step for r in records] == [0, 1]
    assert records[1].stalled
    assert (records[1].failure.step, records[1].failure.origin) == (1, "update")
    assert math.isnan(records[1].measurement.effective_rank)
    assert records[1].nonfinite_steps == 0  # the step was taken: it is what broke the weights


def test_steps_that_the_scaler_skips_are_counted_and_change_nothing(nano, windows):
    trainer = Trainer(nano.model, settings(precision="fp16"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = [p.clone() for p in nano.model.parameters()]
    for _ in range(MAX_CONSECUTIVE_NONFINITE_STEPS + 2):
        trainer.step(windows[:2])
    assert trainer.scaler_skipped == MAX_CONSECUTIVE_NONFINITE_STEPS + 2
    assert trainer.nonfinite == trainer.taken == 0
    assert all(map(torch.equal, before, nano.model.parameters()))
    assert not trainer.must_stop  # the scale is still being looked for
    assert trainer.stalled  # but nothing has been trained
    assert trainer.failure is None
    assert trainer.first_failure.origin == "gradient"
    assert trainer.first_failure.step == 1
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.step(windows[:2])
    assert trainer.taken == 1
    assert not trainer.stalled
    assert trainer.first_failure is None


class Steep(nn.Module):
    """The output (3,000) fits fp16, the gradient of `layer` does not, at any scale tried here."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.layer.weight, 0.1)

    def forward(self, input_ids, labels=None):
        out = self.layer(torch.full((1, 1), 3e4))
        return SimpleNamespace(loss=1e9 * out.float().sum())


def test_a_gradient_that_overflows_at_scale_one_is_not_the_scalers_matter():
    model = Steep()
    trainer = Trainer(model, settings(precision="fp16"))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for _ in range(2 + MAX_CONSECUTIVE_NONFINITE_STEPS):
        assert not trainer.must_stop
        trainer.step(IDS)
    assert trainer.scaler_skipped == 2  # at 4 and 2
    assert trainer.nonfinite == MAX_CONSECUTIVE_NONFINITE_STEPS
    assert trainer.must_stop
    assert (trainer.failure.step, trainer.failure.module) == (3, "layer.weight")
    assert diagnose(Steep(), IDS, step=1) is None  # in fp32 there is nothing wrong


def test_control_stops_at_its_first_failure(nano, windows, monkeypatch):
    config, calls, step = settings(precision="fp16", precision_mode="pure"), [], Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, ids: (calls.append(1), step(self, ids))[1])
    control = replay_healthy(nano, config, windows, named_generator(0, "sft"), 5)
    assert len(calls) == 1
    assert (control.steps, control.failure.step, control.origin) == (5, 1, "update")
    fine = replay_healthy(load_model("nano"), settings(), windows, named_generator(0, "sft"), 2)
    assert (fine.steps, fine.failure, fine.origin) == (2, None, "none")


def test_a_gradient_that_float32_cannot_hold_is_found_before_the_first_step(nano, probe):
    """Logits as before, from states 1e30 times as large: only the gradient's norm overflows."""
    batch, windows = probe.windows[:4], probe.windows
    assert failure_before_training(nano.model, batch, windows) is None
    norm = nano.model.gpt_neox.final_layer_norm
    with torch.no_grad():
        norm.weight *= 1e30
        norm.bias *= 1e30
        nano.model.get_output_embeddings().weight *= 1e-30
    measured = probe.measure(nano.model)
    assert measured.nonfinite_tokens == 0
    found = failure_before_training(nano.model, batch, windows)
    assert found is not None
    assert found.origin == GRADIENT
