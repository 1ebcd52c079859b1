"""Two who enter the same text of a corpus into one database at the same moment."""

from __future__ import annotations

import uuid
from types import SimpleNamespace

from mlflow.store.tracking import sqlalchemy_store
from mlflow.tracking import MlflowClient

from healing.tracking.store import MlflowStore

TEXT = ("stdlib-train", "digest", "training", {"split": "train"})


def test_a_text_that_another_enters_meanwhile_is_no_failure(store, monkeypatch):
    own = MlflowStore()
    with own.start("sweep", {"stage": "main"}) as run:
        with own.child(run, "one", {}) as one, own.child(run, "two", {}) as two:
            one.flush()
            two.flush()
            told: list[str] = []

            def between() -> uuid.UUID:
                """Of the new entry, asked for once MLflow has seen that there is none."""
                if not told:
                    told.append("two")
                    two.dataset(*TEXT)
                    two.flush()
                return uuid.uuid4()

            monkeypatch.setattr(sqlalchemy_store, "uuid", SimpleNamespace(uuid4=between))
            one.dataset(*TEXT)
            one.flush()
        assert told == ["two"]
        for child in (one, two):
            (found,) = MlflowClient().get_run(child.run_id).inputs.dataset_inputs
            assert found.dataset.name == "stdlib-train"
