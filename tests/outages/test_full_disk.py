"""A disk that fills while something of a run is written: what is said, what is left, going on."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator

import mlflow
import pytest
import torch
from matplotlib.figure import Figure
from mlflow.tracking import MlflowClient

from healing.errors import OutageError, OutputError
from healing.progress import Stop
from healing.stages.driver import Driver
from healing.stages.terminal.console import Console
from healing.tracking import snapshots
from healing.tracking.run_files import JsonLines
from healing.tracking.sending import sender
from healing.tracking.sending.left_behind import deliver
from healing.tracking.sending.outbox import PLACE, Outbox, Request
from tests.stages.test_resume import CutAt, a_store, attacked, files, histories

pytestmark = pytest.mark.slow

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
FREE = r"No space left on device; (it takes [0-9.]+ [kMG]B, )?[0-9.]+ ([kMG]B|bytes) are free"


def lines_half_written(patched: pytest.MonkeyPatch) -> None:
    append = JsonLines.append

    def half(self: JsonLines, record: dict) -> None:
        if record["step"] < 4:
            return append(self, record)
        with self.path.open("a") as stream:
            stream.write('{"step": 4, "sec')
        raise FULL

    patched.setattr(JsonLines, "append", half)


def requests_half_written(patched: pytest.MonkeyPatch) -> None:
    """From the first point of step 4 on."""
    append, full = Outbox.append, []

    def half(self: Outbox, request: Request) -> int:
        if any(step == 4 for *_, step in request.content.get("metrics", ())):
            full.append(request)
        if not full:
            return append(self, request)
        with (self.folder / "requests.jsonl").open("a") as stream:
            stream.write('["run", "ba')
        raise FULL

    patched.setattr(Outbox, "append", half)


def weights_half_written(patched: pytest.MonkeyPatch) -> None:
    save = torch.save

    def half(content: object, target: object) -> None:
        if not isinstance(target, pathlib.Path):
            return save(content, target)  # a state
        target.write_bytes(b"PK half")
        raise RuntimeError("[enforce fail at inline_container.cc:858] . No space left on device")

    patched.setattr(torch, "save", half)


def figures_refused(patched: pytest.MonkeyPatch) -> None:
    def refused(*_: object, **__: object) -> None:
        raise FULL

    patched.setattr(Figure, "savefig", refused)


def states_refused(patched: pytest.MonkeyPatch) -> None:
    """From the third state on."""
    written = iter(range(10**6))

    class Filling(snapshots._Hashing):
        def __init__(self, stream: object) -> None:
            super().__init__(stream)
            self.fits = next(written) < 2

        def write(self, data: object) -> int:
            if not self.fits:
                raise FULL
            return super().write(data)

    patched.setattr(snapshots, "_Hashing", Filling)


def driven(said: list[str] | None = None) -> tuple[Driver, CutAt]:
    console, kept, stop = Console("quiet"), CutAt(-1, Stop(), dies=False), Stop()
    if said is not None:
        console.say = said.append  # type: ignore[method-assign]
    return Driver(console, stop=stop, snapshots=kept), kept


def attack_at(place: pathlib.Path, driver: Driver) -> None:
    attacked(place, "random_tokens", driver)


def fill(file: pathlib.Path) -> None:
    """To the last byte."""
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as stream:
        while stream.write(bytes(4096)):
            pass
    with contextlib.suppress(OSError), file.open("ab", buffering=0) as stream:
        while stream.write(b"0"):
            pass


def runs() -> list:
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    return client.search_runs(experiments, order_by=["attributes.start_time ASC"])


@pytest.fixture
def whole(store) -> tuple[dict, list]:
    with a_store(store / "whole.db"):
        attack_at(store / "whole", driven()[0])
        return files(store / "whole", "_attack_"), histories()


def goes_on_to_the_same(place: pathlib.Path, whole: tuple[dict, list]) -> None:
    """From a kept state, where there was room for one, to what an uncut run leaves."""
    driver, kept = driven()
    attack_at(place, driver)
    assert len(kept.saved) < 5, "it began anew"
    found = files(place, "_attack_")
    assert found.keys() == whole[0].keys()
    assert [name for name in found if found[name] != whole[0][name]] == []
    assert histories() == whole[1]
    done = runs()[-1]
    assert done.info.status == "FINISHED"
    assert "resumed_from" in done.data.tags
    assert not list(place.rglob("*partial*"))
    assert not list(place.rglob(".*.previous"))


@pytest.mark.parametrize(
    "fill",
    [lines_half_written, requests_half_written, weights_half_written, figures_refused],
    ids=["metrics.jsonl", "outbox", "checkpoint", "figure"],
)
def test_a_disk_that_fills_ends_the_run_with_its_reason_and_the_same_command_goes_on(
    store, whole, fill: Callable[[pytest.MonkeyPatch], None]
) -> None:
    place = store / "full"
    with a_store(store / "full.db"):
        with pytest.MonkeyPatch.context() as patched:
            fill(patched)
            with pytest.raises(OutputError) as refused:
                attack_at(place, driven()[0])
        message = str(refused.value)
        assert message.startswith(str(place))
        assert "\n" not in message
        assert re.search(r"No space left on device.* are free", message), message
        (run,) = runs()
        assert run.info.status == "FAILED"
        assert run.data.tags["failure"] == message
        assert list(place.rglob(".*.state/*.pt"))
        goes_on_to_the_same(place, whole)


def test_a_state_that_has_no_room_is_said_and_the_run_comes_to_its_end(store, whole) -> None:
    place, said = store / "full", list[str]()
    with a_store(store / "full.db"), pytest.MonkeyPatch.context() as patched:
        states_refused(patched)
        attack_at(place, driven(said)[0])
        found = files(place, "_attack_")
        assert [name for name in whole[0] if found[name] != whole[0][name]] == []
        assert histories() == whole[1]
    warnings = [text for text in said if "was not kept" in text]
    assert len(warnings) >= 3
    assert re.search(rf"the state at step [345] was not kept: {place}.*: {FREE}", warnings[-1])


@contextlib.contextmanager
def small_disk(place: pathlib.Path, size: str) -> Iterator[None]:
    """A file system of its own, in memory."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


