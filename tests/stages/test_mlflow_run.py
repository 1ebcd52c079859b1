"""``mlflow run`` of the repository's address at a commit gives a run's numbers again, bitwise."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from mlflow.tracking import MlflowClient

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

MADE = ("seconds", "tokens_per_second")
OPTIONS = {"model": "nano", "arm": "random_tokens", "seed": 2, "attack_steps": 3,
           "healing_steps": 4, "batch_size": 2, "sequence_length": 64, "probe_tokens": 512,
           "measurement_interval": 2}  # fmt: skip


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def repository(store: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Address and commit of a bare copy of what is committed here, served by git: MLflow takes
    file:// for a folder.
    """
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    if not (pathlib.Path(git("--exec-path")) / "git-daemon").exists():
        pytest.skip("git has no daemon here")
    bare = store / "served" / "bare.git"
    git("init", "--quiet", "--bare", str(bare))
    git("push", "--quiet", str(bare), "HEAD:refs/heads/main")
    git("--git-dir", str(bare), "symbolic-ref", "HEAD", "refs/heads/main")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    served = subprocess.Popen(
        [pathlib.Path(git("--exec-path")) / "git-daemon", "--export-all", "--listen=127.0.0.1",
         f"--port={port}", f"--base-path={bare.parent}", str(bare.parent)],
    )  # fmt: skip
    try:
        address = f"git://127.0.0.1:{port}/bare.git"
        for _ in range(50):
            if subprocess.run(["git", "ls-remote", address], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
        yield address, git("rev-parse", "HEAD")
    finally:
        served.terminate()
        served.wait()


@pytest.fixture
def shell(store: pathlib.Path, repository: tuple[str, str]):
    """Runs a command as a person does, in an activated environment."""
    MlflowClient().create_experiment("again", (store / "artifacts").as_uri())
    (store / "tmp").mkdir()
    activated = os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]])
    added = {"PATH": activated, "MLFLOW_EXPERIMENT_NAME": "again", "TMPDIR": str(store / "tmp"),
             "GIT_CONFIG_GLOBAL": os.devnull, "MLFLOW_DISABLE_TELEMETRY": "true"}  # fmt: skip

    def run(line: str) -> None:
        done = subprocess.run(
            line, shell=True, cwd=store, env={**os.environ, **added}, capture_output=True,
            text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return run


def healings() -> list:
    """The newest first."""
    client = MlflowClient()
    found = client.get_experiment_by_name("again")
    assert found is not None
    return list(client.search_runs([found.experiment_id], "tags.stage = 'heal'"))


def history(run) -> dict[str, list[tuple[int, str]]]:
    client = MlflowClient()
    return {
        name: [(m.step, repr(m.value)) for m in client.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
        if not name.startswith(MADE)
    }


def test_a_healing_is_repeated_from_the_address_and_commit_on_its_page(repository, shell):
    address, commit = repository
    given = " ".join(f"-P {name}={value}" for name, value in OPTIONS.items())
    shell(f"mlflow run {address} -v {commit} --env-manager local -e heal {given}")
    (first,) = healings()
    assert first.data.tags["mlflow.source.git.commit"] == commit
    note = first.data.tags["mlflow.note.content"]
    found = re.search(r"```bash\n(.+?)\n```", note, re.DOTALL)
    assert found is not None
    assert found[1].startswith(f"mlflow run {address}")
    assert f"-v {commit}" in found[1]
    assert "uncommitted" not in note
    shell(found[1])
    second, _ = healings()
    assert second.data.tags["fingerprint"] == first.data.tags["fingerprint"]
    one, other = history(first), history(second)
    assert len(one["effective_rank"]) == 3
    assert one == other
