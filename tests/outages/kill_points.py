"""Kill a command at every write, rename, removal and request that it makes, and let it go on.

``python -m tests.outages.kill_points heal FOLDER`` enumerates the points of one uninterrupted run,
then for each of them forks a process that is killed there (SIGKILL) and one that runs the same
command again, and compares what there is in the end with the uninterrupted run. One JSON line per
point. ``--every 7`` takes every seventh, ``--first 3`` begins with the third.

As SQLite's crash tests do: the points are what the program does, not times drawn at random.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import mlflow
import torch
from click.testing import CliRunner
from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from entrypoints.attack import main as attack
from entrypoints.heal import main as heal
from entrypoints.summarize import main as summarize
from healing.tracking import snapshots
from healing.tracking.page_text import plain_tags
from healing.tracking.sending.outbox import PLACE
from healing.tracking.sending.requests import Messenger
from tests.stages.test_resume import content, files, histories, without

SMALL = (
    "--model nano --sequence-length 64 --probe-tokens 512 --batch-size 2 --measurement-interval 2 "
    "--checkpoint-interval 2 --verbosity quiet --log-images false"
)
COMMANDS: dict[str, tuple[Any, str]] = {
    "attack": (attack, f"{SMALL} --arm random_tokens --attack-steps 4"),
    "heal": (
        heal,
        f"{SMALL} --log-text false --healing-steps 4 --collapsed-checkpoint ../checkpoint.pt",
    ),
    "summarize": (summarize, "--verbosity quiet"),
}
WATCHED = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate")
HIDDEN = (".state", ".previous", ".dropped")
OWN_TAGS = (
    "mlflow.", "local_run_id", "process", "heartbeat", "resumed_", "seconds", "checkpoint",
)  # fmt: skip
"""Tags that differ from one run to its repetition: ids, times, paths, who ran it."""
CHUNKS = 60
"""A state is written in some hundred pieces: the process is killed amid every so many of them."""
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Points:
    """Counts what a process does to files and to its store; kills it at one of them."""

    def __init__(self, root: pathlib.Path, kill_at: int) -> None:
        self.root, self.kill_at, self.seen = str(root.resolve()), kill_at, []

    def reached(self, what: str) -> None:
        self.seen.append(what)
        if len(self.seen) == self.kill_at:
            (pathlib.Path(self.root).parent / "killed_at").write_text(what)
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """Python tells of every file that is opened, renamed, removed."""
        if event == "open":
            path, _, flags = args
            if not isinstance(path, (str, bytes)) or not flags & WRITING:
                return
        elif event not in WATCHED:
            return
        path = os.path.abspath(os.fsdecode(args[0]))
        if path.startswith(self.root) and ".db" not in path:
            self.reached(f"{event} {path.removeprefix(self.root)[-60:]}")

    def install(self) -> None:
        """From now on, in this process."""
        carry_out, fsync, save = Messenger.__call__, os.fsync, torch.save
        write = snapshots._Hashing.write

        def carried_out(messenger: Messenger, request: Any, *args: Any, **options: Any) -> None:
            self.reached(f"request {request.kind}, before")
            carry_out(messenger, request, *args, **options)
            self.reached(f"request {request.kind}, answered")

        def synced(handle: int) -> None:
            self.reached("fsync, before")
            fsync(handle)

        def saved(*args: Any, **options: Any) -> None:
            self.reached("torch.save, before")
            save(*args, **options)
            self.reached("torch.save, after")

        chunks = iter(range(10**9))

        def written(stream: Any, data: Any) -> int:
            if next(chunks) % CHUNKS == CHUNKS // 2:
                self.reached("inside a state's file")
            return write(stream, data)

        Messenger.__call__ = carried_out  # type: ignore[method-assign]
        os.fsync, torch.save = synced, saved
        snapshots._Hashing.write = written  # type: ignore[method-assign]
        sys.addaudithook(self.audit)


def in_a_fork(work: Callable[[], None]) -> int:
    """Run something in a process of its own; its exit code, negative for a signal."""
    pid = os.fork()
    if not pid:
        try:
            # torch makes its pool of threads anew after a fork, and not safely from two threads at
            # once (the model's weights are read by several): here there is one.
            torch.set_num_threads(1)
            work()
        except BaseException as error:  # noqa: BLE001
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run(name: str, place: pathlib.Path, points: Points | None = None) -> None:
    """The command in its folder, and what it left as ``left.json``, if it came to its end."""
    os.chdir(place)
    uri = f"sqlite:///{place}/mlflow.db"
    os.environ["MLFLOW_TRACKING_URI"] = uri
    mlflow.set_tracking_uri(uri)
    command, arguments = COMMANDS[name]
    if points is not None:
        points.install()
    done = CliRunner().invoke(command, arguments.split())
    if done.exit_code:
        raise RuntimeError(f"exit code {done.exit_code}: {done.output}{done.stderr}")
    if points is not None:
        (place / "points.json").write_text(json.dumps(points.seen))
    (place / "left.json").write_text(json.dumps(left(place), default=repr))


def left(place: pathlib.Path) -> dict[str, Any]:
    """What there is in the end, but for times and names of runs."""
    output = place / "experiments" / "results"
    client = MlflowClient()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    runs.sort(key=lambda run: run.info.start_time)
    summaries = [(p.name, p.read_text()) for p in output.glob("summaries/*/summary.csv")]
    return {
        "files": without({k: repr(v) for k, v in files(output, "seed0").items()}),
        "summaries": summaries[-1:],
        "histories": histories(),
        "others": [r.info.status for r in runs if r.info.status not in ("FINISHED", "KILLED")],
        "finished": sum(r.info.status == "FINISHED" for r in runs),
        **of_the_store([r for r in runs if r.info.status == "FINISHED"][-1]),
        "hidden": sorted(p.name for p in output.rglob(".*") if p.suffix in HIDDEN)
        + [PLACE] * (output / PLACE).exists(),
    }


def of_the_store(run: Run) -> dict[str, Any]:
    """What the store has of a run: files, parameters, tags."""
    root = pathlib.Path(local_file_uri_to_path(run.info.artifact_uri))
    stored = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_file()}
    tags = plain_tags(run.data.tags)
    names = {name for name in tags if not name.startswith(OWN_TAGS)}
    return {
        "stored": {name: repr(content(path)) for name, path in stored.items()},
        "params": dict(run.data.params),
        "tags": {name: tags[name] for name in sorted(names)},
    }


def empty_store(path: pathlib.Path) -> None:
    MlflowClient(f"sqlite:///{path}").search_experiments()


def prepared(root: pathlib.Path, name: str, label: str) -> pathlib.Path:
    """A folder with a copy of the store that comes before the command."""
    place = root / label / "place"
    shutil.rmtree(place.parent, ignore_errors=True)
    shutil.copytree(root / "before", place)
    return place


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("folder", type=pathlib.Path, nargs="?")
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--first", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    root = (given.folder or pathlib.Path(tempfile.mkdtemp())).resolve()
    before = root / "before"
    before.mkdir(parents=True, exist_ok=True)
    if not (root / "empty.db").exists():  # in a process of its own: a store is not to be forked
        assert in_a_fork(lambda: empty_store(root / "empty.db")) == 0
    for name in {"heal": ("attack",), "summarize": ("attack", "heal")}.get(given.command, ()):
        assert in_a_fork(lambda name=name: run(name, before)) == 0, name  # type: ignore[misc]
        found = before.glob("experiments/results/**/checkpoint_post_treatment.pt")
        shutil.copy(next(found), root / "checkpoint.pt")
        for label in ("whole", "cut"):
            (root / label).mkdir(exist_ok=True)
    if not (before / "mlflow.db").exists():
        shutil.copy(root / "empty.db", before / "mlflow.db")
    whole = prepared(root, given.command, "whole")
    if given.command == "heal":
        shutil.copy(root / "checkpoint.pt", whole.parent)
    assert in_a_fork(lambda: run(given.command, whole, Points(whole, 0))) == 0
    points = json.loads((whole / "points.json").read_text())
    expected = json.loads((whole / "left.json").read_text())
    print(json.dumps({"command": given.command, "points": len(points)}), flush=True)
    for number in range(given.first, len(points) + 1, given.every):
        place = prepared(root, given.command, "cut")
        if given.command == "heal":
            shutil.copy(root / "checkpoint.pt", place.parent)
        at = Points(place, number)
        code = in_a_fork(lambda at=at, place=place: run(given.command, place, at))  # type: ignore[misc]
        again = in_a_fork(lambda place=place: run(given.command, place))  # type: ignore[misc]
        report = {"point": number, "what": points[number - 1], "killed": code == -signal.SIGKILL}
        if again:
            report["wrong"] = [f"running it again: exit code {again}"]
        else:
            found = json.loads((place / "left.json").read_text())
            report["wrong"] = [key for key in expected if differs(expected, found, key)]
        print(json.dumps(report), flush=True)


def differs(expected: dict[str, Any], found: dict[str, Any], key: str) -> bool:
    """Whether something is not as it was to be. A run that was killed after its end was stored is
    there beside the second.
    """
    if key == "finished":
        return found[key] not in (expected[key], expected[key] + 1)
    if key == "histories":
        return found[key] not in (expected[key], [*expected[key], *expected[key][-1:]])
    if key == "summaries":
        return [text for _, text in found[key]] != [text for _, text in expected[key]]
    return bool(found[key] != expected[key])


if __name__ == "__main__":
    main()
