"""Two who enter the same text of a corpus into one database at the same moment."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

from mlflow.entities import Dataset, DatasetInput
from mlflow.store.tracking import sqlalchemy_store
from mlflow.tracking import MlflowClient

from healing.tracking.store import MlflowStore


def test_a_text_that_another_enters_meanwhile_is_no_failure(store, monkeypatch):
    own, client = MlflowStore(), MlflowClient()
    with own.start("sweep", {"stage": "main"}) as run:
        other = client.create_run(run.experiment_id).info.run_id
        entered: list[str] = []

        def between() -> uuid.UUID:
            """Of the new entry, asked for once MLflow has seen that there is none."""
            if not entered:
                entered.append(other)
                same = Dataset("stdlib-train", "digest", "code", "{}")
                client.log_inputs(other, datasets=[DatasetInput(same, [])])
            return uuid.uuid4()

        monkeypatch.setattr(sqlalchemy_store, "uuid", SimpleNamespace(uuid4=between))
        run.dataset("stdlib-train", "digest", "training", {"split": "train"})
        run.flush()
    assert entered == [other]
    (found,) = client.get_run(run.run_id).inputs.dataset_inputs
    assert found.dataset.name == "stdlib-train"
