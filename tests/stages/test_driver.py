"""The driver on a stage of a few numbers: runs, folders, order of writes, reuse, what plugs in."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from healing.errors import ConfigError, CorpusError, TrackingError
from healing.progress import Safe, Stop, Stopped, phase
from healing.stages.cells.events import Begin, Input, Record
from healing.stages.driver import Driver
from healing.stages.stage import Done, Report, StageDefaults
from healing.stages.terminal.console import Console, Silence
from healing.tracking.local_store import LocalStore
from healing.tracking.output_folder import run_folder
from healing.tracking.run_files import read_jsonl
from healing.tracking.snapshots import Kept


@dataclass(frozen=True)
class Config:
    output_dir: str
    steps: int = 6
    first: int = 0
    name: str = "toy"


class Toy(StageDefaults):
    """Sums the steps; measures every second one, is safe after each."""

    name = "toy"

    def __init__(self, at: Callable[[str], None] = lambda _: None) -> None:
        self.at = at
        self.closed = 0
        self.computed: list[int] = []

    def title(self, config: Config) -> str:
        return f"toy {config.steps}"

    def tags(self, config: Config) -> dict[str, Any]:
        return {"arm": "toy"}

    def prepare(self, config, tools):
        self.at("prepare")
        if config.first:
            self.found = tools.first(self, replace(config, steps=config.first, first=0))
        return config

    def cell(self, config):
        try:
            for i in phase("bases", range(3), 3):
                self.at(f"base {i}")
            kept = yield Begin(
                f"f{config.steps}",
                config.name,
                {"steps": config.steps},
                config.steps,
                tags={"colour": "red"},
                counts={"n_params": 7},
                inputs=(Input("/data/text.txt", "train", "d1", "training"),),
                warnings=("few rows",),
            )
            step, total = kept or (0, 0)
            while step < config.steps:
                step += 1
                total += step
                self.computed.append(step)
                self.at(str(step))
                if step % 2 == 0:
                    metrics = {"total": float(total), "undefined": math.nan}
                    yield Record(step, metrics, f"total {total}")
                yield Safe(step, state=lambda step=step, total=total: self.state(step, total))
            return total
        finally:
            self.closed += 1

    def state(self, step: int, total: int) -> tuple[int, int]:
        """What is kept of a safe point."""
        return step, total

    def store(self, outcome, records, folder, run_id):
        (folder / "plots").mkdir()
        (folder / "plots" / "total.png").write_bytes(b"")
        points = [(records[-1].step, {"summary/total": float(outcome)})]
        return Report(points, {"verdict": "fine"}, f"**{outcome}**", "done", result=outcome)


def driver(store: LocalStore | None = None, **plugs) -> Driver:
    return Driver(Console("quiet"), store or LocalStore(), **plugs)


def run(d: Driver, stage: Toy, config: Config, **options):
    with d.process("process", {"stage": "toy"}) as own:
        return d.run_cell(stage, config, run=own, **options)


def test_a_run_has_everything_that_its_cell_and_stage_said(tmp_path):
    d = driver()
    done = run(d, Toy(), Config(str(tmp_path)))
    view = d.store.get_run(done.run_id)
    assert view.status == "FINISHED"
    assert view.name == "toy 6"
    assert view.tags["stage"] == "toy"
    assert view.tags["fingerprint"] == "f6"
    assert {view.tags[k] for k in ("arm", "colour", "verdict")} == {"toy", "red", "fine"}
    assert view.params == {
        "toy.output_dir": str(tmp_path), "toy.steps": "6", "toy.first": "0", "toy.name": "toy",
        "n_params": "7",
    }  # fmt: skip
    numbers = {name: value for name, value in view.metrics.items() if "seconds/" not in name}
    assert numbers == {"total": 21.0, "summary/total": 21.0}
    assert done.folder == tmp_path / "priority5_healing/raw_data/toy"
    assert json.loads((done.folder / "config.json").read_text()) == {"steps": 6}
    rows = read_jsonl(done.folder / "metrics.jsonl")
    assert [(row["step"], row["total"]) for row in rows] == [(2, 3.0), (4, 10.0), (6, 21.0)]
    assert all(math.isnan(row["undefined"]) for row in rows)
    names = ("config.json", "metrics.jsonl", "plots/total.png")
    for name in names:
        assert d.store.download(f"runs:/{done.run_id}/{name}") == done.folder / name
    assert done.report.result == 21


def test_a_record_is_on_disk_before_it_is_sent(tmp_path):
    seen = []

    class Watching(LocalStore):
        def start(self, *given):
            context = super().start(*given)

            class Watched:
                def __enter__(self):
                    opened = context.__enter__()
                    send = opened.metrics

                    def metrics(values, step=0):
                        lines = list(tmp_path.rglob("metrics.jsonl"))
                        seen.append((step, len(read_jsonl(lines[0])) if lines else 0))
                        send(values, step)

                    opened.metrics = metrics
                    return opened

                def __exit__(self, *error):
                    return context.__exit__(*error)

            return Watched()

    run(driver(Watching()), Toy(), Config(str(tmp_path)))
    assert seen[:3] == [(2, 1), (4, 2), (6, 3)]


def test_a_finished_cell_is_found_again_and_leaves_no_empty_run(tmp_path):
    d, stage = driver(), Toy()
    with d.process("sweep", {"stage": "main"}) as parent:
        first = d.run_cell(stage, Config(str(tmp_path)), parent=parent, reuse=True)
        n = len(d.store._runs)
        again = d.run_cell(stage, Config(str(tmp_path)), parent=parent, reuse=True)
    assert (first.reused, again.reused) == (False, True)
    assert again.run_id == first.run_id
    assert again.folder == first.folder
    assert len(d.store._runs) == n == 2
    assert stage.computed == [1, 2, 3, 4, 5, 6]
    assert stage.closed == 2


def test_who_waits_for_a_folder_finds_a_finished_run_in_the_store(tmp_path, monkeypatch):
    """A second process enters as soon as the first leaves the folder: what it finds then decides
    whether it puts the first one's files aside, which somebody may be reading.
    """
    d, found = driver(), []

    @contextlib.contextmanager
    def owned(folder, waiting):
        yield
        found.append(d.store.find_finished("not tracked", "f6"))

    monkeypatch.setattr("healing.stages.driver.only_owner", owned)
    with d.process("parent", {"stage": "toy"}) as parent:
        d.run_cell(Toy(), Config(str(tmp_path)), parent=parent, reuse=True)
    assert [run.status for run in found] == ["FINISHED"]


def test_what_another_finished_between_the_look_and_the_lock_is_not_done_again(
    tmp_path, monkeypatch
):
    store, other, late = LocalStore(), Toy(), Toy()

    @contextlib.contextmanager
    def another_was_quicker(folder, waiting):
        if not other.computed:
            with driver(store).process("other", {"stage": "toy"}) as parent:
                monkeypatch.undo()
                driver(store).run_cell(other, Config(str(tmp_path)), parent=parent, reuse=True)
        yield

    monkeypatch.setattr("healing.stages.driver.only_owner", another_was_quicker)
    with driver(store).process("late", {"stage": "toy"}) as parent:
        done = driver(store).run_cell(late, Config(str(tmp_path)), parent=parent, reuse=True)
    assert (other.computed, late.computed) == ([1, 2, 3, 4, 5, 6], [])
    assert store.get_run(done.run_id).status == "FINISHED"


def test_what_another_finished_elsewhere_while_its_cell_was_claimed_is_not_done_again(tmp_path):
    """Two machines share no folder, and so no lock of one."""
    store, other, late, asked = LocalStore(), Toy(), Toy(), []

    @contextlib.contextmanager
    def claimed(fingerprint, waiting):
        asked.append(fingerprint)
        elsewhere = Config(str(tmp_path / "elsewhere"))
        with driver(store).process("other", {"stage": "toy"}) as parent:
            driver(store).run_cell(other, elsewhere, parent=parent, reuse=True)
        waiting("waiting for another")
        yield

    with driver(store).process("late", {"stage": "toy"}) as parent:
        own = driver(store, alone=claimed)
        done = own.run_cell(late, Config(str(tmp_path)), parent=parent, reuse=True)
    assert asked == ["f6"]
    assert (other.computed, late.computed) == ([1, 2, 3, 4, 5, 6], [])
    assert done.reused


def test_what_comes_first_is_a_child_and_run_once(tmp_path):
    d, stage = driver(), Toy()
    with d.process("process", {}) as own:
        d.run_cell(stage, Config(str(tmp_path), first=2), run=own)
        first = d.store.get_run(stage.found.run_id)
        assert first.tags["mlflow.parentRunId"] == own.run_id
        d.run_cell(stage, Config(str(tmp_path), steps=4, first=2, name="b"), parent=own)
    assert stage.found.run_id == first.run_id
    assert stage.computed == [1, 2, *range(1, 7), *range(1, 5)]


@pytest.mark.parametrize("at", ["prepare", "base 1", "3"])
def test_a_child_that_fails_has_a_failed_run_with_its_reason(tmp_path, at):
    def fail(point: str) -> None:
        if point == at:
            raise CorpusError("no text")

    d = driver()
    with d.process("sweep", {}) as parent:
        with pytest.raises(CorpusError):
            d.run_cell(Toy(fail), Config(str(tmp_path)), parent=parent)
        (child,) = [r.view() for r in d.store._runs.values() if r.run_id != parent.run_id]
    assert (child.status, child.tags["failure"]) == ("FAILED", "no text")
    assert child.name == "toy 6"


def test_a_parent_says_what_stopped_its_children(tmp_path):
    d, stage = cut_at("3")
    d.stop.signum = 15
    with pytest.raises(Stopped), d.process("parent", {}) as parent:
        d.run_cell(stage, Config(str(tmp_path)), parent=parent)
    (child,) = [r for r in d.store._runs.values() if r.run_id != parent.run_id]
    tags = [d.store.get_run(run.run_id).tags for run in (parent, child)]
    assert [t["stopped_by"] for t in tags] == ["SIGTERM", "SIGTERM"]
    assert [t.get("stopped_at_step") for t in tags] == [None, "3"]


@pytest.mark.parametrize("at", ["base 1", "3"])
def test_a_stop_ends_a_phase_or_the_step_it_is_in(tmp_path, at):
    stop, stage = Stop(), Toy(lambda point: point == at and stop.set())
    stop.signum = 15
    d = driver(stop=stop)
    with pytest.raises(Stopped) as caught:
        run(d, stage, Config(str(tmp_path)))
    assert caught.value.signum == 15
    assert stage.closed == 1
    assert stage.computed == ([] if at == "base 1" else [1, 2, 3])
    (own,) = d.store._runs.values()
    assert own.status == "KILLED"


class Memory:
    """Snapshots in a dictionary, due after every step."""

    def __init__(self) -> None:
        self.kept: dict[pathlib.Path, Kept] = {}

    def load(self, folder, fingerprint):
        kept = self.kept.get(folder)
        return kept if kept and kept.fingerprint == fingerprint else None

    def save(self, folder, kept):
        self.kept[folder] = replace(kept, records=list(kept.records))

    def drop(self, folder):
        self.kept.pop(folder, None)


@pytest.mark.parametrize("at", range(1, 7))
def test_with_snapshots_a_stopped_cell_goes_on_and_its_history_is_whole(tmp_path, at):
    snapshots, config = Memory(), Config(str(tmp_path))
    stop = Stop()
    stage = Toy(lambda point: point == str(at) and stop.set())
    with pytest.raises(Stopped):
        run(driver(stop=stop, snapshots=snapshots), stage, config)
    whole = run(driver(), Toy(), Config(str(tmp_path / "whole")))
    again = Toy()
    done = run(driver(snapshots=snapshots), again, config)
    assert again.computed == list(range(at + 1, 7))
    assert done.report.result == 21

    def untimed(folder):
        return [{k: str(v) for k, v in row.items() if k != "seconds"}
                for row in read_jsonl(folder / "metrics.jsonl")]  # fmt: skip

    assert untimed(done.folder) == untimed(whole.folder)
    assert snapshots.kept == {}


def test_whoever_waits_for_an_end_hears_that_a_state_is_being_written(tmp_path):
    stop, heard = Stop(), []

    class Watched(Memory):
        def save(self, folder, kept):
            heard.append((kept.step, stop.is_saving))
            super().save(folder, kept)

    class Gathering(Toy):
        def state(self, step, total):
            heard.append((step, stop.is_saving))  # ranks gather what is written
            return super().state(step, total)

    stage = Gathering(lambda point: point == "3" and stop.set())
    with pytest.raises(Stopped):
        run(driver(stop=stop, snapshots=Watched()), stage, Config(str(tmp_path)))
    assert heard == [(3, True), (3, True)]
    assert not stop.is_saving


def test_the_run_that_is_gone_on_with_is_closed(tmp_path, capsys):
    closed = []

    class Closing(LocalStore):
        def close_gone_on_with(self, run_id, by):
            closed.append((run_id, by))
            return [f"{run_id} is KILLED now"]

    snapshots = Memory()
    folder = run_folder(str(tmp_path), Toy.place, "toy")
    snapshots.kept[folder] = Kept("f6", (5, 15), run_id="left on another machine", step=5)
    d = Driver(Console("normal"), Closing(), snapshots=snapshots)
    done = run(d, Toy(), Config(str(tmp_path)))
    assert closed == [("left on another machine", done.run_id)]
    assert "left on another machine is KILLED now" in capsys.readouterr().out
    run(d, Toy(), Config(str(tmp_path)))
    assert len(closed) == 1, "a run that begins anew goes on with none"


def test_a_snapshot_of_another_cell_is_not_gone_on_with(tmp_path):
    snapshots = Memory()
    folder = run_folder(str(tmp_path), Toy.place, "toy")
    snapshots.kept[folder] = Kept("another", (5, 15))
    stage = Toy()
    run(driver(snapshots=snapshots), stage, Config(str(tmp_path)))
    assert stage.computed == [1, 2, 3, 4, 5, 6]


class Refusing(LocalStore):
    """A store that refuses metrics."""

    @contextlib.contextmanager
    def start(self, *given):
        with super().start(*given) as run:

            def metrics(values, step=0):
                raise TrackingError("the run is deleted")

            run.metrics = metrics
            yield run


def test_a_store_that_refuses_ends_the_run_with_its_record_on_disk(tmp_path):
    with pytest.raises(TrackingError, match="deleted"):
        run(driver(Refusing()), Toy(), Config(str(tmp_path)))
    (lines,) = tmp_path.rglob("metrics.jsonl")
    assert [row["step"] for row in read_jsonl(lines)] == [2]


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", "a\\b", "a\0b", "/etc"])
def test_a_folder_is_one_component_below_the_output_folder(tmp_path, name):
    with pytest.raises(ConfigError, match="cannot be the name of a run's folder"):
        run_folder(str(tmp_path), "raw", name)
    with pytest.raises(ConfigError):
        run(driver(), Toy(), Config(str(tmp_path), name=name))
    assert list(tmp_path.iterdir()) == []


def test_an_earlier_runs_files_are_gone_and_a_kept_folder_stays(tmp_path):
    folder = run_folder(str(tmp_path), Toy.place, "toy")
    folder.mkdir(parents=True)
    (folder / "old.txt").write_text("old")
    run(driver(), Toy(), Config(str(tmp_path)))
    assert not (folder / "old.txt").exists()

    class Keeping(Toy):
        place = ""
        keeps_folder = True
        artifacts = "model"

    kept = tmp_path / "toy"
    kept.mkdir()
    (kept / "model.bin").write_text("model")
    d = driver()
    done = run(d, Keeping(), Config(str(tmp_path)))
    assert {p.name for p in kept.iterdir()} == {"model.bin", "plots"}
    assert d.store.download(f"runs:/{done.run_id}/model/model.bin") == kept / "model.bin"


class Stored(LocalStore):
    """A store that has copies of what runs left, as a server has."""

    def __init__(self, place: pathlib.Path) -> None:
        super().__init__()
        self.place = place

    def keep(self, done: Done) -> None:
        shutil.copytree(done.folder, self.place / done.run_id)

    def download(self, uri, folder=None):
        run_id, _, path = uri.removeprefix("runs:/").partition("/")
        return self.place / run_id / path


def cut_at(point: str) -> tuple[Driver, Toy]:
    stop = Stop()
    return driver(stop=stop), Toy(lambda now: now == point and stop.set())


def test_a_folder_that_another_experiment_has_is_not_taken_for_the_found_runs(tmp_path):
    """The same experiment in two places: one output folder, two stores. The second is under way,
    or over, when the first asks for its sham's trajectory.
    """
    store, config = Stored(tmp_path / "kept"), Config(str(tmp_path / "out"))
    done = run(driver(store), Toy(), config)
    store.keep(done)
    assert done.file("metrics.jsonl", store) == done.folder / "metrics.jsonl"
    during = []

    def look(point: str) -> None:
        if point == "3":
            assert len(read_jsonl(done.folder / "metrics.jsonl")) == 1, "half of another's"
            during.append(len(read_jsonl(done.file("metrics.jsonl", store))))

    other = run(driver(), Toy(look), config)
    assert (during, other.folder) == ([3], done.folder)
    assert other.file("metrics.jsonl", driver().store) == done.folder / "metrics.jsonl"
    assert done.file("metrics.jsonl", store) == tmp_path / "kept" / done.run_id / "metrics.jsonl"
    (done.folder / ".run_id").unlink()  # as versions before the record left it
    assert other.file("config.json", Stored(tmp_path)) == tmp_path / other.run_id / "config.json"


def content(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def hidden(folder: pathlib.Path) -> list[str]:
    return sorted(p.suffix for p in folder.parent.iterdir() if p.suffix != ".lock")


@pytest.mark.parametrize("as_child", [False, True])
@pytest.mark.parametrize("ends", ["stopped", "failed"])
def test_results_are_back_once_a_repetition_is_cut(tmp_path, ends, as_child):
    config = Config(str(tmp_path))
    done = run(driver(), Toy(), config)
    before, (d, stage) = content(done.folder), cut_at("3")
    if ends == "failed":
        stage.at = lambda point: point == "3" and (_ for _ in ()).throw(CorpusError("no text"))
    with pytest.raises(Stopped if ends == "stopped" else CorpusError):  # noqa: SIM117
        with d.process("process", {}) as own:
            d.run_cell(stage, config, **({"parent": own} if as_child else {"run": own}))
    assert stage.computed == [1, 2, 3]
    assert content(done.folder) == before
    assert hidden(done.folder) == [""]
    again = run(driver(), Toy(), config)
    assert content(again.folder)[".run_id"].decode() == again.run_id
    assert hidden(done.folder) == [""]


KILLED_AT = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "open")


def killed_at(number: int, below: pathlib.Path, work: Callable[[], Any]) -> bool:
    """Do something in a process of its own that is killed at its n-th change of a file below a
    folder, before it is made; whether it came to its end.
    """
    pid = os.fork()
    if not pid:
        seen = [0]

        def audit(event: str, args: tuple[Any, ...]) -> None:
            if event not in KILLED_AT or not isinstance(args[0], (str, bytes)):
                return
            if event == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
            name = os.fsdecode(args[0])
            # Of a folder that is removed the parts are named alone.
            if name.startswith(str(below)) or not os.path.isabs(name):
                seen[0] += 1
                if seen[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(audit)
        try:
            work()
        except BaseException:  # noqa: BLE001
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.mark.parametrize("as_child", [False, True])
def test_no_moment_of_a_repetition_loses_what_finished_before(tmp_path, as_child):
    """Killed at each change of a file; what finished is found by who asks for it then, and is back
    in its folder, and a repetition that comes to its end leaves its own results alone.
    """
    place, config = tmp_path / "out", Config(str(tmp_path / "out"))
    d = driver()
    done = run(d, Toy(), config)
    before = content(done.folder)
    shutil.copytree(place, tmp_path / "first")

    class Telling(LocalStore):
        @contextlib.contextmanager
        def start(self, *given):
            with super().start(*given) as opened:
                yield opened
            with (tmp_path / "ended").open("a") as stream:
                stream.write(f"{opened.run_id}\n")

    def repeat() -> None:
        again = driver(Telling())
        with again.process("process", {}) as own:
            again.run_cell(Toy(), config, **({"parent": own} if as_child else {"run": own}))

    over, number = False, 0
    while not over:
        number += 1
        shutil.rmtree(place)
        shutil.copytree(tmp_path / "first", place)
        over = killed_at(number, place, repeat)
        if over:
            break
        found = done.file("metrics.jsonl", Stored(tmp_path / "nothing is kept"))
        aside = done.folder.parent / ".toy.previous"
        assert not aside.exists() or content(aside) == before, f"half of it, {number}"
        new = content(done.folder).get(".run_id", b"").decode() if done.folder.is_dir() else ""
        if found.is_file():
            assert found.read_bytes() == before["metrics.jsonl"], number
            with d.process("main", {}) as parent:
                assert d.run_cell(Toy(), config, parent=parent, reuse=True).run_id == done.run_id
            assert content(done.folder) == before, number
            assert set(hidden(done.folder)) <= {"", ".dropped", ".owner"}, number
        else:  # the new results are whole, and their run has ended
            assert new in (tmp_path / "ended").read_text().split(), number
            assert content(done.folder).keys() == before.keys(), number
        repeat()
        assert content(done.folder).keys() == before.keys()
        assert hidden(done.folder) == [""], number
    assert number > 15
    assert hidden(done.folder) == [""]


def test_torchs_threads_are_as_before_afterwards(tmp_path):
    before = torch.get_num_threads()
    run(driver(), Toy(lambda _: torch.set_num_threads(before + 1)), Config(str(tmp_path)))
    assert torch.get_num_threads() == before


def test_phases_reach_the_progress_of_the_run_they_are_in(tmp_path, monkeypatch):
    said = []

    class Noting(Silence):
        def __init__(self, title):
            self.title = title

        def begin(self, total, unit):
            said.append((self.title, "begin", total))

        def phase(self, name, done, total, note=""):
            said.append((self.title, name, done))

        def step(self, done, note=""):
            said.append((self.title, "step", done))

    d = driver()
    monkeypatch.setattr(d.console, "progress", Noting)
    run(d, Toy(), Config(str(tmp_path), steps=2))
    assert said == [
        ("toy 2", "preparing", 0),
        ("toy 2", "bases", 0), ("toy 2", "bases", 1), ("toy 2", "bases", 2),
        ("toy 2", "preparing", 0), ("toy 2", "begin", 2),
        ("toy 2", "step", 1), ("toy 2", "step", 2), ("toy 2", "step", 2),
        ("toy 2", "files and figures", 0),
        ("toy 2", "uploading", 0), *[("toy 2", "uploading", i) for i in range(3)],
        ("toy 2", "uploading", 0),
    ]  # fmt: skip


class Ticking:
    """A clock that a stage moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, seconds: float) -> None:
        self.now += seconds


