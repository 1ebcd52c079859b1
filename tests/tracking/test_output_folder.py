"""Folders that cannot be written: real refusals of the system, before the work and amid it."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from entrypoints.attack import main as attack_command
from entrypoints.import_results import main as import_command
from entrypoints.summarize import main as summarize_command
from healing.errors import OutputError
from healing.models.checkpoints import save_checkpoint
from healing.stages.cells.events import Begin, Record
from healing.tracking import output_folder
from healing.tracking.output_folder import require_room, require_writable, writing
from healing.tracking.run_files import read_json, write_json
from tests.stages.test_driver import Config, Toy, driver, run


@contextlib.contextmanager
def files_end_at(count: int) -> Iterator[None]:
    """The system refuses every byte beyond so many of a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("below", ["x", "x/y/z", "."])
def test_a_folder_that_is_or_lies_below_a_file_is_refused(tmp_path, below):
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OutputError, match="cannot be a folder") as refused:
        require_writable(str(file / below))
    assert f"{file} is a file; name another folder" in str(refused.value)
    assert file.read_text() == "mine"


def test_a_link_that_leads_nowhere_is_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "disk")
    require_writable(str(tmp_path / "link"))  # what it leads to can be made
    (tmp_path / "unmounted").write_text("")
    with pytest.raises(OutputError, match="unmounted is a file"):
        require_writable(str(tmp_path / "link"))


@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs Linux's /proc")
def test_a_folder_that_takes_no_file_is_refused():
    """Nobody makes files in /proc, not even root."""
    with pytest.raises(OutputError, match=r"--output-dir /proc/out cannot be written \(/proc: "):
        require_writable("/proc/out")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    (tmp_path / "sealed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match=r"sealed: Permission denied\): make it writable"):
        require_writable(str(tmp_path / "sealed" / "x"))


