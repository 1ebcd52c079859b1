"""Links, pipes and strangers' files where a run's folder, lock, state and owner lie: nothing
outside of the output folder is changed, nothing that is not the run's is removed, and nobody waits
for ever.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Callable

import pytest

from healing.errors import OutputError
from healing.stages.cells.events import Record
from healing.tracking.local_store import LocalStore
from healing.tracking.processes import owner_of
from healing.tracking.sending.left_behind import deliver
from healing.tracking.sending.outbox import PLACE
from healing.tracking.snapshots import FileSnapshots, Kept, Saving
from tests.stages.test_driver import Config, Toy, driver, run

STATE = f"{1:09d}-{'a' * 32}.pt"


class Keeping(Toy):
    """Keeps its state after every step."""

    def saving(self, config):
        return Saving(steps=1)


def place_of(output: pathlib.Path) -> pathlib.Path:
    return output / Toy.place


def victims(root: pathlib.Path) -> pathlib.Path:
    """Somebody's folder, with names such as states have."""
    folder = root / "victims"
    (folder / "sub").mkdir(parents=True)
    names = ("file", "partial", ".run_id", "sub/x", STATE, f"{2:09d}-{'b' * 32}.pt")
    for name in (*names, *(f"my-model{i}.pt" for i in range(4))):
        (folder / name).write_text("precious")
    return folder


def content(folder: pathlib.Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def linked(name: str, to: str) -> Callable[[pathlib.Path, pathlib.Path], object]:
    return lambda raw, victim: (raw / name).symlink_to(victim / to)


def within_state(make: Callable[[pathlib.Path, pathlib.Path], object]):
    def made(raw: pathlib.Path, victim: pathlib.Path) -> None:
        (raw / ".toy.state").mkdir()
        make(raw / ".toy.state", victim)

    return made


def run_of_before(raw: pathlib.Path, victim: pathlib.Path) -> None:
    """A finished run's folder that lies elsewhere."""
    (victim / ".run_id").write_text("r")
    (raw / "toy").symlink_to(victim)


def pipe(name: str) -> Callable[[pathlib.Path, pathlib.Path], object]:
    def made(raw: pathlib.Path, victim: pathlib.Path) -> None:
        (raw / name).parent.mkdir(exist_ok=True)
        os.mkfifo(raw / name)

    return made


RUNS_ON = {
    "owner": linked(".toy.owner", "file"),
    "owner, a pipe": pipe(".toy.owner"),
    "state": linked(".toy.state", ""),
    "file of a state that is written": within_state(linked("partial", "file")),
    "files of states": within_state(linked(STATE, "file")),
    "files of others": within_state(lambda state, victim: shutil.copytree(victim, state / "x")),
    "a state that is a pipe": pipe(f".toy.state/{STATE}"),
    "whose results, a pipe": pipe("toy/.run_id"),
}
REFUSED = {
    "the run's folder": linked("toy", ""),
    "a finished run's folder": run_of_before,
    "lock": linked(".toy.lock", "file"),
    "removed": lambda raw, victim: (
        (raw / "toy").mkdir(), (raw / ".toy.dropped").symlink_to(victim),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", [*RUNS_ON, *REFUSED])
def test_what_leads_elsewhere_is_left_alone(tmp_path, kind) -> None:
    victim, output = victims(tmp_path), tmp_path / "out"
    raw = place_of(output)
    raw.mkdir(parents=True)
    make = (RUNS_ON | REFUSED)[kind]
    make(raw, victim)
    before = content(victim)
    snapshots = FileSnapshots([Record])
    own = driver(LocalStore(), snapshots=snapshots)
    config = Config(str(output), name="toy")
    if kind in REFUSED:
        with pytest.raises(OutputError, match="link"):
            run(own, Keeping(), config)
    else:
        assert run(own, Keeping(), config).report.result == 21
        assert (raw / "toy" / "metrics.jsonl").is_file()
    assert content(victim) == before


@pytest.mark.parametrize("depth", range(len(pathlib.PurePath(Toy.place).parts)))
def test_a_folder_on_the_way_that_is_a_link_is_refused(tmp_path, depth) -> None:
    victim, output = victims(tmp_path), tmp_path / "out"
    link = output.joinpath(*pathlib.PurePath(Toy.place).parts[: depth + 1])
    link.parent.mkdir(parents=True)
    link.symlink_to(victim)
    before = content(victim)
    with pytest.raises(OutputError, match="is a link"):
        run(driver(), Toy(), Config(str(output), name="toy"))
    assert content(victim) == before


def test_the_output_folder_itself_may_be_a_link(tmp_path) -> None:
    (tmp_path / "scratch").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "scratch")
    done = run(driver(), Toy(), Config(str(tmp_path / "out"), name="toy"))
    assert done.folder == place_of(tmp_path / "scratch") / "toy"


def test_strangers_files_in_the_folder_of_states_stay(tmp_path) -> None:
    snapshots, folder = FileSnapshots([Record]), tmp_path / "toy"
    state = snapshots.place(folder)
    state.mkdir()
    strange = [f"my-model{i}.pt" for i in range(4)] + ["9" * 200 + "-x.pt", "\u00b2-x.pt"]
    for name in strange:
        (state / name).write_text("precious")
    for step in (1, 2, 3):
        snapshots.save(folder, Kept("f", (step, step), step=step))
    names = {path.name for path in state.iterdir()}
    assert names >= set(strange)
    assert len(names) == len(strange) + 2
    assert snapshots.load(folder, "f").step == 3


@pytest.mark.parametrize("name", ["about.json", "requests.jsonl", "sent", "refused.jsonl"])
def test_an_outbox_with_a_pipe_is_none(tmp_path, name) -> None:
    box = tmp_path / PLACE / "1"
    box.mkdir(parents=True)
    for other in {"about.json", "requests.jsonl", "sent"} - {name}:
        (box / other).write_text("")
    os.mkfifo(box / name)
    assert list(deliver(tmp_path)) == []
    assert (box / name).is_fifo()


def test_an_owner_that_is_a_pipe_or_a_link_is_nobody(tmp_path) -> None:
    os.mkfifo(tmp_path / ".a.owner")
    (tmp_path / ".b.owner").symlink_to("/dev/zero")
    assert owner_of(tmp_path / "a") is None
    assert owner_of(tmp_path / "b") is None
