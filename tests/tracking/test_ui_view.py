"""The saved view: decoded again, and its tag on the experiment."""

from __future__ import annotations

import base64
import json
import re
import zlib

from mlflow.tracking import MlflowClient

from healing.measurements.probe import Measurement
from healing.measurements.recovery import Damage, State
from healing.measurements.spectrum import Spectrum
from healing.tracking import open_runs, queries, ui_view
from healing.training.healing_loop import HealRecord


def logged_metrics() -> set[str]:
    import torch

    spectrum = Spectrum(torch.tensor([2.0, 1.0], dtype=torch.float64), 10, 0.0)
    record = HealRecord(0, 0, Measurement(1.0, 0, (spectrum,)))
    state = State(2.0, 1.0, 2.7)
    return set(record.metrics()) | set(Damage(state, state).recovery(state))


def test_view_is_what_mlflow_unpacks():
    stored = json.loads(ui_view.encoded(5))
    assert (stored["name"], stored["createdAt"]) == ("Healing runs", 5)
    kind, packed = stored["state"].split(";")
    assert kind == "deflate"
    state = json.loads(zlib.decompress(base64.b64decode(packed)))
    assert state == ui_view.view_state()
    assert state["selectedColumns"][0] == "tags.`model`"


def test_view_names_metrics_that_exist():
    names = logged_metrics()
    assert {name for kind, name in ui_view.COLUMNS if kind == "metrics"} <= names
    shown = {name for name in names if re.search(ui_view.CHARTS, name)}
    assert len(shown) == 6


def test_view_is_stored_with_the_experiment(store):
    with open_runs.start("a", {"stage": "main"}) as run:
        path = queries.share_view(run.experiment_id)
    tags = MlflowClient().get_experiment(run.experiment_id).tags
    assert tags["mlflow.sharedViewState.healing"]
    assert f"/experiments/{run.experiment_id}/runs?viewStateShareKey=healing" in path