def test_every_second_of_a_cell_belongs_to_one_phase(tmp_path):
    clock = Ticking()
    spent = {"prepare": 2.0, "base 0": 4.0, "base 1": 8.0, "1": 16.0, "2": 32.0}
    stage = Toy(lambda point: clock.work(spent.get(point, 0.0)))
    keep = stage.store
    stage.store = lambda *given: (clock.work(64.0), keep(*given))[1]
    d = driver(clock=clock)
    with d.process("process", {"stage": "toy"}) as own:
        log = own.metrics
        own.metrics = lambda values, step=0: (clock.work(0.25), log(values, step))[1]
        save = own.artifact
        own.artifact = lambda *given: (clock.work(1.0), save(*given))[1]
        d.run_cell(stage, Config(str(tmp_path), steps=2), run=own)
    found = d.store.get_run(own.run_id).metrics
    seconds = {k: v for k, v in found.items() if k.startswith("seconds/")}
    assert seconds == {
        "seconds/preparing": 2.0 + 48.0,  # the steps of this toy are in no phase of their own
        "seconds/bases": 12.0,
        "seconds/logging": 0.25,
        "seconds/files_and_figures": 64.0,
        "seconds/uploading": 3.25,
    }
    # All but sending these numbers themselves.
    assert sum(seconds.values()) == clock.now - 100.0 - 0.25


