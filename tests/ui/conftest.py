"""A store of constructed runs, MLflow's own server over it, and a browser."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlflow
import pytest
from mlflow.entities import Metric, Param, RunTag
from mlflow.tracking import MlflowClient

from healing.config.arm_tags import arm_tags, chart_tags
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.summarize import SummarizeConfig
from healing.measurements.recovery import verdict_of
from healing.stages.attack import attack
from healing.stages.heal import heal
from healing.stages.summarize import summarize
from healing.tracking import git_version
from healing.tracking.ui import experiment_page, links

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), "")
MODELS = {"nano": 309_792, "micro": 1_317_632}
ARMS = {"haep": 90.0, "none": 0.0, "random_text": 40.0, "random_tokens": 60.0}
"""Arm → rank recovery that its runs end at, per cent."""
SEEDS, STEPS = 2, range(0, 61, 10)


@dataclass(frozen=True)
class Constructed:
    """A served store.

    Attributes:
        address: Of the server.
        experiment_id: Of its only experiment with runs.
        run_ids: Of the healing runs.
    """

    address: str
    experiment_id: str
    run_ids: tuple[str, ...]

    def open(self, relative: str) -> str:
        """A whole address."""
        return f"{self.address}/{relative}"


def heal_metrics(model: str, arm: str, seed: int, step: int) -> dict[str, float]:
    """What a healing run logs at a step, by a formula instead of a model."""
    share = step / STEPS[-1]
    end = ARMS[arm] + 2 * seed - (10 if model == "micro" else 0)
    made = {
        "effective_rank": 5 + 20 * share + seed,
        "loss": 10 - 7 * share,
        "perplexity": 2.718281828 ** (30 * (1 - share) + 3),
        "spectral_gap": 1000.0 ** (1 - share) + 1,
        "layers/effective_rank_00": 4 + share,
        "weight_change": 0.5 * share,
    }
    undefined = {"rank_recovery_pct": float("nan"), "loss_recovery_pct": float("nan")}
    known = {"rank_recovery_pct": end * share, "loss_recovery_pct": 85.0 * share}
    return made | (undefined if arm == "none" else known)


def attack_metrics(seed: int, step: int) -> dict[str, float]:
    """What an attack logs at a step."""
    share = step / STEPS[-1]
    return {
        "effective_rank": 30 - 25 * share + seed,
        "perplexity": 2.718281828 ** (3 + 30 * share),
        "alignment": 0.2 + 0.5 * share,
        "alignment_random_tokens": 0.3,
        "alignment_clean_text": 0.25,
        "alignment_isotropic": 0.05,
    }


def make_runs(experiment: str) -> tuple[str, list[str]]:
    """A sweep's parent with attacks and healing runs: the experiment's id and theirs."""
    client = MlflowClient()
    experiment_id = client.create_experiment(experiment)
    parent = client.create_run(experiment_id, run_name="sweep", tags={"stage": "main"})
    run_ids = []
    for model, size in MODELS.items():
        for arm in ARMS:
            for seed in range(SEEDS):
                for stage in ("attack", "heal"):
                    if stage == "attack" and arm == "none":
                        continue
                    tags = {"stage": stage, "model": model, "arm": arm, **arm_tags(arm)}
                    tags |= chart_tags(tags) | {"mlflow.parentRunId": parent.info.run_id}
                    if stage == "heal":
                        ended = heal_metrics(model, arm, seed, STEPS[-1])["rank_recovery_pct"]
                        tags |= {"verdict": verdict_of(ended), "status": "ok"}
                    params = {"model": model, "arm": arm, "seed": seed, "n_params": size}
                    params |= {"heal.healing_lr": 1e-3 * (1 + seed), "heal.healing_steps": 60}
                    points = [
                        Metric(name, value, 1_700_000_000_000 + step, step)
                        for step in STEPS
                        for name, value in (
                            heal_metrics(model, arm, seed, step)
                            if stage == "heal"
                            else attack_metrics(seed, step)
                        ).items()
                    ]
                    run = client.create_run(
                        experiment_id, run_name=f"{stage} {model} {arm} seed {seed}"
                    )
                    client.log_batch(
                        run.info.run_id,
                        points,
                        [Param(k, str(v)) for k, v in params.items()],
                        [RunTag(k, v) for k, v in tags.items()],
                    )
                    client.set_terminated(run.info.run_id)
                    if stage == "heal":
                        run_ids.append(run.info.run_id)
    client.set_terminated(parent.info.run_id)
    return experiment_id, run_ids


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Constructed]:
    """The constructed store, served by MLflow itself."""
    folder = tmp_path_factory.mktemp("ui")
    uri = f"sqlite:///{folder}/mlflow.db"
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    try:
        experiment_id, run_ids = make_runs("constructed")
        experiment_page.publish(experiment_id)
    finally:
        mlflow.set_tracking_uri(before)
    with serving(folder, uri) as address:
        yield Constructed(address, experiment_id, tuple(run_ids))


@contextlib.contextmanager
def serving(folder: pathlib.Path, uri: str) -> Iterator[str]:
    """The address of MLflow's own server over a store."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    environment = os.environ | {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        "MLFLOW_TRACKING_URI": "",
    }
    log = (folder / "log").open("w")
    server = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, folder / "log")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, 15)
        server.wait(10)
        log.close()


