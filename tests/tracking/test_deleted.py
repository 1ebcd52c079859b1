"""Deleted experiments and runs: each message names a command, and MLflow's own CLI obeys it."""

from __future__ import annotations

import pathlib
import re
import shlex
from collections.abc import Callable

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.cli import cli as mlflow_command
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.import_results import ImportConfig
from healing.config.summarize import SummarizeConfig
from healing.errors import HealingError
from healing.predecessor.import_stage import import_results
from healing.stages.attack import attack
from healing.stages.heal import heal
from healing.stages.summarize import summarize
from healing.tracking import open_runs, queries, run_logger
from tests.legacy_folders import attack_rows, write_run

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "verbosity": "quiet"}  # fmt: skip


def mend(message: str) -> None:
    """Run the command that a message names."""
    (command,) = re.findall(r"`mlflow ([^`]+)`", message)
    done = CliRunner().invoke(mlflow_command, shlex.split(command))
    assert done.exit_code == 0, done.output


def told(work: Callable[[], object]) -> str:
    """What a refusal says; empty where there is none."""
    try:
        work()
    except HealingError as error:
        return str(error)
    return ""


@pytest.fixture
def gone(store) -> str:
    """Id of the deleted experiment ``gone``."""
    client = MlflowClient()
    client.create_experiment("another")
    experiment = str(client.create_experiment("gone"))
    client.delete_experiment(experiment)
    return experiment


def an_attack() -> None:
    attack(AttackConfig(**SMALL, arm="none"))


def an_import() -> None:
    root = pathlib.Path.cwd() / "records"
    if not root.exists():
        write_run(root / "scaling" / "run01_fp16", attack_rows(2.0, 2.5))
    import_results(ImportConfig(folder=str(root), verbosity="quiet"))


def a_start_in() -> None:
    with open_runs.start("a run", {}, experiment="gone"):
        pass


def check_and_mend(work: Callable[[], object], experiment: str, another: str) -> None:
    message = told(work)
    assert "deleted" in message
    assert f"experiments restore --experiment-id {experiment}`" in message
    assert another in message
    assert "\n" not in message
    assert "check MLFLOW_TRACKING_URI" not in message
    mend(message)
    assert told(work) == ""


@pytest.mark.slow
def test_an_attack_into_a_deleted_experiment(gone, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    check_and_mend(an_attack, gone, "set MLFLOW_EXPERIMENT_NAME to another")


@pytest.mark.slow
def test_an_import_into_a_deleted_experiment(gone, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "gone")
    check_and_mend(an_import, gone, "set MLFLOW_EXPERIMENT_NAME to another")


@pytest.mark.parametrize("variable", ["MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID"])
def test_a_run_into_a_deleted_experiment(gone, monkeypatch, variable):
    monkeypatch.setenv(variable, gone if variable.endswith("ID") else "gone")

    def start() -> None:
        with open_runs.start("a run", {}):
            pass

    check_and_mend(start, gone, "MLFLOW_EXPERIMENT_NAME")


def test_an_experiment_id_of_another_store(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "41")

    def start() -> None:
        with open_runs.start("a run", {}):
            pass

    message = told(start)
    assert message.startswith(f"MLFLOW_EXPERIMENT_ID is 41, which {mlflow.get_tracking_uri()} does")
    assert "unset it" in message


def test_start_in_a_deleted_experiment(gone):
    check_and_mend(a_start_in, gone, "to another")
    assert mlflow.active_run() is None


@pytest.mark.parametrize("name", ["gone", "its id"])
def test_a_summary_of_a_deleted_experiment(gone, name):
    config = SummarizeConfig(experiment=gone if name == "its id" else name, verbosity="quiet")
    message = told(lambda: summarize(config))
    assert f"experiment 'gone' is deleted in {mlflow.get_tracking_uri()}" in message
    assert "or name another" in message
    mend(message)
    after = told(lambda: summarize(config))
    assert after  # there are no runs in it
    assert "deleted" not in after


def test_children_of_an_experiment_that_is_deleted_meanwhile(store):
    parents = []

    def bear() -> None:
        with open_runs.start("parent", {}) as parent:
            parents.append(parent)
            MlflowClient().delete_experiment(parent.experiment_id)
            with open_runs.child(parent, "child", {}):
                pass

    message = told(bear)
    (parent,) = parents
    assert "run 'child' could not be stored" in message
    mend(message)
    with open_runs.child(parent, "child", {}) as child:
        pass
    assert MlflowClient().get_run(child.run_id).info.status == "FINISHED"


@pytest.fixture
def lost(store) -> str:
    """Id of a deleted run."""
    with open_runs.start("an attack", {"stage": "attack"}) as run:
        pass
    MlflowClient().delete_run(run.run_id)
    return run.run_id


@pytest.mark.parametrize("reader", ["get_run", "heal"])
def test_a_deleted_run_as_run_id(lost, reader):
    def read() -> None:
        if reader == "heal":
            heal(HealConfig(**SMALL, attack_run_id=lost))
        queries.get_run(lost)

    message = told(read)
    assert f"run {lost} is deleted in {mlflow.get_tracking_uri()}" in message
    mend(message)
    assert "is deleted" not in told(read)
    assert queries.get_run(lost).name == "an attack"


def test_a_run_that_is_none_is_not_called_deleted(lost):
    message = told(lambda: queries.get_run("0" * 32))
    assert message.startswith(f"no run {'0' * 32!r} in ")
    assert "deleted" not in message


def test_a_deleted_run_of_mlflow_run(lost, monkeypatch):
    def join() -> None:
        monkeypatch.setenv("MLFLOW_RUN_ID", lost)  # MLflow takes it out of the environment
        with open_runs.start("joins", {}) as run:
            assert run.run_id == lost

    message = told(join)
    assert f"run {lost} is deleted" in message
    mend(message)
    assert told(join) == ""


@pytest.mark.parametrize("what", ["metrics", "artifact", "data set"])
def test_a_run_that_is_deleted_while_it_writes(store, what):
    (store / "note.txt").write_text("x")

    def write(run: run_logger.RunLogger) -> None:
        if what == "metrics":
            run.recorded([(1, 0, {"loss": 1.0})])
        elif what == "artifact":
            run.artifact(store / "note.txt")
            run.tags({"a": "b"})  # MLflow takes files for deleted runs
        else:
            run.dataset("text", "d1", "probe", {})

    runs = []

    def a_run() -> None:
        with open_runs.start("a run", {}) as run:
            runs.append(run)
            MlflowClient().delete_run(run.run_id)
            write(run)

    message = told(a_run)
    (run,) = runs
    assert f"runs restore --run-id {run.run_id}" in message
    assert "the files written so far stay" in message
    mend(message)
    write(run)
