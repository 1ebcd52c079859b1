"""Predicted memory against bytes counted by hand, and the command that prints it."""

from __future__ import annotations

import pathlib
from dataclasses import replace
from types import SimpleNamespace

import mlflow
import pytest
import torch
from click.testing import CliRunner
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig

from entrypoints.attack import main as attack_command
from entrypoints.heal import main as heal_command
from healing.attacks import clean_hessian
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.curvature.stochastic_lanczos import rayleigh_percentile
from healing.errors import CorpusError
from healing.measurements.probe import Probe
from healing.models.architectures import pythia_config
from healing.stages.cells.attack import attack_cell
from healing.stages.cells.events import outcome_of
from healing.stages.dry_run import peak_memory
from healing.stages.dry_run import shapes_only as shapes_only_module
from healing.stages.dry_run.peak_memory import (
    ATTACKING,
    CHECKING,
    HEALING,
    LOADING,
    PREPARING,
    WATCHING,
    Prediction,
    predict_attack,
    predict_healing,
)
from healing.stages.dry_run.plan import attack_plan, heal_plan
from healing.stages.dry_run.shapes_only import shapes_only
from healing.stages.dry_run.stage import dry_run
from healing.stages.dry_run.tensor_bytes import Usage, peaks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
SHAPE = GPTNeoXConfig(
    vocab_size=997, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=256, use_cache=False,
)  # fmt: skip


def count(architecture: GPTNeoXConfig = SHAPE) -> tuple[int, int]:
    """Parameters and bytes of buffers of the real model."""
    model = GPTNeoXForCausalLM(architecture)
    return sum(p.numel() for p in model.parameters()), sum(b.nbytes for b in model.buffers())


def predicted(architecture: GPTNeoXConfig = SHAPE, **changes) -> Prediction:
    settings = {"model": "nano", "probe_tokens": 1024, **changes}
    return predict_healing(resolve_from_presets(HealConfig(**settings)), architecture, CPU)


def test_a_storage_counts_from_its_birth_to_its_end_once():
    with shapes_only(), Usage(vocabulary=10**9) as usage:
        with usage.phase("both"):
            a = torch.empty(1000, 1000)
            b = torch.empty(500, 1000)
            view = a[:10]
        del b
        with usage.phase("one"):
            view.add_(1)
        del a  # its storage lives in the view
        with usage.phase("view"):
            view.mul_(2)
    totals = {name: sum(kinds.values()) for name, kinds in peaks(usage.moments).items()}
    assert totals == {"both": 6_000_000, "one": 4_000_000, "view": 4_000_000}


@pytest.mark.parametrize("family", ["neox", "llama"])
def test_the_short_way_of_common_operations_counts_the_same(monkeypatch, family):
    shape = {"neox": SHAPE, "llama": LlamaConfig(
        vocab_size=997, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96,
    )}[family]  # fmt: skip
    attack = resolve_from_presets(
        AttackConfig(model="nano", probe_tokens=1024, curvature_tokens=256)
    )
    heal = resolve_from_presets(HealConfig(model="nano", probe_tokens=1024))
    ran = []
    plain = shapes_only_module._run_on_meta
    monkeypatch.setattr(
        shapes_only_module, "_run_on_meta", lambda *a: (ran.append(1), plain(*a))[1]
    )
    short = predict_attack(attack, shape, CPU).phases, predict_healing(heal, shape, CPU).phases
    assert len(ran) > 1000
    monkeypatch.setattr(shapes_only_module, "_PLAIN", set())
    assert short == (
        predict_attack(attack, shape, CPU).phases, predict_healing(heal, shape, CPU).phases
    )  # fmt: skip


