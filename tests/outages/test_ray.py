"""A sweep on a cluster: the results of threads, whatever dies meanwhile.

One cluster of Ray for all tests: a head that computes nothing and three nodes of one CPU on this
machine, each with a folder of its own for its workers.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import mlflow
import pytest
from mlflow.tracking import MlflowClient

from healing.config.sweep import SweepConfig
from healing.errors import SweepError
from healing.models.checkpoints import read_checkpoint
from healing.stages.sweep import sweep
from healing.tracking.open_runs import DEFAULT_EXPERIMENT
from healing.tracking.run_files import plain, read_jsonl
from tests.outages.ray_faults import (
    ACTORS,
    ADDED,
    ALWAYS,
    ASKED,
    DEAF,
    DEVICE,
    FOLDER,
    HOLD,
    KILL,
    LACK,
    LOSE,
    NO_PACKAGE,
    OTHER_CODE,
    UNFIT,
    WAIT,
)
from tests.servers.backends import S3_LOGIN
from tests.servers.test_servers import running

# Read when Ray is imported: who does not have this run's token can do nothing with its cluster.
os.environ.setdefault("RAY_AUTH_MODE", "token")
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'llm-healing[ray]'")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]
ROOT = pathlib.Path(__file__).parents[2]
STEPS = 8
HOOK = {"runtime_env": {"worker_process_setup_hook": "tests.outages.ray_faults.install"}}
JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Of another process: how it gives its workers the hook."""
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}

SAME = ["--arms=haep,gaussian_noise", "--seeds=0-2", "--attack-steps=3", "--noise-match=norm",
        f"--healing-steps={STEPS}", "--measurement-interval=2",
        "--checkpoint-interval=2"]  # fmt: skip
"""Of a command: the sweep of :func:`settings`."""


def settings(output: pathlib.Path, **changes: Any) -> SweepConfig:
    values = {"models": "nano", "arms": "haep,gaussian_noise", "seeds": "0-2", "attack_steps": 3,
              "healing_steps": STEPS, "batch_size": 2, "sequence_length": 64, "workers": 1,
              "measurement_interval": 2, "noise_match": "norm", "verbosity": "quiet",
              "checkpoint_interval": 2, "output_dir": str(output)}  # fmt: skip
    return SweepConfig(**(values | changes))


def on_ray(folder: pathlib.Path, **changes: Any) -> SweepConfig:
    values = {"launcher": "ray", "worker_memory": 0, "workers": "auto", "device": "cpu",
              "worker_dir": str(folder / "workers")}  # fmt: skip
    return settings(folder / "output", **(values | changes))


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Folder that says which workers die; none at first."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "faults.json").write_text("{}")
    return folder


