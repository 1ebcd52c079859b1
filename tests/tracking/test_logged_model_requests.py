"""Models through the outbox: sent twice, late, or not at all, they are in the store once."""

from __future__ import annotations

import pathlib
import shutil

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.tracking import MlflowClient

from healing.errors import OutageError
from healing.tracking import open_runs
from healing.tracking.sending import left_behind
from healing.tracking.sending.left_behind import deliver
from healing.tracking.sending.logged_models import (
    MODEL,
    MODEL_READY,
    LoggedModels,
    ModelFiles,
    files_of,
    model_name,
)
from healing.tracking.sending.outbox import PLACE
from healing.tracking.sending.requests import Messenger


@pytest.fixture
def model(store: pathlib.Path) -> ModelFiles:
    """As the flavour leaves it, with other files."""
    folder = store / "output/run/model"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights/all.bin").write_bytes(bytes(range(200)))
    (folder / "note.txt").write_text("ours")
    Model().save(str(folder / "MLmodel"))
    return ModelFiles("a model: x/y", folder, {"arm": "haep"}, "attack", "kept")


def told(store: pathlib.Path, model: ModelFiles) -> None:
    """A run with a model, as a command tells it."""
    with open_runs.start("r", {"stage": "attack"}, keep=store / "output" / PLACE) as run:
        run.metrics({"summary/rank": 2.5, "summary/undefined": float("nan"), "loss": 1.0})
        run.model(model)


def require_whole() -> None:
    """One model with its files, linked once, with the run's final number, and one version."""
    client = MlflowClient()
    (experiment,) = client.search_experiments(filter_string="name = 'llm-healing'")
    (run,) = client.search_runs([experiment.experiment_id])
    (found,) = client.search_logged_models([experiment.experiment_id])
    assert found.status == "READY"
    assert found.name == "a-model-x-y"
    assert found.source_run_id == run.info.run_id
    assert run.info.status in ("FINISHED", "KILLED")
    assert [o.model_id for o in run.outputs.model_outputs] == [found.model_id]
    assert {m.key: m.value for m in found.metrics} == {"summary/rank": 2.5}
    assert len(client.get_metric_history(run.info.run_id, "summary/rank")) == 1
    (version,) = client.search_model_versions("name = 'kept'")
    assert version.source == f"models:/{found.model_id}"
    whole = pathlib.Path(mlflow.artifacts.download_artifacts(f"models:/{found.model_id}"))
    assert (whole / "weights/all.bin").read_bytes() == bytes(range(200))
    found_files = {p.name for p in whole.rglob("*") if p.is_file()}
    # MLflow adds the last where a model of the registry is fetched.
    assert found_files - {"registered_model_meta"} == {"all.bin", "note.txt", "MLmodel"}
    described = Model.load(str(whole))
    assert (described.model_id, described.run_id) == (found.model_id, run.info.run_id)


def test_a_model_is_stored_with_its_run(store, model) -> None:
    told(store, model)
    require_whole()
    assert not (store / "output" / PLACE).exists()


def test_every_request_that_is_tried_twice_ends_the_same(store, model, monkeypatch) -> None:
    """As where the answer to each is lost."""
    once = Messenger.__call__

    def twice(self, request, file, *, again) -> None:
        once(self, request, file, again=again)
        once(self, request, file, again=True)

    monkeypatch.setattr(Messenger, "__call__", twice)
    told(store, model)
    require_whole()


@pytest.mark.parametrize("kind", [MODEL, "model_file", MODEL_READY])
def test_a_model_that_the_store_never_answered_for_is_sent_later(store, model, monkeypatch, kind):
    """The store goes away amid the model, after having done what it was asked; the files in the
    run's folder are gone when it is back.
    """
    once = Messenger.__call__

    def away(self, request, file, *, again) -> None:
        if request.kind == kind or self.__dict__.setdefault("is_gone", False):
            if not self.is_gone:
                once(self, request, file, again=again)
            self.is_gone = True
            raise OutageError("nobody there: make that store reachable")
        once(self, request, file, again=again)

    monkeypatch.setattr(Messenger, "__call__", away)
    with pytest.raises(OutageError, match="did not come back"):
        told(store, model)
    monkeypatch.setattr(Messenger, "__call__", once)
    shutil.rmtree(model.folder)
    (found,) = deliver(store / "output")
    assert not found.error
    require_whole()
    assert list(left_behind.deliver(store / "output")) == []


def test_a_model_that_is_refused_fails_no_run(store, model, monkeypatch) -> None:
    said: list[str] = []

    def refuse(self, *args, **more):
        raise MlflowException("the quota is used up", error_code=3)  # PERMISSION_DENIED or alike

    monkeypatch.setattr(LoggedModels, "__call__", refuse)
    monkeypatch.setattr("healing.tracking.sending.requests.LoggedModels", LoggedModels)
    monkeypatch.setattr(
        MlflowException, "get_http_status_code", lambda self: 400 if "quota" in str(self) else 500
    )
    with open_runs.start("r", {"stage": "attack"}, say=said.append) as run:
        run.model(model)
    (line,) = said
    assert line.startswith("warning: ")
    assert "the quota is used up" in line
    assert str(model.folder) in line
    assert MlflowClient().get_run(run.run_id).info.status == "FINISHED"
    assert model.folder.is_dir()


def test_the_description_of_a_model_comes_last(model) -> None:
    found = files_of(model.folder)
    assert [path.name for path, _ in found][-1] == "MLmodel"
    assert {path.name: place for path, place in found}["all.bin"] == "weights"


@pytest.mark.parametrize("text", ["a/b", "nano.v1 %", "'", ":", "x" * 500])
def test_names_of_models_are_taken(store, text) -> None:
    client = MlflowClient()
    client.create_logged_model(client.create_experiment("e"), model_name(text))
