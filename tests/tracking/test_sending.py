"""The sender and its outbox against a store made of a list: order, once each, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import filelock
import pytest
import torch

from healing.errors import OutageError, OutputError, TrackingError
from healing.models.checkpoints import save_checkpoint
from healing.tracking import open_runs
from healing.tracking.processes import this_process
from healing.tracking.sending import left_behind
from healing.tracking.sending import sender as sending
from healing.tracking.sending.left_behind import deliver, send_left
from healing.tracking.sending.outbox import PLACE, Outbox, Request, outboxes
from healing.tracking.sending.sender import Sender


class Store:
    """Takes requests, unless it is told otherwise."""

    def __init__(self) -> None:
        self.got: list[tuple[str, object]] = []
        self.away = threading.Event()
        self.refuses: set[object] = set()
        self.tried = 0

    def __call__(self, request, file, *, again) -> None:
        self.tried += 1
        if self.away.is_set():
            raise OutageError("nobody there: make that store reachable")
        number = request.content.get("n")
        if number in self.refuses:
            raise TrackingError(f"{number} is refused")
        self.got.append((request.run, number if file is None else file.read_text()))

    def run_id(self, run: str) -> str:
        return run

    def experiment_id(self, run: str) -> str:
        return "1"


def request(number: int, run: str = "r") -> Request:
    return Request(run, "batch", {"n": number})


def numbers(store: Store) -> list[object]:
    return [number for _, number in store.got]


def test_what_is_handed_over_while_the_store_is_there_has_arrived(tmp_path) -> None:
    store = Store()
    sender = Sender(store, Outbox.of_this_process(tmp_path / PLACE, "s"))
    for n in range(20):
        assert sender.put(request(n))
        assert numbers(store) == list(range(n + 1))
    sender.close()
    assert not (tmp_path / PLACE).exists()


def test_order_is_kept_over_outages_and_each_is_carried_out_once() -> None:
    store, said = Store(), []
    sender = Sender(store, say=said.append)
    for n in range(60):
        if n in (10, 40):
            store.away.set()
        if n in (25, 55):
            store.away.clear()
        sender.put(request(n))
    sender.close(30.0)
    assert numbers(store) == list(range(60))
    assert sum("is away" in text for text in said) <= 2
    assert said[0].startswith("warning: the tracking store is away")


def test_a_store_without_answers_is_waited_for_so_long_in_all(monkeypatch) -> None:
    monkeypatch.setattr(sending, "BLOCKING_SECONDS", 1.0)
    hang, store = threading.Event(), Store()
    store.__class__ = type("Hanging", (Store,), {"__call__": lambda self, *a, **k: hang.wait(30)})
    sender = Sender(store)
    began = time.monotonic()
    for n in range(50):
        assert not sender.put(request(n))
    assert 0.9 < time.monotonic() - began < 3.0
    assert sender.is_away
    hang.set()
    sender.close(30.0)
    assert not sender.is_away


def test_a_store_that_answers_slowly_is_there(monkeypatch) -> None:
    """Nobody waits amid a computation any more; ids and lookups stay the store's."""
    monkeypatch.setattr(sending, "BLOCKING_SECONDS", 1.0)
    monkeypatch.setattr(sending, "QUICK_SECONDS", 0.1)

    class Slow(Store):
        def __call__(self, request, file, *, again) -> None:
            time.sleep(0.4)
            super().__call__(request, file, again=again)

    store = Slow()
    sender = Sender(store)
    began = time.monotonic()
    for n in range(6):
        sender.put(request(n))
        assert not sender.is_away
    assert time.monotonic() - began < 2.0, "six answers take 2.4 s"
    assert sender.put(request(6), patience=10.0)
    assert numbers(store) == list(range(7))
    sender.close(10.0)


def test_the_end_waits_as_long_as_requests_arrive(monkeypatch) -> None:
    monkeypatch.setattr(sending, "PATIENCE", 1.5)

    class Slow(Store):
        def __call__(self, request, file, *, again) -> None:
            time.sleep(0.5)
            super().__call__(request, file, again=again)

    for patience, arrived in ((None, range(8)), (1.5, range(4))):
        store = Slow()
        sender = Sender(store)
        for n in range(8):
            sender.offer(request(n))
        with contextlib.suppress(OutageError) if patience else contextlib.nullcontext():
            sender.close(patience)
        assert set(numbers(store)) - set(arrived) == set()
        assert len(store.got) == 8 or patience


