"""Whatever is given on a command line, as a path or to a closed terminal: one line, or it works."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import subprocess
import sys
import unicodedata
from typing import Any

import click
import hypothesis.strategies as st
import pytest

from entrypoints._cli import command, run_stage
from entrypoints._stages import STAGES, EntryPoint
from healing.config.heal import HealConfig
from healing.config.options import MAX_COUNT, fields_of, flag_name
from healing.config.paths import is_address, local_path
from healing.config.pretrain import PretrainConfig
from healing.config.sweep import SweepConfig
from healing.config.tune import TuneConfig
from healing.errors import CheckpointError, ConfigError, OutputError, TrackingError
from healing.models.checkpoints import CHECKPOINT_NAME
from healing.reporting.escaping import csv_cell
from healing.stages.healing_run.inputs import find_checkpoints, local_checkpoint
from healing.stages.terminal.console import Console
from healing.stages.terminal.lines import write_line
from healing.tracking import queries
from healing.tracking.output_folder import require_writable
from healing.tracking.store import MlflowStore
from tests.conftest import ROOT
from tests.hostile.examples import tried

OPTIONS = [(name, field.name) for name, e in STAGES.items() for field, _, _ in fields_of(e.config)]
VALUES = st.one_of(
    st.text(max_size=12),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ["", " ", ",", "a" * 5000, "9" * 5000, "~nosuch/x", "../..", "/", "s3://b/x", "auto",
         "0,00",
         "0-99999999999", "4-1", "nan", "1e400", "-0", "١", "²", "nano", "nano,micro", "haep",
         "\x1b[2J", "a\nb", "\x00", "\ud800", "file:///etc/passwd", "owner/name", "true", "x=1"]),
)  # fmt: skip


def check_values(place: pathlib.Path, example: Any) -> None:
    (stage, first), value, other, second = example
    entry = STAGES[stage]
    given = {first: value}
    names = [field.name for field, _, _ in fields_of(entry.config)]
    given[names[other % len(names)]] = second
    arguments = [f"{flag_name(name)}={text}" for name, text in given.items()]
    try:
        context = command(stage).make_context(stage, arguments)
        config = entry.config(**context.params)
    except (click.ClickException, ConfigError) as error:
        assert str(getattr(error, "message", error))  # noqa: PT017
        return
    for field in dataclasses.fields(config):
        own = getattr(config, field.name)
        if isinstance(own, str):
            assert len(own) <= 4096
            assert not any(unicodedata.category(c) in ("Cc", "Cs") for c in own)
        elif isinstance(own, int):
            assert own <= max(MAX_COUNT, field.metadata["maximum"] or 0)


test_values, test_values_many = tried(
    st.tuples(st.sampled_from(OPTIONS), VALUES, st.integers(0, 60), VALUES), check_values, 500
)


def check_path(place: pathlib.Path, given: str) -> None:
    if is_address(given):
        return
    try:
        assert local_path(given, "--x").is_absolute()
    except ConfigError as error:
        assert str(error).startswith("--x ")  # noqa: PT017
    try:
        require_writable(str(place / "new") + "/" + given)
    except OutputError as error:
        assert "--output-dir" in str(error)  # noqa: PT017
    assert not (place / "new").exists()


test_paths, test_paths_many = tried(VALUES.filter(lambda v: "\ud800" not in v), check_path, 200)


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("~nosuch/x", "home directory"),
        ("a" * 5000, "too long"),
        ("b/" + "a" * 256, "too long"),
        ("é" * 200, "too long"),
        ("a\0b", "null byte"),
    ],
)
def test_what_can_be_no_path_is_named(given, reason):
    with pytest.raises(ConfigError, match=rf"--flag .* cannot be a path here \(.*{reason}"):
        local_path(given, "--flag")


def test_a_loop_of_links_is_no_path(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot be a path here"):
        local_path(str(tmp_path / "a"), "--flag")


@pytest.mark.parametrize("given", ["s3://b/x", "https://h/x", "~nosuch/x", "a" * 300, "a\0b"])
def test_what_can_be_no_output_folder_is_named(given):
    with pytest.raises(OutputError, match=r"--output-dir .* cannot be a folder"):
        require_writable(given)


@pytest.mark.parametrize("uri", ["s3://b/x.pt", "nosuch://b/x.pt", "runs:/../../x", "dbfs:/x"])
def test_an_address_that_cannot_be_had_is_one_line(store, uri):
    with pytest.raises(TrackingError, match=r"artifact .* cannot be had"):
        local_checkpoint(HealConfig(collapsed_checkpoint=uri), MlflowStore())


def test_links_out_of_a_scanned_folder_are_left_out(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "a", inside / "b", outside):
        folder.mkdir(parents=True)
    (outside / CHECKPOINT_NAME).write_bytes(b"x")
    (inside / "a" / CHECKPOINT_NAME).symlink_to(outside / CHECKPOINT_NAME)
    with pytest.raises(CheckpointError, match="links that lead out of it are left out"):
        find_checkpoints(str(inside))
    (inside / "b" / CHECKPOINT_NAME).write_bytes(b"x")
    assert find_checkpoints(str(inside)) == [inside / "b" / CHECKPOINT_NAME]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SweepConfig(models="nano", seeds="0,00"), "names one entry twice"),
        (lambda: SweepConfig(models="nano", seeds="0-3,2"), "names one entry twice"),
        (lambda: SweepConfig(models="nano", seeds="0-9999999999"), "whole numbers from 0"),
        (lambda: SweepConfig(models="nano", seeds="0-20000"), "are more than 10000 seeds"),
        (lambda: SweepConfig(models="nano", seeds="9" * 4000), "whole numbers from 0"),
        (lambda: TuneConfig(seeds="100,0100"), "--seeds names one seed twice"),
        (lambda: TuneConfig(seeds="9999999999"), "whole numbers from 0"),
        (lambda: HealConfig(checkpoint_dir="x", num_runs=2), "--num-runs is not for"),
        (lambda: HealConfig(runs_per_checkpoint=2), "--runs-per-checkpoint is for"),
        (lambda: HealConfig(num_runs=10**6), "--num-runs must be at least 1 and at most 1000"),
        (lambda: HealConfig(healing_steps=10**10), "at most 1e+09, got 1e+10"),
        (lambda: HealConfig(healing_steps=10**400), "got a number of more digits"),
        (lambda: HealConfig(corpus=""), "--corpus is empty"),
        (lambda: HealConfig(corpus=" "), "--corpus is empty"),
        (lambda: SweepConfig(corpus=""), "--corpus is empty"),
        (lambda: PretrainConfig(corpus=""), "--corpus is empty"),
        (lambda: HealConfig(output_dir="a\x1b[2J"), "control character '\\x1b'"),
        (lambda: HealConfig(tokenizer="a" * 5000), "at most 4096 characters, got 5000"),
    ],
)
def test_what_misleads_is_refused(make, message):
    with pytest.raises(ConfigError) as caught:
        make()
    assert message in str(caught.value)


def test_every_count_has_a_maximum():
    for name, entry in STAGES.items():
        for field, kind, _ in fields_of(entry.config):
            if kind is not int:
                continue
            with pytest.raises(ConfigError) as caught:
                entry.config(**{field.name: 10**14})
            assert flag_name(field.name) in str(caught.value), (name, field.name)


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+1", "-1", "@x", " =1+1", "\t=1", "\n=1", "\r=1", "\u00a0=1", "\u200b=1", "＝1",
     "＋1", "－1", "＠x", " \u3000＝1", "\x00=1", "\ttext", "\ntext"],
)  # fmt: skip
def test_no_cell_is_a_formula(text):
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["haep", "a=b", "1", "", " x", "−", 3, -0.5, None])
def test_other_cells_stay_as_they_are(value):
    assert csv_cell(value) is value


def test_control_characters_never_reach_the_terminal(capsys):
    Console("normal").say("a\x1b]0;owned\x07b\u202ec\td\ne")
    Console("normal").progress("run \x1b[2J").phase("x\x9b", 0, None)
    out, err = capsys.readouterr()
    assert out == "a\ufffd]0;owned\ufffdb\ufffdc\td\ne\n"
    assert "\x1b" not in err
    assert "\x9b" not in err


SAYS = "from healing.stages.terminal.console import Console; c = Console('normal')\n"


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
"""As users have it: what is left in a buffer is written at the interpreter's end."""


