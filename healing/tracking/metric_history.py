"""Trajectories of many runs from few requests: a page holds one metric of up to 100 runs, of a
database up to 1,000. What is held at a time is the points of as many runs.

The store's bulk history is cut off silently at 25,000 points, so a page of that size is asked for
again in halves. Metrics that are NaN are not logged, so a run's steps are those of all its metrics
together.
"""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.rest_utils import http_request, verify_rest_response

from healing.errors import TrackingError
from healing.tracking.sending.store_errors import one_line

RUNS_PER_PAGE = 100
POINTS_PER_PAGE = 25_000
"""What a server answers at most; it does not say when there was more."""


@dataclass(frozen=True)
class PageSize:
    """What one question may ask for.

    Attributes:
        runs: At most.
        points: That it is answered with at most.
    """

    runs: int = RUNS_PER_PAGE
    points: int = POINTS_PER_PAGE


SERVER, DATABASE = PageSize(), PageSize(1000, 250_000)
"""With a server between, and without. SQLite reads all points of a metric, of whatever run, for
every question (3.17.2: it prefers the primary key's index), so that questions are few."""


@dataclass(frozen=True)
class Point:
    """One logged value.

    Attributes:
        run_id: Of the run.
        step: Optimiser step.
        time_ms: When it was logged; of two values of one step the later one counts.
        value: NaN included.
    """

    run_id: str
    step: int
    time_ms: int
    value: float


@dataclass(frozen=True)
class Trajectory:
    """Metrics of one run over its steps; NaN where a step has no value."""

    steps: tuple[int, ...]
    values: Mapping[str, tuple[float, ...]]


Fetch = Callable[[Sequence[str], str], list[Point]]
"""(run ids, metric) → as many points as a page holds."""


def _pages(
    fetch: Fetch, run_ids: Sequence[str], metric: str, cut: set[str], size: PageSize
) -> Iterator[Point]:
    """All points of one metric; a run with more than a page holds goes to ``cut`` instead."""
    for start in range(0, len(run_ids), size.runs):
        asked = run_ids[start : start + size.runs]
        found = fetch(asked, metric)
        if len(found) < size.points:
            yield from found
        elif len(asked) > 1:
            half = replace(size, runs=(len(asked) + 1) // 2)
            yield from _pages(fetch, asked, metric, cut, half)
        else:
            cut.update(asked)


def trajectories(
    fetch: Fetch,
    run_ids: Sequence[str],
    metrics: Sequence[str],
    also: Sequence[str] = (),
    size: PageSize = SERVER,
) -> dict[str, Trajectory]:
    """Trajectories of the runs that have any of the metrics, and of none of them too many points.

    Args:
        fetch: Answers one page.
        run_ids: Runs, each once.
        metrics: Names of the values.
        also: Metrics read for their steps alone.
        size: Of a page.
    """
    found: dict[str, Trajectory] = {}
    for start in range(0, len(run_ids), size.runs):
        with collection_paused():
            found |= _block(fetch, run_ids[start : start + size.runs], metrics, also, size)
    return found


def _block(
    fetch: Fetch,
    run_ids: Sequence[str],
    metrics: Sequence[str],
    also: Sequence[str],
    size: PageSize,
) -> dict[str, Trajectory]:
    """Of no more runs than a page holds."""
    cut: set[str] = set()
    points: dict[str, dict[str, dict[int, tuple[int, float]]]] = {}
    for metric in (*metrics, *also):
        for p in _pages(fetch, run_ids, metric, cut, size):
            own = points.setdefault(p.run_id, {}).setdefault(metric, {})
            if p.step not in own or p.time_ms >= own[p.step][0]:
                own[p.step] = (p.time_ms, p.value)
    return {i: _trajectory(own, metrics) for i, own in points.items() if i not in cut}


def _trajectory(
    own: Mapping[str, Mapping[int, tuple[int, float]]], metrics: Sequence[str]
) -> Trajectory:
    steps = tuple(sorted(set().union(*own.values())))
    missing = (0, math.nan)
    values = {m: tuple(own.get(m, {}).get(s, missing)[1] for s in steps) for m in metrics}
    return Trajectory(steps, values)


BULK_HISTORY = "/ajax-api/2.0/mlflow/metrics/get-history-bulk"


def page_size() -> PageSize:
    """Of the store that MLflow is set to."""
    store = MlflowClient()._tracking_client.store
    return DATABASE if hasattr(store, "get_metric_history_bulk") else SERVER


def metric_page(run_ids: Sequence[str], metric: str) -> list[Point]:
    """One metric of as many runs as a page holds in one query or request.

    The client has no public call for it; this is the one that MLflow's own charts use (3.17.2).

    Raises:
        TrackingError: The store has no bulk history.
    """
    store = MlflowClient()._tracking_client.store
    wanted = {"run_id": list(run_ids), "metric_key": metric, "max_results": POINTS_PER_PAGE}
    try:
        if hasattr(store, "get_metric_history_bulk"):
            found = store.get_metric_history_bulk(run_ids, metric, DATABASE.points)
            return [Point(m.run_id, m.step, m.timestamp, finite(m.value)) for m in found]
        if hasattr(store, "get_host_creds"):
            answer = http_request(store.get_host_creds(), BULK_HISTORY, "GET", params=wanted)
            return [
                Point(r["run_id"], int(r["step"]), int(r["timestamp"]), finite(r["value"]))
                for r in verify_rest_response(answer, BULK_HISTORY).json()["metrics"]
            ]
    except (MlflowException, KeyError, ValueError) as error:
        raise TrackingError(f"no bulk history of {metric}: {one_line(error)[:200]}") from error
    raise TrackingError(f"{type(store).__name__} has no bulk history")


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """No cyclic garbage collection in the block: among a page's many new objects it finds nothing,
    and takes half of the time, of a page of runs two thirds.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def finite(value: float) -> float:
    """Undo the store's spelling of infinity (±1.797e308)."""
    return math.copysign(math.inf, value) if abs(value) > 1.79e308 else value