def refused_lines(folder: pathlib.Path) -> list[dict]:
    """Of the one outbox of an output folder."""
    (path,) = folder.glob(f"{PLACE}/*/refused.jsonl")
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def test_a_refusal_is_raised_for_its_own_request_and_costs_no_other(tmp_path) -> None:
    store, said = Store(), list[str]()
    store.refuses = {1, 3, 4}
    sender = Sender(store, Outbox.of_this_process(tmp_path / PLACE, "s"), said.append)
    sender.put(request(0))
    with pytest.raises(TrackingError, match=r"^1 is refused$"):
        sender.put(request(1))
    sender.put(request(2))
    store.away.set()
    sender.put(request(3))  # wait, and are refused later
    sender.put(request(4))
    store.away.clear()
    end = time.monotonic() + 20
    while sender.away is not None and time.monotonic() < end:
        time.sleep(0.02)
    for n in (5, 6, 7):
        assert sender.put(request(n), patience=10.0)
    with pytest.raises(TrackingError, match=r"2 request.s. will not be taken.*: 3 is refused$"):
        sender.close(30.0)
    assert numbers(store) == [0, 2, 5, 6, 7]
    assert [text for text in said if "refused" in text] == [
        "warning: 3 is refused; what else the run is told goes on"
    ]
    kept = refused_lines(tmp_path)  # the first was heard where it was handed over
    assert [(line["number"], line["reason"]) for line in kept] == [
        (3, "3 is refused"),
        (4, "4 is refused"),
    ]


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file grows beyond so many bytes: what is written until then stays, half a line too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room_comes_back", [True, False])
def test_a_full_disk_is_tried_again_and_the_last_line_is_true(tmp_path, room_comes_back) -> None:
    store, said = Store(), list[str]()
    sender = Sender(store, Outbox.of_this_process(tmp_path / PLACE, "s"), said.append)
    sender.put(request(0))
    store.away.set()
    sender.put(request(1))
    (path,) = tmp_path.glob(f"{PLACE}/*/requests.jsonl")
    with room_for(path.stat().st_size + 9):
        for n in (2, 3):
            with pytest.raises(OutputError, match=r"not be written \(File too large; .*are fr"):
                sender.put(request(n))
        sender.offer(request(4))  # from a thread that nobody listens to
        if not room_comes_back:
            with pytest.raises(OutputError, match=r": 1 request.s. wait .* 3 are lost .*large"):
                sender.close(0.0)
    if room_comes_back:
        assert not sender.put(request(5))
        with pytest.raises(OutageError, match=r"5 request.s. wait in .*All results are on disk"):
            sender.close(0.0)
    (box,) = outboxes(tmp_path / PLACE)
    found = [r.content["n"] for r in box.left()[0]]
    assert found == ([0, 1, 2, 3, 4, 5] if room_comes_back else [0, 1])


def test_a_full_disk_costs_nothing_where_the_store_is_there(tmp_path) -> None:
    store = Store()
    sender = Sender(store, Outbox.of_this_process(tmp_path / PLACE, "s"))
    sender.put(request(0))
    with room_for(10), pytest.raises(OutputError, match="free some of its disk"):
        sender.put(request(1))
    sender.close(30.0)
    assert numbers(store) == [0, 1]
    assert not (tmp_path / PLACE).exists()


def test_an_outbox_with_what_was_refused_is_over(tmp_path) -> None:
    store = Store()
    store.refuses = {1}
    sender = Sender(store, Outbox.of_this_process(tmp_path / PLACE, "s"))
    sender.put(request(0))
    sender.offer(request(1))
    with pytest.raises(TrackingError, match="1 is refused"):
        sender.close(30.0)
    said: list[str] = []
    send_left(tmp_path, said.append)
    assert said == []
    (box,) = outboxes(tmp_path / PLACE)
    assert box.left() == ([request(0), request(1)], 2)
    assert (box.is_over, box.refused) == (True, {1: "1 is refused"})


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_that_is_no_refusal_is_not_swallowed() -> None:
    store = Store()
    store.__class__ = type("Broken", (Store,), {"__call__": lambda self, *a, **k: 1 / 0})
    sender = Sender(store)
    sender.put(request(0))
    with pytest.raises(RuntimeError, match="has ended") as caught:
        sender.put(request(1))
    sender._thread.join()
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_what_does_not_arrive_is_on_disk_with_its_files_as_they_were(tmp_path) -> None:
    store = Store()
    sender = Sender(store, Outbox.of_this_process(tmp_path / PLACE, "s"))
    sender.put(request(0))
    store.away.set()
    file = tmp_path / "trials.csv"
    file.write_text("as it was")
    sender.put(Request("r", "artifact", {"path": sender.place_of(file), "folder": None}), file)
    file.write_text("of a later run")  # in place, as `tune` writes it
    sender.put(request(2))
    with pytest.raises(OutageError, match=r"2 request.s. wait in .*entrypoints\.sync") as caught:
        sender.close(0.0)
    assert "make that store" not in str(caught.value)
    (box,) = outboxes(tmp_path / PLACE)
    requests, sent = box.left()
    assert [r.kind for r in requests] == ["batch", "artifact", "batch"]
    assert sent == 1
    assert box.file_of(1, requests[1].content["path"]).read_text() == "as it was"


