"""Predicted memory against bytes counted by hand, and the command that prints it."""

from __future__ import annotations

import pathlib

import mlflow
import pytest
import torch
from click.testing import CliRunner
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from entrypoints.attack import main as attack_command
from entrypoints.heal import main as heal_command
from healing.config import AttackConfig, HealConfig, resolve
from healing.experiment.dry_run import dry_run
from healing.footprint import Usage, shapes_only
from healing.memory import (
    ATTACKING,
    HEALING,
    LOADING,
    WATCHING,
    Prediction,
    predict_attack,
    predict_healing,
)
from healing.shapes import pythia_config

CPU = torch.device("cpu")
SHAPE = GPTNeoXConfig(
    vocab_size=997, hidden_size=64, num_hidden_layers=3, num_attention_heads=4,
    intermediate_size=256, use_cache=False,
)  # fmt: skip


def count(architecture: GPTNeoXConfig = SHAPE) -> tuple[int, int]:
    """Parameters and bytes of buffers of the real model."""
    model = GPTNeoXForCausalLM(architecture)
    return sum(p.numel() for p in model.parameters()), sum(b.nbytes for b in model.buffers())


def predicted(**changes) -> Prediction:
    settings = {"model": "nano", "probe_tokens": 1024, **changes}
    return predict_healing(resolve(HealConfig(**settings)), SHAPE, CPU)


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
    totals = {name: sum(kinds.values()) for name, kinds in usage.peaks.items()}
    assert totals == {"both": 6_000_000, "one": 4_000_000, "view": 4_000_000}


def test_adamw_healing_is_sixteen_bytes_per_parameter():
    n, buffers = count()
    found = predicted()
    assert found.n_params == found.n_trainable == n
    step = found.phases[HEALING]
    assert step["weights"] == 4 * n + buffers
    # Two moments and a float32 counter per tensor.
    assert 8 * n <= step["optimiser"] <= 8 * n + 4 * 100
    assert 0 < step["gradients"] <= 4 * n
    assert found.phases[WATCHING]["gradients"] == 0  # measuring has their room
    assert found.phases[LOADING]["copies"] == 4 * n + 4 * 997 * 64


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
    small, large = (predicted(batch_size=b).phases[HEALING]["activations"] for b in (4, 32))
    checkpointed = predicted(batch_size=32, gradient_checkpointing=True).phases[HEALING]
    # What grows does so with the tokens; a part (of the optimiser and the head) does not.
    assert 4 * small < large <= 8 * small
    assert checkpointed["activations"] < 0.6 * large


def test_whole_logits_only_where_the_models_own_loss_is_taken():
    """8,128 predicted tokens of 997 numbers: 16 MB in fp16, and as much again in float32 steps."""
    chunked = predicted(batch_size=64).phases[HEALING]["logits"]
    whole = predicted(batch_size=64, precision="fp16").phases[HEALING]["logits"]
    assert chunked < 7 * 512 * 997 * 4 < 64 * 127 * 997 * 2 <= whole


def test_attack_keeps_the_healthy_weights():
    n, _ = count()
    config = resolve(AttackConfig(model="nano", arm="random_tokens", probe_tokens=1024))
    found = predict_attack(config, SHAPE, CPU).phases[ATTACKING]
    assert 8 * n <= found["optimiser"] <= 8 * n + 4 * 100
    assert found["activations"] >= 4 * n  # the snapshot that ‖ΔW‖ is taken from


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
    found = predict_healing(resolve(HealConfig(model="1b")), pythia_config("1b"), CPU)
    assert 16.18e9 < found.tensor_bytes < 18e9  # 16 bytes per parameter are 16.19
    assert found.peak_bytes < 20e9


@pytest.mark.parametrize("command", [heal_command, attack_command])
def test_dry_run_prints_and_makes_no_run(command, store):
    done = CliRunner().invoke(command, ["--model", "nano", "--dry-run", "true"])
    assert done.exit_code == 0, done.output
    assert "predicted peak:" in done.output
    assert "309,792 parameters" in done.output
    assert not pathlib.Path("mlflow.db").exists()
    assert not pathlib.Path("experiments").exists()


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
