"""Signals to whole commands: how they end, what is kept, and going on from there."""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.stages.attack import attack
from healing.stages.cells.state_classes import STATE_CLASSES
from healing.stages.heal import heal
from healing.tracking.run_files import read_jsonl
from healing.tracking.snapshots import FileSnapshots

pytestmark = pytest.mark.slow

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "measurement_interval": 10}  # fmt: skip
STEPS = 400
ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def collapsed(store) -> pathlib.Path:
    return attack(AttackConfig(**SMALL, attack_steps=2, arm="random_tokens", verbosity="quiet"))[1]


def as_in_a_terminal() -> None:
    """Tests that run in the background, or under ``nohup``, have a child ignore these."""
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_DFL)


def command(name: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", f"entrypoints.{name}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        preexec_fn=as_in_a_terminal,
    )  # fmt: skip


def healing(checkpoint: pathlib.Path, output: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    return command(
        "heal", *arguments, f"--collapsed-checkpoint={checkpoint}", f"--healing-steps={STEPS}",
        f"--output-dir={output}", *more,
    )  # fmt: skip


def runs(stage: str = "heal") -> list:
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(
        experiments, f"tags.stage = '{stage}'", order_by=["attributes.start_time ASC"]
    )


def wait_for_step(output: pathlib.Path, step: int, process: subprocess.Popen[str]) -> None:
    """Until a record of the step is on disk."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        for lines in output.glob("priority5_healing/raw_data/*_run*/metrics.jsonl"):
            if any(row["step"] >= step for row in read_jsonl(lines)):
                return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise TimeoutError("no such step")


def weights(output: pathlib.Path) -> dict[str, torch.Tensor]:
    (path,) = output.rglob("checkpoint_post_healing.pt")
    return torch.load(path, weights_only=True)["model_state_dict"]


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGUSR1, 138)],
)
def test_a_signal_ends_a_run_as_killed_and_the_same_command_goes_on(
    store, collapsed, signum, code
) -> None:
    output = store / "output"
    process = healing(collapsed, output)
    wait_for_step(output, 20, process)
    sent = time.monotonic()
    process.send_signal(signum)
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - sent < 40  # 10 s by the promise, beside other work here
    assert process.returncode == code, said
    name = signal.Signals(signum).name
    assert f"{name}: ending at the next safe point" in said
    assert f"stopped by {name} (the same command goes on from there)" in said
    assert "Traceback" not in said
    (run,) = runs()
    assert (run.info.status, run.data.tags["stopped_by"]) == ("KILLED", name)
    last = int(run.data.tags["stopped_at_step"])
    assert last >= 20
    if signum != signal.SIGTERM:
        return  # how it goes on does not depend on the signal
    process = healing(collapsed, output)
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    assert f"going on from step {last}" in said
    _, done = runs()
    assert done.info.status == "FINISHED"
    assert done.data.tags["resumed_from"] == run.info.run_id
    steps = [m.step for m in MlflowClient().get_metric_history(done.info.run_id, "effective_rank")]
    assert steps == list(range(0, STEPS + 1, 10))
    heal(HealConfig(**SMALL, collapsed_checkpoint=str(collapsed), healing_steps=STEPS,
                    output_dir=str(store / "whole"), verbosity="quiet"))  # fmt: skip
    one, other = weights(output), weights(store / "whole")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_several_signals_end_a_run_as_killed(store, collapsed) -> None:
    """That the second ends it at once is shown in test_listening."""
    output = store / "output"
    process = healing(collapsed, output)
    wait_for_step(output, 10, process)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=30)[0]
    assert process.returncode in (143, 130), said
    (run,) = runs()
    assert run.info.status == "KILLED"


def test_a_process_that_was_killed_hard_is_found_and_its_run_closed(store, collapsed) -> None:
    output = store / "output"
    process = healing(collapsed, output, "--checkpoint-interval=5")
    wait_for_step(output, 20, process)
    process.kill()
    process.communicate()
    (run,) = runs()
    assert run.info.status == "RUNNING"
    process = healing(collapsed, output, f"--resume-run-id={run.info.run_id}")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 0, said
    killed, done = runs()
    assert killed.info.status == "KILLED"
    assert re.search(r"process [0-9]+ on .* ended without ending it",
                     killed.data.tags["failure"])  # fmt: skip
    assert done.data.tags["resumed_from"] == run.info.run_id
    assert int(done.data.tags["resumed_at_step"]) >= 15
    assert not list(output.rglob(".outbox"))


def preparing(output: pathlib.Path, *more: str) -> subprocess.Popen[str]:
    """An attack that searches for minutes."""
    arguments = [f"--{k.replace('_', '-')}={v}" for k, v in SMALL.items()]
    return command(
        "attack", *arguments, "--arm=haep", "--search-steps=4000", "--search-candidates=8",
        "--attack-steps=2", f"--output-dir={output}", *more,
    )  # fmt: skip


def test_a_signal_during_the_search_keeps_its_rounds_and_the_next_goes_on(store) -> None:
    output = store / "output"
    process = preparing(output, "--checkpoint-minutes=0.0001")
    end = time.monotonic() + 120
    while not (states := sorted(output.rglob(".*.state/*-*.pt"))) or len(rounds(states)) < 5:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert time.monotonic() - sent < 40  # 10 s by the promise, beside other work here
    assert process.returncode == 143, said
    (run,) = runs("attack")
    assert run.info.status == "KILLED"
    assert run.data.tags["stopped_by"] == "SIGTERM"
    assert run.data.tags["stopped_at_step"] == "0"
    done = len(rounds(sorted(output.rglob(".*.state/*-*.pt"))))
    assert 5 <= done < 4000
    process = preparing(output, "--checkpoint-minutes=0.0001")
    while len(rounds(sorted(output.rglob(".*.state/*-*.pt")))) <= done:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert f"going on with what was prepared, where run {run.info.run_id} was left" in said


def rounds(states: list[pathlib.Path]) -> tuple[float, ...]:
    """ρ after the rounds of the search that the newest state holds."""
    snapshots = FileSnapshots(STATE_CLASSES)
    for path in reversed(states):
        kept = snapshots._read(path) if path.exists() else None
        if kept is not None and "catalyst search" in kept.state["finished"]:
            return kept.state["finished"]["catalyst search"].history
    return ()


def test_a_sweep_ends_its_cells_and_goes_on_without_the_finished_ones(store) -> None:
    arguments = ["--models=nano", "--arms=random_tokens,none", "--seeds=0,1", "--attack-steps=2",
                 "--healing-steps=40", "--batch-size=2", "--sequence-length=64",
                 "--measurement-interval=10", "--output-dir=output", "--workers=1"]  # fmt: skip
    process = command("main", *arguments)
    end = time.monotonic() + 200
    while sum(r.info.status == "FINISHED" for r in runs()) < 1:
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143, said
    assert {r.info.status for r in [*runs("main"), *runs()]} <= {"KILLED", "FINISHED"}
    (sweep,) = runs("main")
    assert sweep.info.status == "KILLED"
    before = {r.info.run_id for r in runs() if r.info.status == "FINISHED"}
    process = command("main", *arguments)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    finished = [r for r in runs() if r.info.status == "FINISHED"]
    assert before <= {r.info.run_id for r in finished}
    prints = [r.data.tags["fingerprint"] for r in finished if "fingerprint" in r.data.tags]
    assert len(prints) == len(set(prints)) == 4, "no cell is done twice"