@pytest.mark.parametrize("has_outbox", [True, False])
@pytest.mark.parametrize("under_way", [True, False])
def test_a_file_that_is_gone_when_its_turn_comes_is_sent(
    tmp_path, monkeypatch, has_outbox, under_way
) -> None:
    """Of a temporary folder, while the store is slow: by the file itself, or by what is before."""
    reached, may_go_on = threading.Event(), threading.Event()

    class Slow(Store):
        def __call__(self, request, file, *, again) -> None:
            if (file is not None) == under_way and not reached.is_set():
                reached.set()
                assert may_go_on.wait(60)
            if file is not None and not file.is_file():
                raise TrackingError(f"there is no {file}")
            super().__call__(request, file, again=again)

    monkeypatch.setattr(sending, "BLOCKING_SECONDS", 0.2)
    store = Slow()
    outbox = Outbox.of_this_process(tmp_path / PLACE, "s") if has_outbox else None
    sender = Sender(store, outbox)
    folder = tmp_path / "temporary"
    folder.mkdir()
    (folder / "values.json").write_text("whole")
    if not under_way:
        sender.put(request(0))
    sender.put(Request("r", "artifact", {"path": "x"}), folder / "values.json")
    assert reached.wait(60)
    shutil.rmtree(folder)
    may_go_on.set()
    sender.close()
    assert store.got[-1] == ("r", "whole")


def test_weights_are_kept_without_a_copy_and_as_they_were(tmp_path) -> None:
    """Links: what writes weights leaves the file that was there to others."""
    weights = tmp_path / "checkpoint.pt"
    box = Outbox(tmp_path / PLACE / "1")

    def written(value: float) -> bytes:
        model = torch.nn.Linear(2, 2)
        torch.nn.init.constant_(model.weight, value)
        save_checkpoint(weights, model, step=0, kind="post_treatment", description="", config={})
        return weights.read_bytes()

    first = written(1.0)
    box.keep(0, weights)
    kept = box.kept_file(0, weights)
    assert kept.stat().st_ino == weights.stat().st_ino
    assert written(2.0) != first
    assert kept.read_bytes() == first


def test_a_copy_that_is_cut_is_none(tmp_path, monkeypatch) -> None:
    file = tmp_path / "report.html"
    file.write_text("x" * 200)
    box = Outbox(tmp_path / PLACE / "1")
    with room_for(100), pytest.raises(OSError, match="File too large"):
        box.keep(0, file)
    assert box.kept_file(0, file) == file
    assert list((box.folder / "files" / f"{0:09d}").iterdir()) == []


@pytest.mark.parametrize("step", ["folder", "lock", "name"])
def test_an_outbox_that_is_being_made_is_left_alone(tmp_path, monkeypatch, step) -> None:
    """Another process looks at each moment between the folder and the owner's name in it."""
    looked: list[list[object]] = []

    def look() -> None:
        looked.append([found.error for found in deliver(tmp_path)])

    box = Outbox.of_this_process(tmp_path / PLACE, "s")
    if step == "folder":
        mkdir = pathlib.Path.mkdir

        def made(self, *args, **options) -> None:
            mkdir(self, *args, **options)
            if self == box.folder and not looked:
                look()

        monkeypatch.setattr(pathlib.Path, "mkdir", made)
    else:
        acquire, about = filelock.FileLock.acquire, Outbox._about

        def locked(self, *args, **options):
            found = acquire(self, *args, **options)
            if step == "lock" and not looked and self is box._lock:
                look()
            return found

        def named(self, *args) -> None:
            about(self, *args)
            if step == "name":
                look()

        monkeypatch.setattr(filelock.FileLock, "acquire", locked)
        monkeypatch.setattr(Outbox, "_about", named)
    box.append(request(0))
    still_runs = [f"{this_process()} still runs and sends it"]
    assert looked == [still_runs if step == "name" else []]
    assert [r.content["n"] for r in Outbox(box.folder).left()[0]] == [0]
    box.close(drop=True)


