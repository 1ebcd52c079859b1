"""Shared fixtures: a temporary MLflow store, the embedded models, tiny models, text files."""

from __future__ import annotations

import os

# Before torch is imported: two test workers on two cores must not fight over threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ["MLFLOW_TRACKING_URI"] = ""

import importlib.metadata
import pathlib
import shutil
import sys
import textwrap
from collections.abc import Iterator

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from transformers import GPTNeoXForCausalLM

from healing.config.shared import BaseConfig
from healing.measurements.kept_measurements import forget
from healing.measurements.probe import Probe
from healing.models.loading import LoadedModel, embedded_config, load_model, state_digest
from healing.randomness import named_generator
from healing.registry import ARMS, MEASUREMENTS, METHODS
from healing.stages.cells.code_digest import code_digest, parsed
from healing.stages.cells.inputs import corpus_for
from healing.tracking.sending import sender

ROOT = pathlib.Path(__file__).parents[1]
SHARED_DATA = ROOT.parent / "shared" / "data"


LONGEST = ("test_ray.py", "test_kill_points.py", "test_golden.py", "test_concurrency.py")
"""Modules that go first: what takes minutes is not to begin when all others are over."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest first; tests marked fuzz run only where they are asked for."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(LONGEST)))
    if "fuzz" in config.getoption("markexpr"):
        return
    left_out = [item for item in items if item.get_closest_marker("fuzz")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_experiment_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """``mlflow.set_experiment`` leaves its experiment in the environment: processes inherit it."""
    for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that is away does not come back in most tests: those of outages wait for it."""
    monkeypatch.setattr(sender, "PATIENCE", 0.5)


@pytest.fixture(autouse=True)
def nothing_measured_before() -> None:
    """What one test measures, perhaps with parts replaced, is not another's."""
    forget()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A SQLite store without runs: making its tables takes MLflow seconds, a copy nothing."""
    path = tmp_path_factory.mktemp("store") / "empty.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def store(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, empty_database: pathlib.Path
) -> Iterator[pathlib.Path]:
    """An empty SQLite tracking store, with the working directory beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield tmp_path
    while mlflow.active_run():
        mlflow.end_run()
    mlflow.set_tracking_uri(None)  # a hostile address is no other test's


@pytest.fixture(scope="session")
def corpus():
    return corpus_for(BaseConfig(corpus="stdlib"))


@pytest.fixture
def nano() -> LoadedModel:
    """A fresh copy of the embedded nano model."""
    return load_model("nano", "cpu")


@pytest.fixture
def tiny() -> LoadedModel:
    """An untrained two-block model on nano's tokenizer, small enough for dense references."""
    loaded = load_model("nano", "cpu")
    config = embedded_config("nano", len(loaded.tokenizer))
    config.hidden_size, config.num_hidden_layers, config.num_attention_heads = 16, 2, 2
    config.intermediate_size = 64
    generator = named_generator(0, "tiny")
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.2, generator=generator)
    return LoadedModel("nano", model, loaded.tokenizer, state_digest(model.state_dict()))


@pytest.fixture
def probe(corpus, nano) -> Probe:
    return Probe.of(corpus, nano, 1024, 64)


@pytest.fixture
def text_files(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of 60 short text files, enough for three non-empty splits."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        words = " ".join(f"word{number}x{i}" for i in range(40))
        (folder / f"{number:02d}.txt").write_text(f"Document {number}. {words}\n")
    return folder


def forget_plug_ins() -> None:
    """Registries and digests look at files and entry points anew, as a new process does."""
    for registry in (ARMS, METHODS, MEASUREMENTS):
        registry.forget()
    parsed.cache_clear()
    code_digest.cache_clear()


@pytest.fixture
def plug_ins(tmp_path, monkeypatch):
    """Write modules of another distribution and install entry points to them."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    entries: list[importlib.metadata.EntryPoint] = []
    everything = importlib.metadata.entry_points

    def entry_points(**selection):
        found = [e for e in entries if e.group == selection.get("group")]
        return found or everything(**selection)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    written: list[str] = []

    def install(
        name: str, text: str, group: str = "llm_healing.arms", value: str = ""
    ) -> pathlib.Path:
        module = value or f"plug_in_{len(entries)}"
        path = folder / f"{module.partition(':')[0]}.py"
        path.write_text(textwrap.dedent(text))
        entries.append(importlib.metadata.EntryPoint(name, module, group))
        written.append(path.stem)
        forget_plug_ins()
        return path

    yield install
    monkeypatch.undo()
    for module in written:
        sys.modules.pop(module, None)
    forget_plug_ins()