def test_what_repeats_adds_nothing(monkeypatch):
    """All windows, candidates, draws and products that are left out, and the first diagnosis."""
    shape = LlamaConfig(
        vocab_size=97, hidden_size=320, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=480,
    )  # fmt: skip
    config = resolve_from_presets(
        AttackConfig(model="nano", probe_tokens=8192, curvature_tokens=256)
    )
    short = predict_attack(config, shape, CPU).phases
    monkeypatch.setattr(peak_memory, "_CHUNKS", 100)
    monkeypatch.setattr(peak_memory, "_one_product", rayleigh_percentile)
    monkeypatch.setattr(peak_memory, "_without_the_first_diagnosis", lambda arm: arm)
    whole = predict_attack(config, shape, CPU).phases
    for phase, kinds in whole.items():
        assert sum(short[phase].values()) == pytest.approx(sum(kinds.values()), rel=0.02), phase


def test_adamw_healing_is_sixteen_bytes_per_parameter():
    # Few tokens and a small vocabulary: the optimiser's step is the peak.
    architecture = GPTNeoXConfig(vocab_size=97, hidden_size=128, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=512, use_cache=False)  # fmt: skip
    n, buffers = count(architecture)
    found = predicted(architecture, batch_size=1, sequence_length=16, probe_tokens=64)
    assert found.n_params == found.n_trainable == n
    step = found.phases[HEALING]
    assert step["weights"] == 4 * n + buffers
    # Two moments and a float32 counter per tensor.
    assert 8 * n <= step["optimiser"] <= 8 * n + 4 * 100
    assert 0 < step["gradients"] <= 4 * n
    assert found.phases[WATCHING]["gradients"] == 0  # measuring has their room
    assert found.phases[LOADING]["copies"] == 4 * n + 4 * 512 * 128


def test_sgd_has_no_state_and_adapters_little():
    assert predicted(healing_optimizer="sgd", healing_lr=0.1).phases[HEALING]["optimiser"] == 0
    pytest.importorskip("peft", reason="LoRA needs peft: pip install 'llm-healing[lora]'")
    found, r = predicted(healing_method="lora", lora_rank=4), 4
    # Per block: query_key_value 64→192, dense 64→64, h_to_4h 64→256, 4h_to_h 256→64.
    trained = 3 * r * ((64 + 192) + (64 + 64) + (64 + 256) + (256 + 64))
    assert found.n_trainable == trained
    assert found.phases[HEALING]["optimiser"] == pytest.approx(8 * trained, abs=4 * 100)
    assert found.phases[HEALING]["gradients"] <= 4 * trained


def test_activations_grow_with_the_batch_and_shrink_with_checkpointing():
    small, large = (predicted(batch_size=b).phases[HEALING]["activations"] for b in (8, 64))
    checkpointed = predicted(batch_size=64, gradient_checkpointing=True).phases[HEALING]
    # What grows does so with the tokens; a part (of the optimiser and the head) does not.
    assert 4 * small < large < 9 * small
    assert checkpointed["activations"] < 0.6 * large


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_logits_are_there_a_chunk_at_a_time(precision):
    """512 of 4,064 predicted tokens; under autocast in both formats, with their gradients."""
    architecture = GPTNeoXConfig(vocab_size=20_011, hidden_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, use_cache=False)  # fmt: skip
    chunk = 512 * 20_011 * 4
    found = predicted(architecture, batch_size=32, precision=precision).phases[HEALING]["logits"]
    assert chunk <= found <= (1 if precision == "fp32" else 4) * chunk
    assert 4 * chunk < 32 * 127 * 20_011 * 4


def test_the_first_check_holds_no_more_than_a_step():
    phases = predicted(batch_size=64).phases
    assert sum(phases[CHECKING].values()) <= sum(phases[HEALING].values())
    assert phases[CHECKING]["logits"] <= 512 * 997 * 4


def test_attack_keeps_the_healthy_weights():
    n, _ = count()
    config = resolve_from_presets(
        AttackConfig(model="nano", arm="random_tokens", probe_tokens=1024)
    )
    found = predict_attack(config, SHAPE, CPU).phases[ATTACKING]
    assert 8 * n <= found["optimiser"] <= 8 * n + 4 * 100
    assert found["activations"] >= 4 * n  # the snapshot that ‖ΔW‖ is taken from