def test_a_folder_without_permission_says_so(tmp_path, monkeypatch):
    """The same where root runs the tests: the answer is made up."""

    def denied(**_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(output_folder.tempfile, "TemporaryFile", denied)
    with pytest.raises(OutputError, match=r"Permission denied\): make it writable"):
        require_writable(str(tmp_path / "x"))


def test_a_full_disk_is_found_by_writing(tmp_path):
    """A file can be made on a full disk; only its content is refused."""
    with files_end_at(0), pytest.raises(OutputError, match=r"File too large\): make it writable"):
        require_writable(str(tmp_path / "x"))
    assert not list(tmp_path.iterdir())


def test_nothing_is_left_behind_by_trying(tmp_path):
    require_writable(str(tmp_path / "not" / "yet" / "there"))
    (tmp_path / "full").mkdir()
    require_writable(str(tmp_path / "full"))
    assert [p.name for p in tmp_path.rglob("*")] == ["full"]


def test_home_and_relative_folders_are_meant_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").write_text("")
    (tmp_path / "here").write_text("")
    for given, file in (("~/results", "home"), ("here/results", "here")):
        with pytest.raises(OutputError, match=f"{tmp_path}/{file} is a file"):
            require_writable(given)


def test_room_is_compared_with_what_the_disk_has(tmp_path):
    free = shutil.disk_usage(tmp_path).free
    require_room(tmp_path / "runs" / "a", free // 2)
    require_room(tmp_path, 0)
    with pytest.raises(OutputError, match="are free on its disk: free some") as refused:
        require_room(tmp_path / "runs" / "a", 2 * free + 10**9)
    assert f"weights of {(2 * free + 10**9) / 1e9:.2g} GB" in str(refused.value)


def test_room_to_the_byte(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 2, 7))
    require_room(tmp_path, 7)
    with pytest.raises(OutputError):
        require_room(tmp_path, 8)


class Weights(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((100, 100), value))


def saved(path: pathlib.Path, value: float) -> None:
    save_checkpoint(path, Weights(value), 1, "weights", {})


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_one_whole(tmp_path):
    path = tmp_path / "checkpoints" / "checkpoint.pt"
    saved(path, 1.0)
    before = path.read_bytes()
    with files_end_at(10_000), pytest.raises(OutputError) as refused, writing(tmp_path):
        saved(path, 2.0)
    message = str(refused.value)
    assert message.startswith(f"{path} could not be written (")
    assert "\n" not in message
    assert message.endswith("and start again; what was written before stays")
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["checkpoint.pt"]


def test_a_json_file_that_does_not_fit_leaves_the_earlier_one_whole(tmp_path):
    path = write_json(tmp_path / "a.json", {"x": 1})
    with (
        files_end_at(100),
        pytest.raises(OutputError, match=r"File too large; .* are free"),
        writing(tmp_path),
    ):
        write_json(path, {"x": [1.5] * 1000})
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_other_errors_are_not_taken_for_the_disks(tmp_path):
    with pytest.raises(ValueError, match="mine"), writing(tmp_path):
        raise ValueError("mine")


class Clumsy(Toy):
    """Says how much room it needs, and writes beside its records."""

    def __init__(self, disk: int = 0, write=None, at=lambda _: None) -> None:
        super().__init__(at)
        self.disk, self.write = disk, write

    def cell(self, config):
        inner = super().cell(config)
        answer = None
        try:
            while True:
                event = inner.send(answer)
                if isinstance(event, Begin):
                    event = replace(event, disk=self.disk)
                if isinstance(event, Record) and event.step == 4:
                    event = replace(event, write=self.write)
                answer = yield event
        except StopIteration as end:
            return end.value
        finally:
            inner.close()


def test_no_stage_begins_for_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    reached: list[str] = []
    with pytest.raises(OutputError, match="is a file"):
        run(driver(), Toy(reached.append), Config(str(tmp_path / "file" / "x")))
    assert reached == []


def test_a_stage_whose_weights_have_no_room_stops_before_its_first_step(tmp_path):
    stage = Clumsy(disk=10**18)
    with pytest.raises(OutputError, match=r"is to hold weights of 1e\+09 GB"):
        run(driver(), stage, Config(str(tmp_path)))
    assert stage.computed == []
    run(driver(), Clumsy(disk=1), Config(str(tmp_path)))


def test_a_disk_that_fills_amid_a_run_is_one_line_and_keeps_the_records(tmp_path):
    stage = Clumsy(write=full)
    with pytest.raises(OutputError, match=r"could not be written \(No space left .* are free\)"):
        run(driver(), stage, Config(str(tmp_path)))
    assert stage.computed == [1, 2, 3, 4]
    lines = next(tmp_path.rglob("metrics.jsonl")).read_text().splitlines()
    assert len(lines) == 2


def test_a_disk_that_fills_at_a_stages_end_is_one_line(tmp_path):
    class Full(Toy):
        def store(self, outcome, records, folder, run_id):
            full()

    with pytest.raises(
        OutputError, match=r"toy could not be written \(No space left .* are free\)"
    ):
        run(driver(), Full(), Config(str(tmp_path)))


@pytest.mark.parametrize(
    "command", [summarize_command, import_command], ids=["summarize", "import"]
)
def test_other_commands_name_the_folder_in_one_line(store, command):
    (store / "file").write_text("")
    (store / "records").mkdir()
    options = ["--output-dir", str(store / "file" / "x"), "--verbosity", "quiet"]
    if command is import_command:
        options += ["--folder", str(store / "records")]
    done = CliRunner().invoke(command, options)
    assert done.exit_code == 1
    lines = [line for line in done.stderr.splitlines() if " INFO " not in line]  # MLflow's own
    assert lines == [f"error: --output-dir {store}/file/x cannot be a folder: {store}/file is a "
                     "file; name another folder"]  # fmt: skip


@pytest.mark.slow
def test_weights_that_torch_cannot_save_end_the_command_in_one_line(store, monkeypatch):
    def save(content: object, path: pathlib.Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:858] . failed writing file\nframe")

    monkeypatch.setattr(torch, "save", save)
    options = "--model nano --arm gaussian_noise --attack-steps 1 --probe-tokens 512".split()
    done = CliRunner().invoke(attack_command, [*options, "--output-dir", str(store / "out")])
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "checkpoint_post_treatment.pt could not be written ([enforce fail" in line
    assert "frame" not in line
    assert not list((store / "out").rglob("*.partial"))
    assert list((store / "out").rglob("metrics.jsonl"))