def test_a_run_that_comes_first_is_a_phase_of_the_one_that_waits(tmp_path):
    clock = Ticking()
    d = driver(clock=clock)
    stage = Toy(lambda point: clock.work(1.0) if point == "1" else None)
    run(d, stage, Config(str(tmp_path), first=2))
    first = d.store.get_run(stage.found.run_id).metrics
    (own,) = [r.view() for r in d.store._runs.values() if r.run_id != stage.found.run_id]
    assert own.metrics["seconds/runs_that_come_first"] == 1.0
    assert own.metrics["seconds/preparing"] == first["seconds/preparing"] == 1.0


@pytest.mark.parametrize(
    ("at", "phase_left"), [("prepare", "preparing"), ("base 1", "bases"), ("", "done")]
)
def test_the_tag_says_in_which_phase_a_run_ended(tmp_path, at, phase_left):
    def fail(point: str) -> None:
        if point == at:
            raise CorpusError("no text")

    d = driver()
    with contextlib.suppress(CorpusError):
        run(d, Toy(fail), Config(str(tmp_path)))
    (own,) = d.store._runs.values()
    assert own.view().tags["phase"] == phase_left


def test_a_stop_does_not_end_what_has_computed_everything(tmp_path):
    stop, stage = Stop(), Toy()
    keep = stage.store
    stage.store = lambda *given: (stop.set(), keep(*given))[1]
    done = run(driver(stop=stop), stage, Config(str(tmp_path)))
    assert done.report.result == 21


