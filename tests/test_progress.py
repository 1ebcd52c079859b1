"""Phases as a listener hears them: nested, counted, named, left early."""

from __future__ import annotations

import pytest

from healing.progress import counted, during, enter, listening, phase, tick


class Heard(list):
    """What a listener was told."""

    def __call__(self, name, done, total, note=""):
        self.append((name, done, total, note))


def test_without_a_listener_phases_are_plain_loops():
    enter("loading")
    tick()
    with during("measurement"):
        assert list(phase("bases", iter("ab"))) == ["a", "b"]
        assert list(counted("cd", 2)) == ["c", "d"]


def test_a_phase_goes_on_after_its_parts():
    heard = Heard()
    with listening(heard):
        for step in phase("attack", range(1, 3), 2):
            if step == 2:
                with during("measurement"):
                    assert list(counted("abc", 3)) == ["a", "b", "c"]
    assert heard == [
        ("attack", 0, 2, ""),
        ("attack", 1, 2, ""),
        ("measurement", 0, None, ""),
        ("measurement", 0, 3, ""),
        ("measurement", 1, 3, ""),
        ("measurement", 2, 3, ""),
        ("measurement", 0, None, ""),
        ("attack", 1, 2, ""),
    ]


def test_a_counted_loop_has_the_name_of_what_it_is_in():
    heard = Heard()
    with listening(heard):
        list(counted("a"))  # in nothing: nobody could be told what it is
        enter("healthy measurement")
        list(counted("ab", 2))
        for _ in phase("catalyst search", range(1), 12):
            list(counted("ab", 2))  # the number of the search stays
            tick()
    search = ("catalyst search", 0, 12, "")
    assert heard == [
        ("healthy measurement", 0, None, ""),
        ("healthy measurement", 0, 2, ""),
        ("healthy measurement", 1, 2, ""),
        ("healthy measurement", 0, None, ""),
        search, search, search, search,
        ("healthy measurement", 0, None, ""),
    ]  # fmt: skip


def test_a_note_is_asked_before_every_item():
    heard, best = Heard(), [0.1]
    with listening(heard):
        best += phase("search", [0.2, 0.3], 2, lambda: f"ρ {len(best)}")
    assert [note for *_, note in heard] == ["ρ 1", "ρ 2"]


def test_a_loop_that_is_left_early_tells_nothing_by_itself():
    heard = Heard()
    with listening(heard):
        enter("preparing")
        for _ in phase("attack", range(9), 9):
            break
        with during("collapsed measurement"):
            pass
    assert [name for name, *_ in heard] == [
        "preparing", "attack", "collapsed measurement", "attack",
    ]  # fmt: skip


def test_what_fails_stays_named():
    heard = Heard()

    def fail():
        with during("measurement"):
            raise ZeroDivisionError

    with listening(heard):
        enter("preparing")
        with pytest.raises(ZeroDivisionError):
            fail()
    assert heard[-1][0] == "measurement"


def test_a_listener_ends_a_loop_and_another_one_is_undisturbed():
    class EndedError(Exception):
        pass

    def end(name, done, total, note=""):
        if done == 1:
            raise EndedError

    outer, seen = Heard(), []
    with listening(outer):
        enter("outer")
        with pytest.raises(EndedError), listening(end):
            seen.extend(phase("inner", "abc", 3))
        tick()
    assert seen == ["a"]
    assert outer == [("outer", 0, None, ""), ("outer", 0, None, "")]