def test_an_outbox_whose_maker_died_at_once_goes(tmp_path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    name = Outbox.of_this_process(tmp_path / PLACE, "s").folder.name
    for pid in (gone.pid, os.getpid()):
        (tmp_path / PLACE / name.replace(str(os.getpid()), str(pid))).mkdir(parents=True)
    old = tmp_path / PLACE / f"{0:020d}-elsewher-{os.getpid()}-aaaaaa"
    old.mkdir()
    os.utime(old, (0, 0))
    assert list(deliver(tmp_path)) == []
    assert [p.name for p in (tmp_path / PLACE).iterdir()] == [name]


@pytest.mark.parametrize(
    "place", ["/etc/passwd", "../../outside", "a/../../x"], ids=["whole", "climbing", "hidden"]
)
def test_files_outside_of_the_output_folder_are_not_sent(tmp_path, place) -> None:
    box = Outbox(tmp_path / "out" / PLACE / "1")
    with pytest.raises(ValueError, match="is not in"):
        box.file_of(0, place)


def elsewhere(tmp_path) -> pathlib.Path:
    """Folders of somebody else's, one of them empty."""
    place = tmp_path / "home"
    (place / "thesis").mkdir(parents=True)
    (place / "thesis" / "chapter1").write_text("text")
    (place / "empty").mkdir()
    return place


def test_a_linked_folder_of_outboxes_is_not_followed(tmp_path) -> None:
    place = elsewhere(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PLACE).symlink_to(place)
    assert list(deliver(tmp_path / "out")) == []
    assert sorted(p.name for p in place.rglob("*")) == ["chapter1", "empty", "thesis"]
    with pytest.raises(OSError, match="a link"):
        Outbox.of_this_process(tmp_path / "out" / PLACE, "s").append(request(0))
    assert sorted(p.name for p in place.iterdir()) == ["empty", "thesis"]


def test_folders_that_are_no_outbox_stay(tmp_path) -> None:
    place = elsewhere(tmp_path).rename(tmp_path / PLACE)
    (place / "linked").mkdir()
    (place / "linked" / "files").symlink_to(tmp_path)
    assert list(deliver(tmp_path)) == []
    assert (place / "thesis" / "chapter1").read_text() == "text"
    assert (place / "linked").is_dir()


def test_a_kept_file_behind_a_link_is_not_sent(tmp_path) -> None:
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "key").write_text("secret")
    box = Outbox(tmp_path / "out" / PLACE / "1")
    (box.folder / "files").mkdir(parents=True)
    (box.folder / "files" / f"{0:09d}").symlink_to(tmp_path / "secrets")
    sent = box.file_of(0, "key")
    assert not sent.exists()
    assert sent.is_relative_to(tmp_path / "out")


@pytest.mark.parametrize("lines", ["nonsense\n[]\n", '["r", "batch"]\n\n', "[" * 9999 + "\n{}\n"])
def test_an_outbox_of_others_is_told_of_and_stays(tmp_path, lines) -> None:
    folder = tmp_path / PLACE / "1"
    folder.mkdir(parents=True)
    (folder / "requests.jsonl").write_text(lines)
    (found,) = deliver(tmp_path)
    assert "cannot be read" in found.error
    assert folder.is_dir()


def test_a_last_line_that_was_cut_is_left_out(tmp_path) -> None:
    box = Outbox.of_this_process(tmp_path / PLACE, "s")
    box.append(request(0))
    box.append(request(1))
    box.close(drop=False)
    path = box.folder / "requests.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [r.content["n"] for r in Outbox(box.folder).left()[0]] == [0]


def test_a_running_process_keeps_what_is_its_own(tmp_path) -> None:
    box = Outbox.of_this_process(tmp_path / PLACE, "s")
    box.append(request(0))
    (found,) = deliver(tmp_path)
    assert "still runs and sends it" in found.error
    said: list[str] = []
    send_left(tmp_path, said.append)
    assert said == []
    box.close(drop=True)


def test_what_a_killed_process_left_is_sent_and_its_run_ended(store, tmp_path) -> None:
    """The outbox as it is after a hard kill: half of it sent, the run without an end."""
    output = tmp_path / "output"
    with open_runs.start("whole", {"stage": "heal"}, keep=output / PLACE) as run:
        run.metrics({"loss": 2.0}, 0)
        run.flush()
        (box,) = outboxes(output / PLACE)
        lines = (box.folder / "requests.jsonl").read_text().splitlines()
    (output / PLACE / "1").mkdir(parents=True)
    local = json.loads(lines[0])[0]
    changed = [line.replace(local, "f" * 32) for line in lines]  # another run
    (output / PLACE / "1" / "requests.jsonl").write_text("\n".join(changed) + "\n")
    found = list(deliver(output))
    assert [d.error for d in found] == [""]
    (made,) = found[0].runs
    from mlflow.tracking import MlflowClient

    again = MlflowClient().get_run(made)
    assert again.info.status == "KILLED"
    assert "ended without ending it" in again.data.tags["failure"]
    assert list(deliver(output)) == []
    assert left_behind.outboxes(output / PLACE) == []
    assert pathlib.Path(output).is_dir()
