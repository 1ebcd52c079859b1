"""Faults of a cluster's workers, installed in each by Ray's set-up hook: at the record of a step a
worker kills itself, or says where it is and waits until its machine is taken away.

``faults.json`` in the folder that ``RAY_FAULTS`` names: part of the name of a run's folder → fault.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import threading
from collections.abc import Mapping
from typing import Any

FOLDER = "RAY_FAULTS"
STEP = 6
KILL, WAIT = "kill", "wait"


def install() -> None:
    """Have the faults of this worker happen."""
    from healing.tracking.run_files import JsonLines

    append = JsonLines.append

    def appended(self: JsonLines, record: Mapping[str, Any]) -> None:
        append(self, record)
        if self.path.name == "metrics.jsonl" and record["step"] == STEP:
            happen(self.path.parent.name)

    JsonLines.append = appended  # type: ignore[method-assign]


def happen(run: str) -> None:
    """The fault of this run, if it has one that did not happen yet."""
    place = pathlib.Path(os.environ[FOLDER])
    faults = json.loads((place / "faults.json").read_text())
    for part, fault in faults.items():
        marker = place / part
        if part in run and not marker.exists():
            wait_for_a_stored_state(run)
            if fault == KILL:
                marker.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGKILL)
            import ray

            marker.write_text(ray.get_runtime_context().get_node_id())
            with (place / "pipe").open("w") as pipe:  # until somebody reads
                pipe.write(part)
            threading.Event().wait()  # until the machine is gone


def wait_for_a_stored_state(run: str) -> None:
    """What was saved is on its way to the store, which is no fault of this test's."""
    from mlflow.tracking import MlflowClient

    client, own = MlflowClient(), run.rpartition("_")[2]  # a fingerprint's beginning
    experiments = [e.experiment_id for e in client.search_experiments()]
    wanted = f"tags.kept_state != '' and tags.fingerprint LIKE '{own}%'"
    while not client.search_runs(experiments, wanted):
        threading.Event().wait(0.2)