@contextlib.contextmanager
def happening(faults: pathlib.Path, wanted: dict[str, dict[str, str]]) -> Iterator[None]:
    """Workers have these faults in the block, once each, whatever happened to others before."""
    for left in faults.iterdir():
        left.unlink()
    (faults / "faults.json").write_text(json.dumps(wanted))
    try:
        yield
    finally:
        (faults / "faults.json").write_text("{}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def head_of(kind: Any) -> Any:
    """A cluster with its head. Ray gives itself 30 s to start, which may be too few."""
    small = {"include_dashboard": False, "object_store_memory": 80 * 2**20, "num_cpus": 0,
             "ray_client_server_port": free_port()}  # fmt: skip
    why = ""
    for _ in range(3):
        try:
            return kind(initialize_head=True, head_node_args=small)
        except Exception as error:  # noqa: BLE001 (plain ones)
            why = str(error)
    pytest.skip(f"Ray does not start here: {why}")


@pytest.fixture(scope="module")
def cluster(faults: pathlib.Path) -> Iterator[Any]:
    """Three nodes; this process is connected, so that its workers have the faults installed."""
    from ray.cluster_utils import Cluster

    own = {FOLDER: str(faults), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
           "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0", **S3_LOGIN}  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in own.items():
            patch.setenv(name, value)
        found = head_of(Cluster)
        try:
            for _ in range(3):
                found.add_node(**NODE)
            ray.init(address=found.address, namespace="llm-healing", **HOOK,
                     log_to_driver=False, logging_level="ERROR")  # fmt: skip
            yield found
        finally:
            ray.shutdown()
            found.shutdown()


@pytest.fixture(scope="module")
def expected(
    tmp_path_factory: pytest.TempPathFactory, empty_database: pathlib.Path
) -> dict[tuple[str, ...], Any]:
    """What the same sweep leaves in threads."""
    folder = tmp_path_factory.mktemp("threads")
    shutil.copy(empty_database, folder / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        uri = f"sqlite:///{folder}/mlflow.db"
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        sweep(settings(folder / "output"))
        return results()


def computed() -> list[Any]:
    """All runs of attacks and healings, whatever became of them."""
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments, max_results=1000)
    return [run for run in found if run.data.tags["stage"] in ("attack", "heal")]


def told(key: tuple[str, ...]) -> list[str]:
    """What became of a cell's runs."""
    names = ("fingerprint", "try", "failure", "resumed_from", "mlflow.parentRunId", "ray_node_id")
    return [
        f"{run.info.run_id} {run.info.status} {run.info.start_time}-{run.info.end_time} "
        f"{[run.data.tags.get(name, '')[:60] for name in names]}"
        for run in computed()
        if (run.data.tags["stage"], run.data.tags["arm"], run.data.params.get("seed")) == key
    ]


def results() -> dict[tuple[str, ...], Any]:
    """Stage, arm and seed → every number that a finished run left: points in the store, the file of
    its records, the digest of its weights. Nothing of it is there twice.
    """
    found: dict[tuple[str, ...], Any] = {}
    client = MlflowClient()
    for run in (r for r in computed() if r.info.status == "FINISHED"):
        tags, run_id = run.data.tags, run.info.run_id
        key = (tags["stage"], tags["arm"], run.data.params["seed"])
        assert key not in found, f"a cell is there twice: {told(key)}"
        history = {
            name: [(m.step, repr(m.value)) for m in client.get_metric_history(run_id, name)]
            for name in run.data.metrics
            if not name.startswith(("seconds", "tokens_per"))
        }
        records = read_jsonl(pathlib.Path(client.download_artifacts(run_id, "metrics.jsonl")))
        rows = [
            {k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per"))}
            for row in records
        ]
        weights = [f.path for f in client.list_artifacts(run_id, "checkpoints")]
        digests = [read_checkpoint(pathlib.Path(client.download_artifacts(run_id, path))).digest
                   for path in weights]  # fmt: skip
        found[key] = (tags["fingerprint"], history, plain(rows), digests)
    return found


def test_a_sweep_on_a_cluster_leaves_what_threads_leave(store, cluster, expected) -> None:
    summary = sweep(on_ray(store))
    assert {g.arm for g in summary.groups} == {"haep", "gaussian_noise", "none"}
    found = results()
    assert set(found) == set(expected)
    assert len(found) == 15  # of three seeds: the sham, two attacks, two healings of them
    for key, result in expected.items():
        assert found[key] == result, key
    runs = computed()
    assert {run.data.tags["try"] for run in runs} == {"1"}
    assert {run.data.tags["device"] for run in runs} == {"cpu"}
    nodes = {run.data.tags["ray_node_id"] for run in runs}
    assert nodes <= {node.node_id for node in cluster.worker_nodes}
    tasks = {run.data.params["seed"]: run.data.tags["ray_task_id"] for run in runs}
    assert len(set(tasks.values())) == 3
    # A folder for every node, with nothing left in it, no state in the store, and no file of a run
    # on this side.
    left = store / "workers"
    assert {path.name for path in left.iterdir()} == {node[:12] for node in nodes}
    assert [p for p in left.rglob("*") if p.is_file() and p.suffix not in (".lock", "")] == []
    assert not any(run.data.tags.get("kept_state") for run in runs)
    assert not (store / "output/priority5_healing/raw_data").exists()
    # The same again computes nothing.
    sweep(on_ray(store))
    assert len(computed()) == len(runs)
    (again, _) = MlflowClient().search_runs(
        [runs[0].info.experiment_id], "tags.stage = 'main'", order_by=["attributes.start_time DESC"]
    )
    assert again.data.tags["reused_runs"] == "9"


def test_workers_and_machines_that_die_lose_nothing(store, cluster, faults, expected) -> None:
    """One worker is killed amid its healing, the machine of another is taken away, and the chain
    that was lost with it goes on where another machine was added: the two that are left are busy.
    """
    kill_at, hold_at = str(STEPS - 2), str(STEPS)
    wanted = {
        "haep_seed0_run01": {kill_at: KILL, hold_at: HOLD},
        "haep_seed1_run01": {kill_at: WAIT},
        "haep_seed2_run01": {hold_at: HOLD},
    }
    waiting = faults / f"haep_seed1_run01-{kill_at}"
    with happening(faults, wanted), concurrent.futures.ThreadPoolExecutor(1) as pool:
        done = pool.submit(sweep, on_ray(store))
        while not waiting.exists() and not done.done():
            time.sleep(0.2)
        removed = waiting.read_text() if waiting.exists() else pytest.fail(str(done.result()))
        (node,) = (node for node in cluster.worker_nodes if node.node_id == removed)
        cluster.remove_node(node, allow_graceful=False)
        added = cluster.add_node(**NODE).node_id
        (faults / ADDED).write_text(added)
        done.result()
    assert results() == expected
    runs = computed()
    assert {run.info.status for run in runs} == {"FINISHED", "KILLED"}
    killed = [run for run in runs if run.info.status == "KILLED"]
    assert sorted(run.data.params["seed"] for run in killed) == ["0", "1"]
    resumed_on = {}
    for cut in killed:
        seed = cut.data.params["seed"]
        (again,) = (
            run.data.tags
            for run in runs
            if run.data.tags.get("resumed_from") == cut.info.run_id
        )  # fmt: skip
        assert again["try"] == "2"
        assert again["ray_task_id"] == cut.data.tags["ray_task_id"]
        assert 2 <= int(again["resumed_at_step"]) <= STEPS - 2, f"seed {seed} began anew"
        resumed_on[seed] = again["ray_node_id"]
        if seed == "1":
            assert cut.data.tags["ray_node_id"] == removed
    assert removed not in resumed_on.values()
    assert added in resumed_on.values()


def test_what_a_sweep_counts_with_may_die(store, cluster, faults, expected) -> None:
    """The processes that count tries and claims are on the head, without which there is no cluster;
    where they die nonetheless, who asks them asks again.
    """
    one = {key: result for key, result in expected.items() if key[2] == "1"}
    with happening(faults, {ACTORS: {}}):
        sweep(on_ray(store, seeds="1"))
        raylets = [(faults / asked).read_text() for asked in ASKED]
    assert ["--head" in raylet for raylet in raylets] == [True] * len(ASKED)
    assert results() == one
    assert {run.info.status for run in computed()} == {"FINISHED"}


def test_what_a_machine_cannot_run_goes_elsewhere(store, cluster, faults, expected, capsys) -> None:
    """Of three machines one has other code and one no package that can be loaded. On the third a
    cell kills its worker every time, and a device fails once.
    """
    other, lacking, sound = (node.node_id for node in cluster.worker_nodes)
    wanted = {
        UNFIT: {other: OTHER_CODE, lacking: NO_PACKAGE},
        "haep_seed1_run01": {"4": ALWAYS},
        "haep_seed2_run01": {"6": DEVICE},
    }
    given_up = "nano haep seed 1: its worker died in each of 2 tries in a row"
    with happening(faults, wanted), pytest.raises(SweepError, match=given_up):
        sweep(on_ray(store, retries=1, verbosity="normal"))
    assert results() == {k: v for k, v in expected.items() if k != ("heal", "haep", "1")}
    cut: dict[str, list[str]] = {"1": [], "2": []}
    for run in computed():
        assert run.data.tags["ray_node_id"] == sound
        if run.info.status != "FINISHED":
            cut[run.data.params["seed"]].append(f"{run.info.status} {run.data.tags['try']}")
    # The second try went on from a later step than the first, and the third from the same.
    assert sorted(cut["1"]) == ["KILLED 1", "KILLED 2", "KILLED 3"]
    assert cut["2"] == ["FAILED 1"]  # it could say why
    said = " ".join("".join(capsys.readouterr()).split())
    assert said.count("is given no chains: it has other code than this command") == 1
    assert said.count("is given no chains: this package cannot be loaded there (Attri") == 1
    assert said.count("its device failed (CUDA error: unspecified launch failure)") == 1
    assert said.count(f"failed: {given_up}") == 2, "at once, and in the end"
    # Where there is no machine left, nothing is waited for.
    nowhere = {UNFIT: dict.fromkeys((other, lacking, sound), OTHER_CODE)}
    folder = store / "none" / "workers"
    with (
        happening(faults, nowhere),
        pytest.raises(SweepError, match="no machine of the cluster can run it") as caught,
    ):
        sweep(on_ray(store, seeds="7", worker_dir=str(folder)))
    assert str(caught.value).startswith("3 cell(s) failed")
    assert not folder.exists()


def test_a_cell_that_runs_out_of_memory_is_the_only_one_that_fails(
    store, cluster, faults, expected, capsys
) -> None:
    with (
        happening(faults, {"haep_seed1_run01": {"4": LACK}}),
        pytest.raises(SweepError, match="nano haep seed 1: memory ran out"),
    ):
        sweep(on_ray(store, seeds="1", verbosity="normal"))
    lost = ("heal", "haep", "1")
    assert results() == {k: v for k, v in expected.items() if k[2] == "1" and k != lost}
    (failed,) = (run for run in computed() if run.info.status == "FAILED")
    assert failed.data.tags["failure"].startswith("memory ran out (")
    printed = capsys.readouterr()
    said = " ".join((printed.out + printed.err).split())
    assert said.count("failed: nano haep seed 1: memory ran out") == 2, "at once, and in the end"
    assert "CUDA out of memory. Tried to allocate 9.00 GiB." in said
    assert "GB at its peak)" in said


@pytest.mark.parametrize("name", ["team", "S3"])
def test_workers_need_nothing_but_a_server(
    store, cluster, faults, expected, monkeypatch, name
) -> None:
    """PostgreSQL, users, and S3 behind the server; S3 that workers write to themselves. A worker is
    killed, and what it had on its disk is lost: its state comes back from the server.
    """
    for variable, value in S3_LOGIN.items():
        monkeypatch.setenv(variable, value)
    one = {key: result for key, result in expected.items() if key[2] == "1"}
    with running(name, store / "server", monkeypatch):
        with happening(faults, {"haep_seed1_run01": {"6": LOSE}}):
            sweep(on_ray(store, seeds="1"))
        assert results() == one
        (again,) = (r.data.tags for r in computed() if r.data.tags.get("resumed_from"))
        assert 2 <= int(again["resumed_at_step"]) <= 6


def test_two_commands_at_once_compute_nothing_twice(store, cluster, expected) -> None:
    """Neither knows of the other, and they share no folder: what one computes the other waits for,
    and finds.
    """
    homes = [store / name for name in ("one", "other")]
    with contextlib.ExitStack() as ending:
        for home in homes:
            home.mkdir()
        both = [command(home, cluster.address, SAME) for home in homes]
        for process in both:
            ending.callback(process.kill)
        said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert results() == expected
    assert len(computed()) == len(expected), "a cell was begun twice"
    (experiment,) = {run.info.experiment_id for run in computed()}
    parents = MlflowClient().search_runs([experiment], "tags.stage = 'main'")
    assert sum(int(run.data.tags["reused_runs"]) for run in parents) == 9


def command(
    folder: pathlib.Path,
    address: str,
    asked: list[str],
    env: Mapping[str, str] | None = None,
    *,
    by_mlflow: bool = False,
) -> subprocess.Popen[str]:
    """``main`` on the cluster, as a process of its own, or as ``mlflow run`` starts it."""
    arguments = ["--models=nano", "--batch-size=2", "--sequence-length=64", "--launcher=ray",
                 f"--output-dir={folder}/output", "--worker-memory=0", "--device=cpu",
                 f"--worker-dir={folder}/workers", f"--ray-address={address}"]  # fmt: skip
    line = ["-m", "entrypoints.main", *arguments, *asked]
    if by_mlflow:
        given = [text.removeprefix("--").partition("=") for text in (*arguments, *asked)]
        named = [text for k, _, v in given for text in ("-P", f"{k.replace('-', '_')}={v}")]
        line = ["-m", "mlflow", "run", str(ROOT), "-e", "main", "--env-manager", "local",
                "--experiment-name", DEFAULT_EXPERIMENT, *named]  # fmt: skip
        path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        env = {
            "PATH": path,
            **(env or {}),
        }  # it starts `python`, as where the environment is active
    return subprocess.Popen(
        [sys.executable, *line], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})},
    )  # fmt: skip


