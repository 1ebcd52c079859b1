"""Charts of a stored view, in the words of MLflow's charts page (3.17.2).

Identifiers are made from what is shown, so that the same view is the same bytes.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

Chart = dict[str, Any]

RUNS = 100
"""Runs, or groups of runs, that a chart draws at most; MLflow's own default is ten."""
_OWN = uuid.UUID("7c2e3c5e-6f0b-4a55-9a2c-3a5c2a1c8d10")


def identifier(*names: str) -> str:
    """The same identifier for the same names."""
    return str(uuid.uuid5(_OWN, "\n".join(names)))


def _chart(kind: str, section: str, *names: str, **content: Any) -> Chart:
    return {
        "type": kind,
        "uuid": identifier(section, kind, *names),
        "runsCountToCompare": RUNS,
        "metricSectionId": section,
        "deleted": False,
        "isGenerated": False,
        **content,
    }


def line(section: str, *metrics: str, log: bool = False) -> Chart:
    """Metrics against the step, by run or group; ``log``: on a logarithmic axis."""
    return _chart(
        "LINE",
        section,
        *metrics,
        metricKey=metrics[0],
        selectedMetricKeys=[*metrics],
        xAxisKey="step",
        xAxisScaleType="linear",
        selectedXAxisMetricKey="",
        yAxisKey="metric",
        yAxisExpressions=[],
        scaleType="log" if log else "linear",
        lineSmoothness=0,
        displayPoints=True,
        useGlobalLineSmoothing=False,
        useGlobalXaxisKey=False,
    )


def scatter(section: str, param: str, metric: str) -> Chart:
    """A metric's last value against a parameter."""
    axes = {"xaxis": {"key": param, "type": "PARAM"}, "yaxis": {"key": metric, "type": "METRIC"}}
    return _chart("SCATTER", section, param, metric, **axes)


def contour(section: str, params: tuple[str, str], metric: str) -> Chart:
    """A metric's last value over two parameters, as colour."""
    across, up = params
    return _chart(
        "CONTOUR",
        section,
        *params,
        metric,
        xaxis={"key": across, "type": "PARAM"},
        yaxis={"key": up, "type": "PARAM"},
        zaxis={"key": metric, "type": "METRIC"},
    )


def parallel(section: str, params: Sequence[str], metrics: Sequence[str]) -> Chart:
    """One line per run through its parameters and last values; never drawn for groups."""
    names = {"selectedParams": [*params], "selectedMetrics": [*metrics]}
    return _chart("PARALLEL", section, *params, *metrics, showAllRuns=False, **names)


def pictures(section: str, key: str) -> Chart:
    """Pictures of a series by step, one per run (ten runs at most); never drawn for groups.

    MLflow's own chart of them has every parameter of a run over its picture.
    """
    return _chart("IMAGE", section, key, imageKeys=[key], step=0, showRunParams=False)


def section(view: str, name: str, height: int, columns: int) -> Chart:
    """A section; charts in it are ``height`` pixels high."""
    return {
        "uuid": identifier(view, name),
        "name": name,
        "display": True,
        "isReordered": True,
        "deleted": False,
        "isGenerated": False,
        "columns": columns,
        "cardHeight": height,
    }
