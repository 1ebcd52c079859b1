"""All commands under one name: their list, the layout of ``--help``, what is said of downloads."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
import urllib.request

import mlflow
import pytest
from click.testing import CliRunner

from entrypoints import __main__ as commands
from entrypoints._help import EXAMPLES, GROUPS, LISTS
from entrypoints._mlproject import render
from entrypoints._stages import STAGES
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.options import fields_of
from healing.config.sweep import SweepConfig
from healing.errors import ModelError, TrackingError
from healing.registry import ARMS
from healing.stages.terminal import downloads
from healing.tracking.ui import server
from tests.conftest import ROOT


def invoke(*arguments: str):
    return CliRunner().invoke(commands.main, list(arguments))


def options_shown(name: str) -> str:
    """What ``--help`` says after its first paragraphs, which name options too."""
    output = invoke(name, "--help").output
    return output[re.search(r"^\S.*:$", output, re.MULTILINE).start() :]


def test_the_list_has_every_entry_point_with_one_clause():
    result = invoke()
    assert result.exit_code == 0
    listed = re.findall(r"^  (\w+) {2,}\S", result.output.partition("Commands:")[2], re.MULTILINE)
    assert listed == [*STAGES, "ui", "sync"]
    files = {p.stem for p in (ROOT / "entrypoints").glob("[a-z]*.py")}
    assert set(listed) == files
    for name in listed:
        clause = commands.clause(name)
        assert clause.endswith("."), name
        assert clause.count(". ") == 0, name
        assert len(clause) < 110, name


def test_it_runs_each_of_them():
    assert "--attack-run-id" in invoke("heal", "--help").output
    assert "--folder" in invoke("import-results", "--help").output
    assert invoke("hael").exit_code == 2
    bad = invoke("heal", "--healing-steps", "-1")
    assert (bad.exit_code, "--healing-steps must be at least 0" in bad.output) == (2, True)


def test_the_console_script_is_this():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["llm-healing"].partition(":")
    assert getattr(importlib.import_module(module), name) is commands.main
    assert "  ui:" not in render()  # it computes nothing: no entry point of MLflow's


@pytest.mark.parametrize("name", STAGES)
def test_options_are_in_groups_each_once(name):
    output = options_shown(name)
    shown = re.findall(r"^  --([a-z-]+)", output, re.MULTILINE)
    wanted = {field.name.replace("_", "-") for field, _, _ in fields_of(STAGES[name].config)}
    assert sorted(shown) == sorted({*wanted, "help"})
    titles = re.findall(r"^(\S.*):$", output, re.MULTILINE)
    assert titles[0] == "What to run" or name in ("pretrain",)
    lists = [title for title in LISTS if title in titles]
    assert titles[-len(lists) - 1 :] == [*lists, "Examples"]
    last = re.findall(r"^  --([a-z-]+)", output, re.MULTILINE)[-1]
    assert last == "help"
    assert not re.search(r":\n  --help", output)  # no group for itself


def test_the_most_used_option_comes_first():
    for name, first in (("heal", "model"), ("attack", "model"), ("main", "models")):
        output = options_shown(name)
        assert re.search(r"^  --([a-z-]+)", output, re.MULTILINE)[1] == first
    names = [name for group in GROUPS.values() for name in group.split()]
    assert len(names) == len(set(names))


def test_each_arm_has_its_clause_in_a_list_where_arms_are_chosen():
    for name, option in (("attack", "arm"), ("heal", "arm"), ("main", "arms"), ("main", "ray-of")):
        output = invoke(name, "--help").output
        shown, _, listed = output.partition("\nArms:\n")
        assert re.search(rf"^  --{option} (ARM|TEXT) ", shown, re.MULTILINE), (name, option)
        for facts in ARMS.all_facts():
            assert facts.help not in " ".join(shown.split())  # not in an option's text
            entry = rf"^  {facts.name} +{re.escape(facts.help[:40])}"
            assert re.search(entry, listed, re.MULTILINE), (name, facts.name)


def test_no_line_of_a_help_is_wider_than_a_terminal():
    for name in STAGES:
        for line in invoke(name, "--help").output.partition("Examples:")[0].splitlines():
            assert len(line) <= 80, (name, line)


def test_what_means_the_same_stands_below_what_it_is_the_same_as():
    shown = re.findall(r"^  --([a-z-]+)", options_shown("attack"), re.MULTILINE)
    for option in ("reference", "direction"):
        assert shown.index(f"{option}-checkpoint") + 1 == shown.index(f"{option}-run-id")


@pytest.mark.parametrize("text", [t for texts in EXAMPLES.values() for t in texts])
def test_examples_are_commands_that_need_no_download(text):
    name, *arguments = shlex.split(text)
    command = commands.Commands().get_command(None, name)
    context = command.make_context(name, arguments)
    config = STAGES[name].config(**context.params)
    assert list(downloads.downloads(config)) == []
    shown = " ".join(invoke(name, "--help").output.split())
    assert f"python -m entrypoints.{text}" in shown


def test_a_download_is_said_with_its_size(monkeypatch):
    sizes = {"nano": 0, "micro": 0, "1b": 2_090_000_000, "70m": 166_000_000, "own/model": None}
    monkeypatch.setattr(downloads, "bytes_to_fetch", lambda name, *_: sizes[name])
    model, text = downloads.downloads(AttackConfig())
    assert model.startswith("downloading model 1b (2.1 GB) from the Hugging Face Hub")
    assert "Pile" in text
    assert [*downloads.downloads(HealConfig())] == [model, text]  # auto stands for 1b
    assert [*downloads.downloads(HealConfig(attack_run_id="a"))] == []
    assert [*downloads.downloads(AttackConfig(dry_run=True))] == []
    assert [*downloads.downloads(AttackConfig(model="nano"))] == []
    (line,) = downloads.downloads(AttackConfig(model="own/model", corpus="stdlib"))
    assert "own/model (size unknown)" in line
    (first, _) = downloads.downloads(SweepConfig(models="nano,70m", seeds="0"))
    assert "model 70m (166.0 MB)" in first


def test_what_cannot_be_told_is_left_to_the_command(monkeypatch):
    def absent(*_: object) -> int:
        raise ModelError("no such model")

    monkeypatch.setattr(downloads, "bytes_to_fetch", absent)
    assert [*downloads.downloads(AttackConfig())] == []


def test_a_port_is_free_or_refused():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TrackingError, match=f"port {port} is taken: give another --port"):
            server.choose_port(port)
    assert server.choose_port() > 0


def test_ui_without_an_experiment_says_so(store):
    result = invoke("ui")
    assert result.exit_code == 1
    assert "no experiment 'llm-healing'" in result.output


@pytest.mark.slow
def test_ui_prints_last_what_opens_the_runs(store):
    mlflow.set_experiment("mine")
    command = [sys.executable, "-m", "entrypoints", "ui", "--experiment", "mine"]
    uri = os.environ["MLFLOW_TRACKING_URI"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri}
    with subprocess.Popen(
        command, cwd=store, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    ) as started:  # fmt: skip
        lines = [started.stdout.readline() for _ in range(2)]
        address, _, page = lines[-1].strip().partition("/#")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", address), lines
        assert "workflowType=machine_learning" in page
        with urllib.request.urlopen(f"{address}/health", timeout=10) as answer:
            assert answer.status == 200
        time.sleep(1)
        started.send_signal(signal.SIGTERM)
        rest = started.communicate(timeout=30)[0]
    assert rest.strip() == ""  # nothing pushes the address off the terminal
    assert started.returncode == 0
    with pytest.raises(OSError, match=r"refused"):
        urllib.request.urlopen(f"{address}/health", timeout=2)