@dataclass(frozen=True)
class Made:
    """A served store of real runs.

    Attributes:
        address: Of the server.
        folder: Where the commands ran.
        uri: Of the store.
        attack: Id of the attack.
        heal: Id of its healing run.
        summary: Id of the summary of that.
    """

    address: str
    folder: pathlib.Path
    uri: str
    attack: str
    heal: str
    summary: str

    def page(self, run_id: str, tab: str = "") -> str:
        """Address of a run's page."""
        run = MlflowClient(self.uri).get_run(run_id)
        relative = links.run_page(run.info.experiment_id, run_id)
        path, _, query = relative.partition("?")
        return f"{self.address}/{path}{tab}?{query}"


SMALL: dict[str, Any] = {
    "model": "nano", "sequence_length": 64, "probe_tokens": 1024, "batch_size": 4,
    "measurement_interval": 2, "verbosity": "quiet",
}  # fmt: skip


@contextlib.contextmanager
def writing_to(folder: pathlib.Path, uri: str) -> Iterator[None]:
    """This process' commands run in a folder and log to a store."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(uri)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patched:
        # Made once for all: nothing has taken away what an earlier test left in the environment.
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patched.delenv(name, raising=False)
        # The command on a page is one for a checkout: this one.
        found = git_version.Checkout(commit="5a4f90c1" * 5)
        for module in ("attack", "healing_run.page", "summarize"):
            patched.setattr(f"healing.stages.{module}.checkout", lambda: found)
        try:
            yield
        finally:
            mlflow.set_tracking_uri(before)


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """An attack on nano, its healing and their summary as commands leave them, served."""
    folder = tmp_path_factory.mktemp("made")
    uri = f"sqlite:///{folder}/mlflow.db"
    with writing_to(folder, uri):
        attack_id, _ = attack(AttackConfig(**SMALL, arm="random_tokens", attack_steps=8,
                                           target_rank_reduction=1.0))  # fmt: skip
        heal(HealConfig(**SMALL, attack_run_id=attack_id, healing_steps=8))
        summarize(SummarizeConfig(verbosity="quiet"))
        client = MlflowClient(uri)
        (experiment,) = client.search_experiments(filter_string="name = 'llm-healing'")
        ids = {r.data.tags["stage"]: r.info.run_id
               for r in client.search_runs([experiment.experiment_id])}  # fmt: skip
    with serving(folder, uri) as address:
        yield Made(address, folder, uri, ids["attack"], ids["heal"], ids["summarize"])


def wait_for(address: str, server: subprocess.Popen[bytes], log: pathlib.Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=2).close()
        except OSError:
            time.sleep(0.3)
        else:
            return
    raise AssertionError(f"no server: {log.read_text()}")


STORAGE = {
    # MLflow's assistant opens over a third of the page on a browser's first visit.
    "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": True,
    "mlflow.assistant.panelOpen_v1": False,
}


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="pip install 'llm-healing[dev]'")
    if not CHROMIUM:
        pytest.skip("no Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def page(browser):
    """A page of 1,440 × 900 in a browser that never saw MLflow before; asks no other server."""
    context = browser.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(30_000)
    for key, value in STORAGE.items():
        item = f"{json.dumps(key)}, {json.dumps(json.dumps(value))}"
        context.add_init_script(f"window.localStorage.setItem({item})")
    yield context.new_page()
    context.close()
