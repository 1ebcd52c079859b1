"""Faults of a cluster's workers, installed in each by Ray's set-up hook: at the record of a step a
worker kills itself, with its disk or without, or says where it is and waits until its machine is
taken away, or holds its machine until another has come, or kills what the sweep counts with.

``faults.json`` in the folder that ``RAY_FAULTS`` names: part of the name of a run's folder → step
→ fault.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import signal
import threading
from collections.abc import Mapping
from typing import Any

FOLDER = "RAY_FAULTS"
KILL, LOSE, WAIT, HOLD, UNCOUNT = "kill", "lose", "wait", "hold", "uncount"
COUNTING = ("ray::Board", "ray::Claims")
"""Names of the processes of a sweep's actors."""
ADDED = "added"
"""File with the id of the machine that came."""


def install() -> None:
    """Have the faults of this worker happen."""
    from healing.tracking.run_files import JsonLines

    append = JsonLines.append

    def appended(self: JsonLines, record: Mapping[str, Any]) -> None:
        append(self, record)
        if self.path.name == "metrics.jsonl":
            happen(self.path.parent, str(record["step"]))

    JsonLines.append = appended  # type: ignore[method-assign]


def happen(folder: pathlib.Path, step: str) -> None:
    """The fault of this run and step, if it has one that did not happen yet."""
    run = folder.name
    place = pathlib.Path(os.environ[FOLDER])
    for part, faults in json.loads((place / "faults.json").read_text()).items():
        marker = place / f"{part}-{step}"
        if part not in run or step not in faults or marker.exists():
            continue
        if faults[step] == HOLD:
            wait_for_a_run_on(place / ADDED)
            continue
        if faults[step] == UNCOUNT:
            marker.write_text(json.dumps(kill_actors()))
            continue
        wait_for_a_stored_state(run)
        if faults[step] in (KILL, LOSE):
            if faults[step] == LOSE:
                shutil.rmtree(folder.parent)
            marker.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        import ray

        partial = marker.with_suffix(".partial")
        partial.write_text(ray.get_runtime_context().get_node_id())
        partial.replace(marker)
        threading.Event().wait()  # until the machine is gone


def kill_actors() -> list[bool]:
    """Whether each process of an actor ran on the head, before it was killed."""
    import psutil

    found = [p for p in psutil.process_iter() if p.name().startswith(COUNTING)]
    on_head = [any("--head" in word for word in p.parent().cmdline()) for p in found]
    for process in found:
        process.kill()
    return on_head


def wait_for_a_stored_state(run: str) -> None:
    """What was saved is on its way to the store, which is no fault of this test's."""
    own = run.rpartition("_")[2]  # a fingerprint's beginning
    _wait_for(f"tags.kept_state != '' and tags.fingerprint LIKE '{own}%'")


def wait_for_a_run_on(added: pathlib.Path) -> None:
    """A machine that came is of use."""
    while not added.exists():
        threading.Event().wait(0.2)
    _wait_for(f"tags.ray_node_id = '{added.read_text()}'")


def _wait_for(wanted: str) -> None:
    from mlflow.tracking import MlflowClient

    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    while not client.search_runs(experiments, wanted):
        threading.Event().wait(0.2)