def finish(lines: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-c", SAYS + lines + "\nimport sys; sys.exit(7)"],
        cwd=ROOT,
        env=streams.pop("env", BUFFERED),
        **streams,
    )


def test_a_closed_or_full_output_fails_nothing():
    loop = "for i in range(20000): c.say(f'line {i} é→')"
    read, write = os.pipe()
    os.close(read)
    assert finish(loop, stdout=write, stderr=subprocess.PIPE).returncode == 7
    os.close(write)
    with open("/dev/full", "w") as full:
        done = finish(loop, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (7, b"")
    closed = ["sh", "-c", 'exec "$0" -c "$1" >&- 2>&-', sys.executable]
    program = SAYS + "c.say('x'); c.progress('t').phase('p', 0, None)\nimport sys; sys.exit(7)"
    assert subprocess.run([*closed, program], cwd=ROOT, env=BUFFERED).returncode == 7
    plain = {**BUFFERED, "PYTHONIOENCODING": "ascii"}
    done = finish("c.say('é→')", stdout=subprocess.PIPE, env=plain)
    assert (done.returncode, done.stdout) == (7, b"??\n")


def test_a_line_to_a_closed_stream_is_dropped(monkeypatch, capsys):
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    write_line("nobody reads this")


def test_a_file_of_this_machine_is_not_copied(tmp_path):
    (tmp_path / "artifact").write_text("x")
    assert queries.download(f"file://{tmp_path}/artifact") == tmp_path / "artifact"


def test_what_is_fetched_for_a_process_goes_with_it(tmp_path):
    """In a process of its own: the folder is removed at the interpreter's end."""
    (tmp_path / "artifact").write_text("x")
    program = (
        "from healing.tracking import queries\n"
        f"path = queries.download('{tmp_path}/artifact')\n"
        "print(path.is_file(), path)\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    there, path = done.stdout.split()
    assert there == "True"
    assert path != str(tmp_path / "artifact")
    assert not pathlib.Path(path).exists()
    assert [p.name for p in tmp_path.iterdir()] == ["artifact"]
    assert queries.download(str(tmp_path / "artifact")).read_text() == "x"


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (PermissionError(13, "denied", "/x\x1b[2J/y"), "/x\ufffd[2J/y could not be used: denied"),
        (OSError(28, "No space left on device"), "a file could not be used: No space left"),
        (ConfigError("what\nwhere\x07"), "error: what where\ufffd"),
    ],
)  # fmt: skip
def test_a_refused_file_is_one_line(monkeypatch, capsys, error, line):
    def fail(config: object) -> None:
        raise error

    monkeypatch.setattr(EntryPoint, "load", lambda self, values: fail)
    with pytest.raises(SystemExit) as ended:
        run_stage("summarize", STAGES["summarize"], {})
    out, err = capsys.readouterr()
    assert (ended.value.code, out, err.count("\n")) == (1, "", 1)
    assert err.startswith("error: ")
    assert line in err
