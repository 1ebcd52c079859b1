"""Faults of a cluster's workers, installed in each by Ray's set-up hook: at the record of a step a
worker kills itself, with its disk or without, once or at every try, or says where it is and waits
until its machine is taken away, or holds its machine until another has come, or runs out of memory,
or its device fails, or it hears nothing any more. What a sweep counts with kills itself when it is
asked, before it answers. Machines have other code, or a package that cannot be loaded.

``faults.json`` in the folder that ``RAY_FAULTS`` names: part of the name of a run's folder → step
→ fault; or :data:`ACTORS`; or :data:`UNFIT` → id of a node → what is wrong with it.
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

import torch

FOLDER = "RAY_FAULTS"
KILL, LOSE, WAIT, HOLD, LACK = "kill", "lose", "wait", "hold", "lack"
ALWAYS, DEVICE, DEAF = "always", "device", "deaf"
UNFIT = "unfit"
"""In place of a run's folder: machines that are."""
OTHER_CODE, NO_PACKAGE = "other code", "no package"
ACTORS = "actors"
"""In place of a run's folder: each of :data:`ASKED` kills its actor, once."""
ASKED = ("Board.enters", "Board.begins", "Board.leaves", "Claims.take")
ADDED = "added"
"""File with the id of the machine that came."""


def install() -> None:
    """Have the faults of this worker happen."""
    from healing.stages.launching import board, claims, ray_task, ray_worker
    from healing.tracking.run_files import JsonLines

    kinds = {"Board": board.Board, "Claims": claims.Claims}
    for asked in ASKED:
        _die_in(kinds[asked.split(".")[0]], asked)
    code_here = ray_worker.code_here
    ray_worker.code_here = lambda: "other" if _wrong_here() == OTHER_CODE else code_here()
    ray_task.Task.__setstate__ = _loaded  # type: ignore[attr-defined]
    append = JsonLines.append

    def appended(self: JsonLines, record: Mapping[str, Any]) -> None:
        append(self, record)
        if self.path.name == "metrics.jsonl":
            happen(self.path.parent, str(record["step"]))

    JsonLines.append = appended  # type: ignore[method-assign]


def _wrong_here() -> str:
    import ray

    wanted = json.loads((pathlib.Path(os.environ[FOLDER]) / "faults.json").read_text())
    return str(wanted.get(UNFIT, {}).get(ray.get_runtime_context().get_node_id(), ""))


def _loaded(task: Any, state: Mapping[str, Any]) -> None:
    """What a package of another version makes of a description."""
    if _wrong_here() == NO_PACKAGE:
        raise AttributeError("Task has no attribute 'above'")
    task.__dict__.update(state)


def _die_in(kind: Any, asked: str) -> None:
    """Have an actor die when it is first asked this."""
    name = asked.split(".")[1]
    answer = getattr(kind, name)

    def answered(self: Any, *words: Any) -> Any:
        place = pathlib.Path(os.environ[FOLDER])
        marker = place / asked
        if ACTORS in json.loads((place / "faults.json").read_text()) and not marker.exists():
            marker.write_text(" ".join(_raylet()))
            os.kill(os.getpid(), signal.SIGKILL)
        return answer(self, *words)

    setattr(kind, name, answered)


def _raylet() -> list[str]:
    """How the node of this process was started."""
    import psutil

    return psutil.Process().parent().cmdline()


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
        if faults[step] == ALWAYS:
            os.kill(os.getpid(), signal.SIGKILL)
        if faults[step] == DEAF:
            marker.write_text(str(os.getpid()))
            threading.Event().wait()
        if faults[step] == DEVICE:
            wait_for_a_stored_state(run)
            marker.write_text(str(os.getpid()))
            raise torch.AcceleratorError("CUDA error: unspecified launch failure")
        if faults[step] == LACK:
            marker.write_text(str(os.getpid()))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9.00 GiB.")
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
