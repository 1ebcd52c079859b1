"""The commands as a stranger meets them: help, one clear line for bad input, exit codes."""

from __future__ import annotations

import pathlib

import pytest
import torch
from click.testing import CliRunner, Result
from mlflow.tracking import MlflowClient

from entrypoints import attack, basin, heal, import_results, main, pretrain, summarize, tune
from healing.models.checkpoints import CHECKPOINT_NAME, save_checkpoint
from healing.models.loading import load_model

COMMANDS = {
    "attack": attack.main,
    "basin": basin.main,
    "heal": heal.main,
    "import_results": import_results.main,
    "main": main.main,
    "pretrain": pretrain.main,
    "summarize": summarize.main,
    "tune": tune.main,
}
SMALL = ["--model", "nano", "--sequence-length", "64", "--probe-tokens", "1024"]


def invoke(name: str, *arguments: str) -> Result:
    return CliRunner().invoke(COMMANDS[name], list(arguments))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option(name):
    result = invoke(name, "--help")
    assert result.exit_code == 0
    for parameter in COMMANDS[name].params:
        assert parameter.help, parameter.name
        assert max(parameter.opts, key=len) in result.output


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("heal", ["--model", "giga"], "unknown model 'giga': choose one of nano, micro, 70m"),
        ("heal", ["--healing-steps", "-5"], "--healing-steps must be at least 0, got -5"),
        ("heal", ["--healing-steps", "many"], "'many' is neither a whole number nor 'auto'"),
        ("heal", ["--healing-lr", "fast"], "'fast' is neither a number nor 'auto'"),
        ("heal", ["--healing-optimizer", "lion"], "'lion' is not one of 'adamw', 'sgd'"),
        ("attack", ["--target-rank-reduction", "1.5"], "must be above 0 and at most 1, got 1.5"),
        ("main", ["--arms", "haep,magic"], "--arms: unknown magic; choose from haep"),
        ("main", ["--seeds", "a"], "--seeds must be whole numbers"),
        ("summarize", ["--confidence", "2"], "--confidence must be at least 0.5"),
        ("tune", ["--axes", "rate,magic"], "--axes: unknown magic; choose from rate, optimizer"),
        ("tune", ["--token-budget", "1000"], "does not make 5 rungs of whole steps"),
        ("pretrain", ["--learning-rate", "0"], "--learning-rate must be above 0, got 0"),
    ],
)
def test_bad_parameters_end_before_anything_starts(
    store, empty_database, command, arguments, message
):
    result = invoke(command, *arguments)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert (store / "mlflow.db").read_bytes() == empty_database.read_bytes()


def test_bad_parameters_are_tagged_on_the_run_that_mlflow_made(store, monkeypatch):
    client = MlflowClient()
    run = client.create_run(client.create_experiment("e"))
    monkeypatch.setenv("MLFLOW_RUN_ID", run.info.run_id)
    assert invoke("heal", "--healing-steps", "-1").exit_code == 2
    tags = client.get_run(run.info.run_id).data.tags
    assert tags["failure"] == "--healing-steps must be at least 0, got -1"


def failed_run() -> tuple[str, str]:
    client = MlflowClient()
    experiment = client.get_experiment_by_name("llm-healing").experiment_id
    (run,) = client.search_runs([experiment])
    return run.info.status, run.data.tags["failure"]


def write_empty(folder: pathlib.Path) -> str:
    (folder / "empty").mkdir()
    return str(folder / "empty")


def write_other_architecture(folder: pathlib.Path) -> str:
    path = folder / "other.pt"
    save_checkpoint(path, torch.nn.Linear(3, 3), 0, "", {})
    return str(path)


def write_micro(folder: pathlib.Path) -> str:
    path = folder / "micro.pt"
    save_checkpoint(path, load_model("micro").model, 0, "", {"model": "micro"})
    return str(path)


def write_small_corpus(folder: pathlib.Path) -> str:
    path = folder / "small.txt"
    path.write_text("\n\n".join(f"paragraph {i}" for i in range(100)))
    return str(path)


@pytest.mark.parametrize(
    ("option", "make", "message"),
    [
        ("--collapsed-checkpoint", lambda f: str(f / "no.pt"), "no checkpoint at"),
        ("--collapsed-checkpoint", write_other_architecture, "is not a checkpoint of model nano"),
        ("--collapsed-checkpoint", write_micro, "of model micro, --model says nano"),
        (
            "--collapsed-checkpoint",
            lambda _: "runs:/abc/none.pt",
            "runs:/abc/none.pt cannot be had",
        ),
        ("--checkpoint-dir", write_empty, f"no {CHECKPOINT_NAME} below"),
        ("--checkpoint-dir", lambda f: str(f / "no"), "is not a folder"),
        ("--attack-run-id", lambda _: "0" * 32, "no run '0000"),
        ("--corpus", write_small_corpus, "where 1024 are needed"),
        ("--corpus", lambda _: "/no/such/file.txt", "use --corpus stdlib"),
        ("--device", lambda _: "warp", "--device warp cannot be used here"),
    ],
)
def test_bad_input_is_one_line_and_a_failed_run_with_its_reason(store, option, make, message):
    result = invoke("heal", *SMALL, "--healing-steps", "2", option, make(store))
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    (line,) = [ln for ln in result.stderr.splitlines() if ln.startswith("error: ")]
    assert message in line
    runs = MlflowClient().search_runs(
        [MlflowClient().get_experiment_by_name("llm-healing").experiment_id]
    )
    failures = [r.data.tags.get("failure", "") for r in runs]
    assert any(message in failure for failure in failures)
    assert {r.info.status for r in runs} == {"FAILED"}


def test_unreachable_hub_is_one_line(store, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    result = invoke("attack", "--model", "70m", "--corpus", "stdlib")
    assert result.exit_code == 1
    assert "model EleutherAI/pythia-70m is not in the cache" in result.stderr
    status, failure = failed_run()
    assert status == "FAILED"
    assert "--model nano or micro" in failure


@pytest.mark.slow
def test_quiet_prints_nothing(store):
    arguments = [*SMALL, "--arm", "none", "--healing-steps", "1", "--verbosity", "quiet"]
    result = invoke("heal", *arguments)
    assert result.exit_code == 0
    assert result.stdout == ""


def test_normal_prints_the_verdict_and_the_folder(store):
    result = invoke("heal", *SMALL, "--arm", "none", "--healing-steps", "1")
    assert result.exit_code == 0
    assert "undefined" in result.stdout
    assert str(store / "experiments") in result.stdout


@pytest.mark.slow
def test_pretrain_writes_a_model_folder(store):
    result = invoke(
        "pretrain", "--tokens-per-parameter", "0.05", "--batch-size", "4", "--output-dir", "out",
        "--verbosity", "quiet",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    names = {p.name for p in (store / "out" / "nano").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "training_record.json",
            "loss_curve.png"} <= names  # fmt: skip
