"""Models of MLflow's transformers flavour: written first, then kept in a store, one file a request,
so that each can be sent twice to the same end.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import logging
import math
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mlflow.entities import LoggedModelOutput, LoggedModelStatus, Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode
from mlflow.tracking import MlflowClient

from healing.errors import OutputError, TrackingError

MODEL, MODEL_FILE, MODEL_READY = MODELS = ("model", "model_file", "model_ready")
"""Kinds of request: the model is made, gets a file, is whole."""
LOCAL_MODEL_ID = "local_model_id"
"""Tag: what the process called a model before the store named it; it is made once for each."""
MADE_BY = "llm_healing.stage"
"""Tag of a model: the stage of this program that made it."""
REQUIRED = ("mlflow", "torch", "transformers", "safetensors")
"""Libraries that a stored model is loaded with."""
EXAMPLE = "The model goes on from here"
"""Input example of every stored model."""
_DESCRIPTION = "MLmodel"


@dataclass(frozen=True)
class ModelFiles:
    """A model on disk that is to be kept in a store.

    Attributes:
        name: Shown in the UI.
        folder: As :func:`write_model` leaves it.
        facts: What it is: parameters of the model in the store.
        stage: That made it.
        register_as: Model of the registry that it becomes a version of; empty = none.
    """

    name: str
    folder: pathlib.Path
    facts: Mapping[str, Any] = field(default_factory=dict)
    stage: str = ""
    register_as: str = ""


def model_name(text: str) -> str:
    """A name that MLflow takes for a logged model: ``nano haep`` → ``nano-haep``."""
    return re.sub(r"[^\w]+", "-", text).strip("-")[:200] or "model"


def write_model(folder: pathlib.Path, model: Any, tokenizer: Any, card: Any) -> None:
    """Write weights and tokenizer as a model of the transformers flavour, with a signature (text →
    text), an input example and pinned requirements. Nothing is run and nothing is asked of the Hub.

    Args:
        folder: New; what is there is replaced.
        model: Of transformers; keeps its device.
        tokenizer: Of transformers; stays as it is.
        card: Model card of huggingface_hub.

    Raises:
        OutputError: MLflow or transformers cannot write it.
    """
    # Seconds of import that only this needs.
    import mlflow.transformers
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from transformers import pipeline

    shutil.rmtree(folder, ignore_errors=True)
    text = Schema([ColSpec(DataType.string)])
    required = [f"{name}=={importlib.metadata.version(name)}" for name in REQUIRED]
    with _without_address(model):
        # A pipeline fills gaps of the tokenizer, and would move the model to an accelerator.
        whole = pipeline(
            "text-generation", model=model, tokenizer=copy.deepcopy(tokenizer), device=model.device
        )
        try:
            mlflow.transformers.save_model(
                whole,
                str(folder),
                signature=ModelSignature(inputs=text, outputs=text),
                input_example=EXAMPLE,
                pip_requirements=required,
                model_card=card,
            )
        except (MlflowException, ValueError, NotImplementedError) as error:
            raise OutputError(
                f"--log-model: the model cannot be written in MLflow's transformers flavour "
                f"({' '.join(str(error).split())[:300]}): leave --log-model out"
            ) from error
    (folder / "LICENSE.txt").write_text(
        "The licence of the weights that these were made from; the model card names them.\n",
        encoding="utf-8",
    )


@contextlib.contextmanager
def _without_address(model: Any) -> Iterator[None]:
    """The model names no folder or repository for the block: MLflow would ask the Hub for its
    licence, and write a path of this machine down.
    """
    logger, before = logging.getLogger("mlflow.transformers"), model.name_or_path
    level = logger.level
    model.name_or_path = ""
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        model.name_or_path = before
        logger.setLevel(level)


def files_of(folder: pathlib.Path) -> list[tuple[pathlib.Path, str]]:
    """Every file of a written model with the folder that it has in the store, its description last:
    who sees that has all of it.
    """
    found = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found.sort(key=lambda path: path.name == _DESCRIPTION)
    places = [path.parent.relative_to(folder).as_posix() for path in found]
    return [
        (path, "" if place == "." else place) for path, place in zip(found, places, strict=True)
    ]


class LoggedModels:
    """Carries out the requests of models.

    Args:
        client: Of the store.
    """

    def __init__(self, client: MlflowClient) -> None:
        self._client = client
        self._ids: dict[str, str] = {}

    def __call__(
        self,
        kind: str,
        run: str,
        experiment: str,
        content: Mapping[str, Any],
        file: pathlib.Path | None,
        *,
        again: bool,
    ) -> None:
        """Carry one out.

        Args:
            kind: One of :data:`MODELS`.
            run: The store's id of the run that made the model.
            experiment: Of the run.
            content: Of the request.
            file: Of the model.
            again: Whether it was tried before, and may have arrived.

        Raises:
            MlflowException: The store refuses it, or is away.
            TrackingError: It refused the model, so that nothing of it can be stored.
        """
        key = content["id"]
        if kind != MODEL and key not in self._ids:
            raise TrackingError(
                f"model {content['name']} of run {run} is not in the store, which refused it: "
                "neither is this part of it"
            )
        if kind == MODEL:
            self._ids[key] = self._made(run, experiment, content, again=again)
        elif kind == MODEL_FILE:
            assert file is not None, "a file of a model is one"
            self._send(self._ids[key], run, file, content["folder"])
        else:
            self._complete(self._ids[key], run, content, again=again)

    def _made(self, run: str, experiment: str, content: Mapping[str, Any], *, again: bool) -> str:
        found = self._made_before(experiment, content["id"]) if again else ""
        if not found:
            made = self._client.create_logged_model(
                experiment, content["name"], run,
                {**content["tags"], LOCAL_MODEL_ID: content["id"]}, dict(content["facts"]),
            )  # fmt: skip
            found = str(made.model_id)
        if not again or found not in self._made_by(run):
            self._client.log_outputs(run, [LoggedModelOutput(found, step=content["step"])])
        return found

    def _made_before(self, experiment: str, key: str) -> str:
        wanted = f"tags.{LOCAL_MODEL_ID} = '{key}'"
        found = self._client.search_logged_models([experiment], wanted, max_results=1)
        return str(found[0].model_id) if found else ""

    def _made_by(self, run: str) -> list[str]:
        outputs = self._client.get_run(run).outputs
        return [o.model_id for o in outputs.model_outputs] if outputs else []

    def _send(self, model: str, run: str, file: pathlib.Path, folder: str) -> None:
        if file.name != _DESCRIPTION:
            self._client.log_model_artifact(model, str(file), folder or None)
            return
        # Only the store says what the model is called: its description learns it here.
        from mlflow.models import Model

        described = Model.load(str(file))
        described.model_id = described.model_uuid = model
        described.run_id = run
        described.artifact_path = self._client.get_logged_model(model).artifact_location
        with tempfile.TemporaryDirectory() as place:
            path = pathlib.Path(place) / _DESCRIPTION
            described.save(str(path))
            self._client.log_model_artifact(model, str(path), folder or None)

    def _complete(self, model: str, run: str, content: Mapping[str, Any], *, again: bool) -> None:
        # The run's own points, once more as the model's: of the same time, so that the run keeps
        # one of each.
        points = [
            Metric(key, value, moment, step, model_id=model, run_id=run)
            for key, value, moment, step in content["metrics"]
        ]
        if points:
            self._client.log_batch(run, metrics=points)
        self._client.finalize_logged_model(model, LoggedModelStatus.READY)
        if content["register_as"]:
            self._register(model, run, content, again=again)

    def _register(self, model: str, run: str, content: Mapping[str, Any], *, again: bool) -> None:
        name = content["register_as"]
        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
                raise
            self._client.get_registered_model(name)  # there is none where a prompt has the name
        if again:
            found = self._client.search_model_versions(f"run_id = '{run}'")
            if any(v.name == name and model_of_version(v) == model for v in found):
                return
        tags = {**content["facts"], **content["tags"]}
        self._client.create_model_version(name, f"models:/{model}", run, tags, model_id=model)


def model_of_version(version: ModelVersion) -> str:
    """Id of the logged model that a version of the registry is; empty = it is none. A database
    stores it in the source alone.
    """
    source = re.fullmatch(r"models:/(m-[^/]+)", version.source or "")
    return str(version.model_id or (source[1] if source else ""))


def requests_of(
    model: ModelFiles, key: str, metrics: Sequence[Metric]
) -> Iterator[tuple[str, dict[str, Any], pathlib.Path | None]]:
    """What a store is told of a model: kind, content without places, file.

    Args:
        model: To keep.
        key: Of it, which no other model has.
        metrics: Final numbers of its run; the finite ones are stored.
    """
    about = {"id": key, "name": model_name(model.name)}
    facts = {name: str(value) for name, value in model.facts.items() if str(value)}
    kept = {**about, "facts": facts, "tags": {MADE_BY: model.stage}}
    yield MODEL, {**kept, "step": 0}, None
    for path, folder in files_of(model.folder):
        yield MODEL_FILE, {**about, "folder": folder}, path
    # A model's NaN is stored as 0 (3.17.2): an undefined recovery would be none at all.
    finite = [m for m in metrics if math.isfinite(m.value)]
    points = [[m.key, m.value, m.timestamp, m.step] for m in finite]
    yield MODEL_READY, {**kept, "metrics": points, "register_as": model.register_as}, None