class Filling(CutAt):
    """Fills the disk to its last byte once the state of a step is kept."""

    def __init__(self, step: int, file: pathlib.Path) -> None:
        super().__init__(-1, Stop(), dies=False)
        self.at, self.file = step, file

    def save(self, folder, kept) -> None:
        super().save(folder, kept)
        if kept.step == self.at:
            with contextlib.suppress(OSError), self.file.open("wb", buffering=0) as stream:
                while stream.write(bytes(4096)):
                    pass


@pytest.mark.parametrize("step", [1, 3, 5])
def test_a_real_disk_that_is_full_from_a_step_on(store, whole, step: int) -> None:
    place = store / "small"
    with small_disk(place, "96m"), a_store(store / "full.db"):
        filling = Filling(step, place / "filler")
        console = Console("quiet")
        with pytest.raises(OutputError, match=r" are free\): free some") as refused:
            attack_at(place / "out", Driver(console, stop=Stop(), snapshots=filling))
        (run,) = runs()
        assert (run.info.status, run.data.tags["failure"]) == ("FAILED", str(refused.value))
        filling.file.unlink()
        goes_on_to_the_same(place / "out", whole)


STORE_FULL = {
    "from a step on": {2: True},
    "for some steps": {2: True, 4: False},
    "from the start": {0: True},
}


@pytest.mark.parametrize("kind", STORE_FULL)
def test_a_store_on_a_disk_that_is_full_is_away(store, whole, monkeypatch, caplog, kind) -> None:
    """Of a database and its files: training goes on, and all of it arrives once there is room."""
    at, append = STORE_FULL[kind], JsonLines.append
    place, said = store / "small", list[str]()
    filler = place / "filler"

    def set_to(full: bool | None) -> None:
        if full is not None:
            fill(filler) if full else filler.unlink()

    def appended(self: JsonLines, record: dict) -> None:
        set_to(at.get(record["step"] or None))
        append(self, record)

    monkeypatch.setattr(JsonLines, "append", appended)
    monkeypatch.setattr("healing.tracking.run_logger.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr(sender, "LONGEST_PAUSE", 1.0)
    with small_disk(place, "24m"), a_store(store / "full.db"):
        shutil.copy(store / "mlflow.db", place / "mlflow.db")
        mlflow.set_tracking_uri(f"sqlite:///{place}/mlflow.db")
        MlflowClient().create_experiment("llm-healing", str(place / "artifacts"))
        set_to(at.get(0))
        driver, _ = driven(said)
        if False in at.values():
            monkeypatch.setattr(sender, "PATIENCE", 60.0)
            attack_at(store / "out", driver)
        else:
            with pytest.raises(OutageError, match=r"is full.*entrypoints\.sync"):
                attack_at(store / "out", driver)
            filler.unlink()
            (sent,) = deliver(store / "out")
            assert not sent.error
        assert not (store / "out" / PLACE).exists()
        assert (files(store / "out", "_attack_"), histories()) == whole
        (run,) = runs()
        assert run.info.status == "FINISHED"
        stored = {path.name for path in place.rglob("artifacts/**/*") if path.is_file()}
        assert stored >= {"checkpoint_post_treatment.pt", "metrics.jsonl", "config.json"}
    away = [line for line in said if "is away" in line]  # again, if room came back for a moment
    assert away
    assert not [line for line in away if "SQL" in line or "\n" in line]
    assert not [record for record in caplog.records if record.exc_info]
