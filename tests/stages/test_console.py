"""What is shown: bars that move by themselves, few lines in a pipe, many cells in one bar."""

from __future__ import annotations

import contextlib
import io
import os
import pathlib
import re
import sys
import threading
import time

import pytest

from healing.stages.terminal import bars, console
from healing.stages.terminal.bars import cut, phase_text, shortened
from healing.stages.terminal.console import Cells, Console, Lines, Silence


class Terminal(io.StringIO):
    """Takes what is drawn, and lets a test wait for more."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn = threading.Event()

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.drawn.set()
        return super().write(text)

    def shows(self, text: str) -> bool:
        """Whether a text is drawn from here on, with nobody telling anything."""
        before, deadline = len(self.getvalue()), time.monotonic() + 20
        while text not in self.getvalue()[before:]:
            self.drawn.clear()
            if not self.drawn.wait(deadline - time.monotonic()):
                return False
        return True


@pytest.fixture
def terminal(monkeypatch):
    made = Terminal()
    monkeypatch.setattr(bars, "TICK_SECONDS", 0.002)
    monkeypatch.setattr(bars, "REDRAW_SECONDS", 0.0)
    monkeypatch.setenv("COLUMNS", "100")
    return made


def tickers() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "redraws the bar"]


def test_a_bar_is_redrawn_while_nothing_is_told_and_rests_when_it_is_closed(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    with contextlib.closing(Console("normal").progress("attack nano haep")) as bar:
        bar.phase("loading model", 0, None)
        assert terminal.shows("loading model")
        bar.begin(40, "step")
        bar.step(0, "rank 42.1")
        bar.phase("catalyst search", 2, 12, "ρ 0.047")
        assert terminal.shows("catalyst search 3/12, ρ 0.047, rank 42.1")
        bar.step(10)
        bar.phase("attack", 10, 40)
        assert terminal.shows("  attack, rank 42.1")  # the number of the step is in the bar
        assert terminal.shows("attack nano haep:  25%|")
        assert terminal.shows(" 10/40 [00:0")
        assert len(tickers()) == 1
    bar.close()
    assert tickers() == []


def test_a_bar_moves_by_parts_of_a_step_and_shows_whole_ones(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    with contextlib.closing(Console("normal").progress("sweep")) as bar:
        bar.begin(4, "cell")
        bar.step(1)
        bar.part(0.5, "nano haep, singular bases 3/9")
        assert terminal.shows("sweep:  38%|")  # 1.5 of 4
        assert terminal.shows(" 1/4 [")
        assert terminal.shows("nano haep, singular bases 3/9")


def test_a_terminal_that_does_not_know_its_width_shows_the_bar_too(monkeypatch):
    """As a pseudo-terminal is made: of 0 columns, until somebody gives it a size."""
    ours, theirs = os.openpty()
    monkeypatch.delenv("COLUMNS", raising=False)
    with open(theirs, "w") as end:
        assert os.get_terminal_size(theirs).columns == 0
        monkeypatch.setattr(sys, "stderr", end)
        with contextlib.closing(Console("normal").progress("sweep")) as bar:
            bar.begin(4, "cell")
            bar.step(1)
    shown = b""
    with contextlib.suppress(OSError):  # how the other end's closing is said
        while part := os.read(ours, 65536):
            shown += part
    os.close(ours)
    lines = re.split(r"[\r\n]+", shown.decode())
    (drawn,) = {len(line) for line in lines if line.startswith("sweep:  25%|")}
    assert 60 < drawn < 80


def test_waiting_shows_a_clock_and_leaves_nothing(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    with Console("normal").waiting("opening the store"):
        assert terminal.shows("opening the store [00:0")
        assert len(tickers()) == 1
    assert tickers() == []
    assert terminal.getvalue().endswith("\r")


def test_what_others_write_stands_in_whole_lines_above_the_bars(terminal, monkeypatch):
    monkeypatch.setattr(sys, "stderr", terminal)
    shown = Console("normal")
    with shown.waiting("opening the store"), contextlib.closing(shown.progress("attack")) as bar:
        print("Creating tables", "of a store", file=sys.stderr)
        sys.stderr.write("half a line")
        assert "half" not in terminal.getvalue()
        bar.step(0)
        assert terminal.shows("attack")
    assert sys.stderr is terminal
    drawn = terminal.getvalue()
    # At the beginning of a line (bars below it are cleared last, or first), in one piece.
    assert re.search(r"\r(\x1b\[A)*Creating tables of a store\n", drawn)
    assert drawn.endswith("half a line")


@pytest.mark.parametrize("verbosity", ["quiet", "normal"])
def test_quiet_and_in_a_pipe_there_is_no_thread_and_no_bar(verbosity, capsys):
    shown = Console(verbosity).progress("attack")
    with Console(verbosity).waiting("opening the store"):
        assert tickers() == []
    shown.begin(2, "step")
    shown.phase("loading model", 0, None)
    shown.close()
    lines = capsys.readouterr().err
    assert lines == ("" if verbosity == "quiet" else "attack: loading model\n")


def test_lines_in_a_pipe_are_few(capsys):
    lines = Lines("attack")
    for done in range(200):
        lines.phase("bases", done, 200)
    lines.begin(100, "step")
    for done in range(1, 101):
        lines.phase("attack", done - 1, 100)
        lines.step(done, f"rank {done}")
        lines.phase("measurement", 0, None)
        lines.part(0.5, "nano haep")
    assert capsys.readouterr().err.splitlines() == [
        "attack: bases 1/200", "attack: attack 1/100", "attack: measurement",
        "attack: step 100/100 rank 100",
    ]  # fmt: skip


def test_a_long_phase_in_a_pipe_says_now_and_then_how_far_it_is(capsys, monkeypatch):
    moment = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: moment[0])
    lines = Lines("attack")
    for done in range(100):
        moment[0] = 1000.0 + done
        lines.phase("bases", done, 100)
    said = [line.rpartition(" ")[2] for line in capsys.readouterr().err.splitlines()]
    assert said == ["1/100", "31/100", "61/100", "91/100"]


class Noting(Silence):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.shares: list[float] = []

    def begin(self, total, unit):
        self.said.append(f"{total} {unit}")

    def part(self, share, text):
        self.shares.append(share)
        self.said.append(text)

    def step(self, done, note=""):
        self.said.append(f"{done}: {note}")


def test_a_cell_of_many_speaks_through_the_bar_of_all():
    noting = Noting()
    with Cells(noting, 2, "cell") as cells:
        cell = cells.cell(2)
        inside = Console("quiet").within(cell)
        attack = inside.progress("attack nano")
        attack.rename("attack nano haep")
        attack.phase("bases", 3, 9)
        attack.begin(60, "step")
        attack.step(30)
        attack.phase("search", 2, 12, "ρ 0.1")
        attack.close()
        heal = inside.progress("heal nano haep")
        heal.begin(10, "step")
        heal.step(5)
        other = cells.cell(1)
        other.run("heal none").phase("healing", 0, None)
        heal.close()
        cells.over(cell, "nano haep")
    assert noting.said == [
        "2 cell",
        "1 running, 1 queued; attack nano haep, bases 4/9",
        "1 running, 1 queued; attack nano haep 30/60",
        "1 running, 1 queued; attack nano haep, search 3/12, ρ 0.1",
        "1 running, 1 queued; attack nano haep",
        "1 running, 1 queued; heal nano haep 5/10",
        "2 running, 0 queued; heal none, healing",
        "2 running, 0 queued; heal nano haep",
        "1: 1 running, 0 queued; last: nano haep",
        "1 running, 0 queued; last: nano haep",
    ]
    assert noting.shares == [0.0, 0.25, 0.25, 0.5, 0.75, 0.75, 1.0, 0.0]


def test_the_bar_counts_cells_that_failed_and_says_what_all_wait_for():
    noting = Noting()
    with Cells(noting, 3, "cell") as cells:
        cells.waiting("waiting for a machine")
        one = cells.cell(1)
        one.tell(0.5, "heal nano")
        cells.over(one, "nano haep", failed=True)
    assert noting.said[1:] == [
        "0 running, 3 queued; waiting for a machine",
        "1 running, 2 queued; heal nano",
        "1: 0 running, 2 queued, 1 failed; last: nano haep",
        "0 running, 2 queued, 1 failed; last: nano haep",
    ]


def test_the_bar_of_cells_never_goes_back_within_a_cell():
    noting = Noting()
    cells = Cells(noting, 1, "cell")
    cell = cells.cell(1)
    for title in ("first", "one more than was known"):
        run = cell.run(title)
        run.begin(4, "step")
        for done in (1, 4):
            run.step(done)
        run.close()
    assert noting.shares == [0.25, 1.0, 1.0, 1.0, 1.0, 1.0]


def test_texts_fit():
    assert phase_text("loading", 0, None) == "loading"
    assert phase_text("reading text", 41, None) == "reading text 42"
    assert phase_text("measurement", 0, 1) == "measurement"
    assert phase_text("measurement", 0, 2) == "measurement 1/2"
    title = "attack SmolLM2-135M-Instruct.Q4_1.gguf-05a013d1 haep seed 0"
    assert shortened(title, 100) == title
    assert shortened(title, 21) == "attack Smo…aep seed 0"
    assert cut(title, 7) == "attack…"
    assert cut(title, 100) == title


@pytest.mark.parametrize("detail", [True, False])
def test_a_command_ends_in_verdict_files_and_link(capsys, detail):
    shown = Console("normal")
    shown.over("healed", pathlib.Path("results/a"), detail=detail, alone=True)
    shown.link("http://host/#/x")
    shown.link("")  # nothing is tracked
    assert capsys.readouterr().out.splitlines() == [
        "healed",
        "files: results/a",
        "MLflow: http://host/#/x",
    ]
    shown.over("healed", pathlib.Path("results/a"), detail=detail, alone=False)
    assert capsys.readouterr().out == ("" if detail else "healed → results/a\n")
