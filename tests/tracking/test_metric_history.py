"""Trajectories assembled from pages: order, gaps, pages that are cut off."""

from __future__ import annotations

import math

import pytest

from healing.tracking.metric_history import DATABASE, PageSize, Point, trajectories

WHOLE, SMALL = PageSize(), PageSize(100, 10)


def fetch_from(points: dict[str, list[Point]], calls: list | None = None, size=WHOLE):
    """A store that, like the real one, answers at most a page and does not say so."""

    def fetch(run_ids, metric):
        if calls is not None:
            calls.append((len(run_ids), metric))
        found = [p for p in points.get(metric, []) if p.run_id in run_ids]
        return found[: size.points]

    return fetch


def line(run_id: str, steps, scale: float = 1.0) -> list[Point]:
    return [Point(run_id, s, 1000 + s, scale * s) for s in steps]


def test_values_stand_at_their_steps_and_gaps_are_nan():
    points = {"a": line("r", (20, 0, 10)), "b": line("r", (10,), 2.0), "s": line("r", (0, 30))}
    (found,) = trajectories(fetch_from(points), ["r", "other"], ["a", "b"], also=["s"]).values()
    assert found.steps == (0, 10, 20, 30)
    assert found.values["a"][:3] == (0.0, 10.0, 20.0)
    assert math.isnan(found.values["a"][3])
    assert [math.isnan(v) for v in found.values["b"]] == [True, False, True, True]
    assert set(found.values) == {"a", "b"}


def test_of_two_values_at_one_step_the_later_counts():
    points = {"a": [Point("r", 5, 200, 2.0), Point("r", 5, 100, 1.0), Point("r", 6, 1, 0.0),
                    Point("r", 6, 1, 9.0)]}  # fmt: skip
    assert trajectories(fetch_from(points), ["r"], ["a"])["r"].values["a"] == (2.0, 9.0)


def test_a_page_holds_a_hundred_runs():
    ids = [f"r{i}" for i in range(250)]
    calls: list = []
    points = {"a": [p for i in ids for p in line(i, (0, 1))]}
    found = trajectories(fetch_from(points, calls), ids, ["a"])
    assert list(found) == ids
    assert calls == [(100, "a"), (100, "a"), (50, "a")]
    calls.clear()
    assert trajectories(fetch_from(points, calls), ids, ["a"], size=DATABASE) == found
    assert calls == [(250, "a")]


def test_cut_pages_are_asked_for_in_halves():
    ids = [f"r{i}" for i in range(7)]
    points = {"a": [p for i in ids for p in line(i, range(4))]}
    found = trajectories(fetch_from(points, size=SMALL), ids, ["a"], size=SMALL)
    assert {i: t.steps for i, t in found.items()} == dict.fromkeys(ids, (0, 1, 2, 3))


@pytest.mark.parametrize("length", [10, 11])
def test_a_run_longer_than_a_page_is_left_out_whole(length):
    """A page that is just full may have been cut: half a trajectory would be wrong."""
    points = {"a": line("long", range(length)) + line("r", range(3)),
              "b": line("long", range(3)) + line("r", range(3))}  # fmt: skip
    found = trajectories(fetch_from(points, size=SMALL), ["long", "r"], ["b", "a"], size=SMALL)
    assert list(found) == ["r"]
    assert found["r"].values["a"] == (0.0, 1.0, 2.0)