def test_an_attack_forms_nothing_else_of_the_models_size():
    """Weights, their healthy copy, gradients, two moments and the matrices before the step."""
    shape = GPTNeoXConfig(
        vocab_size=97, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
        intermediate_size=1024, use_cache=False,
    )  # fmt: skip
    n, buffers = count(shape)
    matrices = 4 * 12 * 256**2
    directions = 4 * (254 * (768 + 256 + 2 * 1024) + 2 * 4 * 256)
    config = resolve_from_presets(
        AttackConfig(
            model="nano",
            arm="haep",
            probe_tokens=64,
            sequence_length=32,
            rayleigh_draws=0,
            search_candidates=3,
            baseline_draws=3,  # a small batch
        )
    )
    found = predict_attack(config, shape, CPU)
    known = 4 * (5 * n + matrices + directions) + buffers
    largest = 4 * 4 * 256**2
    step = sum(found.phases[ATTACKING].values())
    assert known < step < known + 6 * largest
    # While the catalyst is searched for: weights and their copy, G, its derivative, their parts.
    search = sum(found.phases[PREPARING].values())
    assert search < 4 * (2 * n + directions + 3 * matrices)


def test_a_prediction_is_made_where_the_attack_itself_would_be_refused(monkeypatch):
    """A Lanczos basis larger than this machine's memory is what one asks about."""
    monkeypatch.setattr(clean_hessian, "LARGE", 1)
    nothing = SimpleNamespace(available=0)
    monkeypatch.setattr(clean_hessian.psutil, "virtual_memory", lambda: nothing)
    config = AttackConfig(model="nano", arm="random_tokens", subspace="hessian",
        hessian_directions=2, curvature_tokens=64, probe_tokens=64, sequence_length=32)  # fmt: skip
    found = predict_attack(resolve_from_presets(config), SHAPE, CPU)
    basis = 2 * (6 * 2 + 40) * 3 * 12 * 64**2
    assert sum(found.phases[PREPARING].values()) > basis


def test_an_accelerators_memory_does_not_hold_what_the_host_keeps():
    """The meta device in an accelerator's place (its fused AdamW is refused): the healthy copy and
    the matrices before the step are in the host's memory.
    """
    n, _ = count()
    matrices = 3 * 12 * 64**2
    # The shortest sequences: of so small a model a batch of them takes as much as the gradients.
    config = AttackConfig(model="nano", arm="random_tokens", attack_optimizer="sgd",
        probe_tokens=64, sequence_length=32, catalyst_length=8)  # fmt: skip
    on_cpu, beside = (
        sum(
            predict_attack(resolve_from_presets(config), SHAPE, torch.device(d))
            .phases[ATTACKING]
            .values()
        )
        for d in ("cpu", "meta")
    )
    assert on_cpu - beside == pytest.approx(4 * (n + matrices), rel=0.2)


@pytest.mark.parametrize(
    ("size", "parameters"),
    [
        ("70m", 70_426_624),
        ("160m", 162_322_944),
        ("410m", 405_334_016),
        ("1b", 1_011_781_632),
        ("1.4b", 1_414_647_808),
        ("2.8b", 2_775_208_960),
    ],
)
def test_shapes_of_pythia_have_its_published_parameters(size, parameters):
    with torch.device("meta"):
        model = GPTNeoXForCausalLM(pythia_config(size))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_full_healing_of_1b_fits_in_20_gigabytes():
    found = predict_healing(resolve_from_presets(HealConfig(model="1b")), pythia_config("1b"), CPU)
    assert 16.18e9 < found.tensor_bytes < 18e9  # 16 bytes per parameter are 16.19
    assert found.peak_bytes < 20e9


