"""Seconds by phase on a clock made by hand, and the tag that follows from a thread."""

from __future__ import annotations

import threading

import pytest

from healing.errors import TrackingError
from healing.stages.terminal.phase_times import PhaseTag, PhaseTimes, metric_name


class Clock:
    now = 7.0

    def __call__(self) -> float:
        return self.now


def test_every_moment_belongs_to_one_phase():
    clock = Clock()
    times = PhaseTimes("preparing", clock)
    for name, until in (("bases", 8.0), ("bases", 9.5), ("attack", 12.0), ("bases", 20.0)):
        clock.now = until
        times.enter(name)
    clock.now = 21.0
    with times.within("logging"):
        clock.now = 21.5
    clock.now = 22.0
    assert times.now == "bases"
    assert times.seconds() == {
        "preparing": 1.0, "bases": 4.0 + 1.0 + 0.5, "attack": 8.0, "logging": 0.5,
    }  # fmt: skip
    clock.now = 30.0
    assert sum(times.seconds().values()) == 30.0 - 7.0


def test_a_phase_lasts_from_its_beginning_and_not_from_the_last_look():
    clock = Clock()
    times = PhaseTimes("a", clock)
    clock.now = 10.0
    times.enter("b")
    clock.now = 12.0
    times.enter("b")
    times.seconds()
    clock.now = 13.0
    assert times.lasted == 3.0


def test_the_name_of_a_metric_holds_no_spaces():
    assert metric_name("healthy measurement") == "seconds/healthy_measurement"


class Run:
    """Notes what it is told; may be away."""

    def __init__(self) -> None:
        self.tagged: list[str] = []
        self.told = threading.Semaphore(0)
        self.away = False

    def tags(self, values, *, later=False):
        if not self.away:
            self.tagged.append(values["phase"])
        self.told.release()
        if self.away:
            raise TrackingError("away")


def follow(run: Run, times: PhaseTimes, **options) -> PhaseTag:
    tag = PhaseTag(times, **{"every": 0.001, "away": 0.001, **options})
    tag.start(run)
    return tag


def told(run: Run) -> None:
    assert run.told.acquire(timeout=20)


def test_a_phase_that_lasts_is_sent_once():
    clock, run = Clock(), Run()
    times = PhaseTimes("loading", clock)
    clock.now += 3.0
    tag = follow(run, times, lasting=2.0)
    told(run)
    times.enter("tokenizing")  # lasts a second and is over
    clock.now += 1.0
    times.enter("attack")
    clock.now += 3.0
    told(run)
    tag.stop()
    assert run.tagged == ["loading", "attack"]


@pytest.mark.filterwarnings("error")
def test_a_store_that_is_away_is_asked_again_and_breaks_nothing():
    clock, run = Clock(), Run()
    run.away = True
    times = PhaseTimes("attack", clock)
    tag = follow(run, times, lasting=0.0)
    told(run)
    told(run)
    assert run.tagged == []
    run.away = False
    while not run.tagged:
        told(run)
    tag.stop()
    assert run.tagged == ["attack"]


def test_nothing_is_sent_after_the_stop():
    run, times = Run(), PhaseTimes("attack", Clock())
    tag = follow(run, times, lasting=1e9)
    tag.stop()
    times.enter("healing")
    assert run.tagged == []
    PhaseTag(times).stop()  # one that never began
