"""A saved view of the MLflow UI: healing runs only, all visible, with the columns that matter.

MLflow keeps shared views as experiment tags (undocumented; checked against 3.17.2 in a browser):
``mlflow.sharedViewState.<key>`` holds JSON with ``state`` = ``deflate;`` + base64 of the deflated
JSON of the table's and charts' state. Without one the table shows neither parameters nor metrics
and charts show ten runs.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

KEY = "healing"
NAME = "Healing runs"
COLUMNS = (
    ("tags", "model"),
    ("tags", "arm"),
    ("params", "seed"),
    ("tags", "verdict"),
    ("tags", "verdict_loss"),
    ("tags", "spectral_state"),
    ("metrics", "rank_recovery_pct"),
    ("metrics", "loss_recovery_pct"),
    ("metrics", "effective_rank"),
    ("metrics", "perplexity"),
)
CHARTS = "^(effective_rank|rank_recovery_pct|loss_recovery_pct|perplexity|loss|spectral_gap)$"
FILTER = "tags.stage = 'heal'"


def view_state() -> dict[str, Any]:
    """The state of the runs page: filter, columns, every run visible."""
    return {
        "searchFilter": FILTER,
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "selectedColumns": [f"{kind}.`{name}`" for kind, name in COLUMNS],
        "runsHiddenMode": "SHOW_ALL",
        "runsExpanded": {},
        "runsPinned": [],
        "runsHidden": [],
        "runsVisibilityMap": {},
        # One mean line per model and arm; grouping also shows nested runs without their parent.
        "groupBy": {
            "aggregateFunction": "average",
            "groupByKeys": [
                {"mode": "tag", "groupByData": "model"},
                {"mode": "tag", "groupByData": "arm"},
            ],
        },
        "groupsExpanded": {},
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        # Sections are sorted by name, which puts the single blocks first: show the headlines.
        "chartsSearchFilter": CHARTS,
    }


def encoded(now_ms: int) -> str:
    """Value of the experiment tag.

    Args:
        now_ms: Creation time, milliseconds since the epoch.
    """
    packed = base64.b64encode(zlib.compress(json.dumps(view_state()).encode())).decode()
    return json.dumps(
        {"name": NAME, "createdAt": now_ms, "updatedAt": now_ms, "state": f"deflate;{packed}"}
    )


def link(experiment_id: str, mode: str = "CHART") -> str:
    """Path of the view in the UI; ``mode`` is ``CHART`` or ``TABLE``."""
    return (
        f"/?workflowType=machine_learning#/experiments/{experiment_id}/runs?viewStateShareKey={KEY}"
        f"&compareRunsMode={mode}&workflowType=machine_learning"
    )