def test_a_command_outside_the_cluster_reaches_it(store, cluster, expected) -> None:
    """``ray://``: the command is no part of the cluster, as on a laptop."""
    pytest.importorskip("grpc", reason="pip install 'ray[client]'")
    port = cluster.head_node._ray_params.ray_client_server_port
    for _ in range(3):
        process = command(store, f"ray://127.0.0.1:{port}", [*SAME, "--seeds=1"])
        said = process.communicate(timeout=300)[0]
        if "no Ray cluster could be reached" not in said:  # its proxy loses a server at times
            break
    assert process.returncode == 0, said
    assert results() == {key: result for key, result in expected.items() if key[2] == "1"}


def test_a_command_that_is_killed_is_gone_on_with(store, cluster, expected) -> None:
    """Nobody ends what it left; the same does, here by ``mlflow run``, and does nothing again that
    was finished.
    """
    process, left = command(store, cluster.address, SAME), []
    while {"RUNNING", "FINISHED"} - {run.info.status for run in left}:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
        left = computed()
    process.kill()
    process.communicate()
    again = command(store, cluster.address, SAME, by_mlflow=True)
    said = again.communicate(timeout=300)[0]
    assert again.returncode == 0, said
    assert results() == expected
    runs = {run.info.run_id: run for run in computed()}
    # What was running may have come to its end before its worker did.
    assert {run.info.status for run in runs.values()} <= {"FINISHED", "KILLED"}
    finished = [run.info.run_id for run in left if run.info.status == "FINISHED"]
    assert {runs[run_id].info.status for run_id in finished} == {"FINISHED"}


def test_a_sweep_that_is_stopped_ends_every_run(store, cluster, faults) -> None:
    """Within 30 s, also where a worker hears nothing any more."""
    asked = ["--arms=none,random_tokens", "--seeds=0-3", "--attack-steps=2",
             "--healing-steps=400", "--measurement-interval=10"]  # fmt: skip
    with happening(faults, {"none_seed0_run01": {"10": DEAF}}):
        process = command(store, cluster.address, asked, env={JOB: json.dumps(HOOK)})
        end, deaf = time.monotonic() + 300, faults / "none_seed0_run01-10"
        while not deaf.exists() or len([r for r in computed() if r.info.status == "RUNNING"]) < 3:
            assert time.monotonic() < end
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.5)
        stopped = time.monotonic()
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=120)[0]
        seconds = time.monotonic() - stopped
    assert process.returncode == 128 + signal.SIGINT, said
    assert {run.info.status for run in computed()} <= {"KILLED", "FINISHED"}
    client = MlflowClient()
    experiment = computed()[0].info.experiment_id
    (parent,) = client.search_runs([experiment], "tags.stage = 'main'")
    assert parent.info.status == "KILLED"
    assert seconds <= 30, said
    print(f"ended {seconds:.1f} s after the signal")