class Slow(Toy):
    """Its steps say what they measure, which is where a stop may be heard of."""

    def __init__(self, at, ticks: int) -> None:
        super().__init__(at)
        self.said = at
        self.at = self.measured
        self.ticks = ticks

    def measured(self, point: str) -> None:
        self.said(point)
        if point.isdecimal():
            for _ in phase("measurement", range(self.ticks), self.ticks):
                pass


@pytest.mark.parametrize(("seconds", "kept"), [(1.0, [3]), (5.0, [])])
def test_a_step_that_is_being_measured_is_finished_and_kept_if_it_takes_a_moment(
    tmp_path, seconds, kept
) -> None:
    """The clock goes on by ``seconds`` with every item of the third step's measurement."""
    moments, stop, snapshots = [0.0], Stop(), Memory()

    def at(point: str) -> None:
        if point == "3":
            stop.set()

    def clock() -> float:
        moments[0] += seconds / 2 if stop.is_set() else 0.0
        return moments[0]

    stage = Slow(at, 2)
    d = Driver(Console("quiet"), LocalStore(), stop=stop, snapshots=snapshots, clock=clock)
    with pytest.raises(Stopped):
        run(d, stage, Config(str(tmp_path)))
    assert stage.computed == [1, 2, 3]
    assert [state.step for state in snapshots.kept.values()] == kept


class Prepared(Toy):
    """Finishes parts before its first step, and amid a phase."""

    def cell(self, config):
        inner = super().cell(config)
        kept = yield next(inner)
        parts = list(kept or ())
        yield Safe(0, state=lambda: tuple(parts), parts=lambda: len(parts))
        for i in phase("search", range(len(parts), 4), 4):
            self.at(f"part {i}")
            parts.append(i)
            self.computed.append(100 + i)
        return (yield from inner)


def test_parts_that_were_finished_before_a_stop_are_kept_and_not_done_again(tmp_path) -> None:
    stop, snapshots, config = Stop(), Memory(), Config(str(tmp_path))
    stage = Prepared(lambda point: point == "part 1" and stop.set())
    with pytest.raises(Stopped):
        run(driver(stop=stop, snapshots=snapshots), stage, config)
    assert [kept.state for kept in snapshots.kept.values()] == [(0, 1)]
    again = Prepared()
    snapshots.drop = lambda folder: None
    run(driver(snapshots=snapshots), again, config)
    assert again.computed == [102, 103, *range(1, 7)]
