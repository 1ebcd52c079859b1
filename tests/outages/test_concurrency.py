"""Several commands at once: into one folder, one new database, one server; overlapping sweeps."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.stages.attack import attack
from healing.tracking.run_files import read_jsonl
from tests.outages.servers import Server

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parents[2]
SMALL = ["--model=nano", "--sequence-length=64", "--probe-tokens=512", "--batch-size=2",
         "--measurement-interval=10"]  # fmt: skip
STEPS = list(range(0, 41, 10))


def begun(uri: str, name: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "MLFLOW_TRACKING_URI": uri, "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", f"entrypoints.{name}", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
    )  # fmt: skip


def ended(processes: list[subprocess.Popen[str]]) -> list[str]:
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [p.returncode for p in processes] == [0] * len(processes), "\n---\n".join(said)
    return said


def healings(uri: str) -> list:
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, "tags.stage = 'heal'")
    for run in found:
        assert run.info.status == "FINISHED"
        history = client.get_metric_history(run.info.run_id, "effective_rank")
        assert [m.step for m in history] == STEPS
    return found


@pytest.fixture
def collapsed(store: pathlib.Path) -> str:
    config = AttackConfig(model="nano", arm="random_tokens", attack_steps=2, sequence_length=64,
                          probe_tokens=512, batch_size=2, verbosity="quiet")  # fmt: skip
    return str(attack(config)[1])


def test_equal_healings_into_one_folder_wait_for_one_another(store, collapsed) -> None:
    uri = f"sqlite:///{store}/mlflow.db"
    arguments = [*SMALL, "--healing-steps=40", f"--collapsed-checkpoint={collapsed}",
                 f"--output-dir={store}/output"]  # fmt: skip
    said = ended([begun(uri, "heal", *arguments) for _ in range(3)])
    assert sum("which has this run's folder" in text for text in said) >= 1
    assert len(healings(uri)) == 3
    (lines,) = (store / "output").glob("priority5_healing/raw_data/*/metrics.jsonl")
    assert [row["step"] for row in read_jsonl(lines)] == STEPS
    assert (lines.parent / "checkpoints/checkpoint_post_healing.pt").is_file()
    assert not list(store.rglob(".*.previous"))


def test_four_healings_make_a_new_database_together(store, collapsed) -> None:
    uri = f"sqlite:///{store}/new.db"
    ended(
        [
            begun(uri, "heal", *SMALL, "--healing-steps=40", f"--seed={seed}",
                  f"--collapsed-checkpoint={collapsed}", f"--output-dir={store}/output")
            for seed in range(4)
        ]
    )  # fmt: skip
    assert len(healings(uri)) == 4


def test_eight_healings_against_one_server(store, collapsed, empty_database) -> None:
    folder = store / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    server = Server(folder)
    server.start()
    try:
        ended(
            [
                begun(server.uri, "heal", *SMALL, "--healing-steps=40", f"--seed={seed}",
                      f"--collapsed-checkpoint={collapsed}", f"--output-dir={store}/output")
                for seed in range(8)
            ]
        )  # fmt: skip
        assert len(healings(server.uri)) == 8
    finally:
        server.stop()


def test_overlapping_sweeps_do_no_cell_twice(store) -> None:
    uri = f"sqlite:///{store}/mlflow.db"

    def sweep(seeds: str) -> subprocess.Popen[str]:
        return begun(
            uri, "main", "--models=nano", "--arms=random_tokens,none", f"--seeds={seeds}",
            "--attack-steps=2", "--healing-steps=40", "--batch-size=2", "--sequence-length=64",
            "--measurement-interval=10", "--workers=1", f"--output-dir={store}/output",
        )  # fmt: skip

    ended([sweep("0,1"), sweep("1,0")])
    prints = [run.data.tags["fingerprint"] for run in healings(uri)]
    assert len(prints) == len(set(prints)) == 4