@pytest.mark.parametrize("command", [heal_command, attack_command])
def test_dry_run_prints_and_makes_no_run(command, store):
    pathlib.Path("mlflow.db").unlink()
    done = CliRunner().invoke(command, ["--model", "nano", "--dry-run", "true"])
    assert done.exit_code == 0, done.output
    assert "predicted peak:" in done.output
    assert "309,792 parameters" in done.output
    # 40 steps each measured, and both ends with standard errors; 309,792 float32 weights.
    assert "of at most 40 steps, 42 measurements of 4,096 tokens" in done.output
    assert "17 Hessian products on 1,024 tokens" in done.output
    assert "disk: 0.0012 GB for the checkpoint" in done.output
    assert ("500 steps of 1,024 tokens (512,000), 52 measurements" in done.output) == (
        command is heal_command
    )
    assert not pathlib.Path("mlflow.db").exists()
    assert not pathlib.Path("experiments").exists()


def test_the_plan_counts_what_a_run_measures(nano, corpus, monkeypatch):
    """Against the calls that a real attack makes."""
    config = resolve_from_presets(
        AttackConfig(
            model="nano",
            arm="random_text",
            attack_steps=5,
            measurement_interval=2,
            target_rank_reduction=1.0,
            probe_tokens=256,
        )
    )
    plain, calls = Probe.measure, []
    monkeypatch.setattr(Probe, "measure", lambda *a: (calls.append(1), plain(*a))[1])
    outcome_of(attack_cell(config))
    first, files, disk = attack_plan(config, 10**9)
    assert first.endswith("256 tokens; a step sees 16"), "one catalyst's length"
    named = [name for name in ("config.json", "metrics.jsonl", "spectra.json") if name in files]
    assert len(named) == 3
    assert f"at most 5 steps, {len(calls)} measurements of 256 tokens" in first
    assert disk == "  disk: 4 GB for the checkpoint"
    assert "at most 0 steps, 2 measure" in attack_plan(replace(config, arm="none"), 1)[0]


def test_the_plan_of_several_healings():
    several = {"model": "nano", "checkpoint_dir": "x", "runs_per_checkpoint": 2}
    config = resolve_from_presets(
        HealConfig(**several, sham=True, save_healed=False, healing_steps=25)
    )
    first, files, disk = heal_plan(config, 1)
    assert "checkpoints/" not in files
    assert "checkpoints/" in heal_plan(replace(config, save_healed=True), 1)[1]
    assert first.startswith("plan: 2 healing run(s) per checkpoint and as many of the sham, each")
    assert "25 steps of 1,024 tokens (25,600), 5 measurements" in first
    assert disk == "  disk: no weights are kept"


@pytest.mark.parametrize("config", [AttackConfig, HealConfig])
def test_a_text_that_is_not_there_is_refused_before_anything_is_predicted(store, config):
    with pytest.raises(CorpusError, match="no corpus '/nope'"):
        dry_run(config(model="nano", corpus="/nope"))


def test_in_a_pipe_a_dry_run_says_what_it_does(store, capfd):
    dry_run(HealConfig(model="nano", arm="random_tokens", time_steps="false"))
    said = capfd.readouterr().err
    for phase in ("reading the model's configuration", "the attack without numbers",
                  "healing without numbers"):  # fmt: skip
        assert phase in said
    dry_run(HealConfig(model="nano", arm="random_tokens", time_steps="false", verbosity="quiet"))
    assert "without numbers" not in capfd.readouterr().err


def test_dry_run_under_mlflow_run_logs_the_peak(store, monkeypatch):
    mlflow.set_experiment("dry")
    with mlflow.start_run() as run:
        pass
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    found = dry_run(AttackConfig(model="nano", arm="random_tokens"))["attack"]
    stored = mlflow.MlflowClient().get_run(run.info.run_id)
    # The process grows between the two readings of its resident memory only if it predicts again.
    assert stored.data.metrics["summary/predicted_peak_bytes"] == found.peak_bytes
    assert stored.info.status == "FINISHED"


def test_dry_run_names_what_is_wrong_in_one_line(store):
    done = CliRunner().invoke(
        heal_command, ["--collapsed-checkpoint", "no.pt", "--dry-run", "true"]
    )
    assert done.exit_code == 1
    assert "no checkpoint at" in done.output
