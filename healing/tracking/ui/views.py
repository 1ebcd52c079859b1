"""The views of an experiment's runs that this project stores in MLflow.

MLflow keeps shared views as experiment tags (undocumented; checked against 3.17.2 in a browser):
``mlflow.sharedViewState.<key>`` holds JSON with ``state`` = ``deflate;`` + base64 of the deflated
JSON of the table's and charts' state. Without one the table shows neither parameters nor metrics
and charts show ten runs.
"""

from __future__ import annotations

import base64
import hashlib
import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from healing.tracking.ui.charts import Chart, contour, line, parallel, pictures, scatter, section

LINE = "line"
"""Tag whose value, as ``micro haep``, says which line of the charts a run belongs to.

MLflow colours a group by a hash of the tag's name and value. Of the plain words that were tried,
this one gives the eight groups of the default experiment the eight colours that differ most.
"""
TALL, FLAT = 420, 300
"""Pixels of a chart: the first row fits below the head of a window of 1,440 x 900."""
SPECTRUM = "headline/spectrum"
"""Series of pictures of an attack and of a healing run."""

HEAL = "tags.stage = 'heal' and tags.arm != ''"
"""Not the parent of several healing runs, which has no arm."""
ATTACK = "tags.stage = 'attack'"
RANK, LOSS = "rank_recovery_pct", "loss_recovery_pct"
TREATED = "tags.stage = 'heal' and tags.arm != '' and tags.arm_role != 'sham'"
"""The sham has no recovery: it was not damaged."""


@dataclass(frozen=True)
class View:
    """One stored view.

    Attributes:
        key: Of its tag and link.
        name: Shown in the UI.
        about: What it shows, in a clause.
        mode: ``CHART`` or ``TABLE``.
        filter: Which runs.
        columns: Kind and name of the table's columns, the first ones first.
        charts: Sections with their charts, in order.
        grouped: Whether runs are one mean line (with band) per value of :data:`LINE`.
        order: Metric that the table is sorted by, the largest first.
    """

    key: str
    name: str
    about: str
    mode: str
    filter: str
    columns: tuple[tuple[str, str], ...]
    charts: tuple[tuple[Chart, tuple[Chart, ...]], ...]
    grouped: bool = False
    order: str = "rank_recovery_pct"

    def state(self) -> dict[str, Any]:
        """The state of the runs page, every run visible."""
        group = {
            "aggregateFunction": "average",
            "groupByKeys": [{"mode": "tag", "groupByData": LINE}],
        }
        return {
            "searchFilter": self.filter,
            # Sorted by time, children are folded below their sweep, and folded runs are not drawn.
            "orderByKey": f"metrics.`{self.order}`",
            "orderByAsc": False,
            "lifecycleFilter": "Active",
            "selectedColumns": [f"{kind}.`{name}`" for kind, name in self.columns],
            "runsHiddenMode": "SHOW_ALL",
            "runsExpanded": {},
            "runsPinned": [],
            "runsHidden": [],
            "runsVisibilityMap": {},
            "groupBy": group if self.grouped else None,
            "groupsExpanded": {},
            "useGroupedValuesInCharts": True,
            "hideEmptyCharts": True,
            "chartsSearchFilter": "",
            "isAccordionReordered": True,
            "compareRunSections": [head for head, _ in self.charts],
            "compareRunCharts": [chart for _, charts in self.charts for chart in charts],
        }

    def encoded(self, now_ms: int) -> str:
        """Value of the experiment tag.

        Args:
            now_ms: Creation time, milliseconds since the epoch.
        """
        text = json.dumps(self.state())
        state = "deflate;" + base64.b64encode(zlib.compress(text.encode())).decode()
        own = {"name": self.name, "state": state}
        dates = {"createdAt": now_ms, "updatedAt": now_ms}
        return json.dumps({**own, **dates, MADE: _digest(own)})


MADE = "llm-healing"
"""Entry of a stored view: digest of what this program wrote. A person's change leaves it behind."""


def _digest(content: Mapping[str, Any]) -> str:
    kept = json.dumps([content.get("name"), content.get("state")])
    return hashlib.sha256(kept.encode()).hexdigest()[:16]


def may_replace(stored: str | None, view: View) -> bool:
    """Whether a view is to be stored: there is none, or another that this program wrote.

    Args:
        stored: Value of the tag; ``None`` = there is none.
        view: What it should be.
    """
    if stored is None:
        return True
    try:
        content = json.loads(stored)
        made = content[MADE]
    except (ValueError, KeyError, TypeError):
        return False
    return made == _digest(content) != json.loads(view.encoded(0))[MADE]


def _charts(
    view: str, name: str, height: int, *charts: Any, columns: int = 2
) -> tuple[Chart, tuple[Chart, ...]]:
    """A section with its charts. Not three columns: MLflow's table and assistant leave no room."""
    head = section(view, name, height, columns)
    return head, tuple(make(head["uuid"]) for make in charts)


def _line(*metrics: str, log: bool = False) -> Any:
    return lambda where: line(where, *metrics, log=log)


WHO = (("tags", "model"), ("tags", "arm"), ("params", "seed"))
COLUMNS = (
    *WHO,
    ("tags", "verdict"),
    ("metrics", RANK),
    ("metrics", LOSS),
    ("tags", "status"),
    ("attributes", "Duration"),
)
SETTINGS = ("n_params", "seed", "heal.healing_lr", "heal.healing_steps")
ALIGNMENTS = ("alignment", "alignment_random_tokens", "alignment_clean_text", "alignment_isotropic")

RECOVERY = View(
    "recovery",
    "Recovery",
    "mean trajectories of every model and arm",
    "CHART",
    HEAL,
    COLUMNS,
    (
        _charts("recovery", "Recovery (100 = healthy)", TALL, _line(RANK), _line(LOSS)),
        _charts(
            "recovery",
            "What was measured",
            FLAT,
            _line("effective_rank"),
            _line("perplexity", log=True),
            _line("spectral_gap", log=True),
            _line("loss"),
        ),
    ),
    grouped=True,
)
RUNS = View(
    "runs",
    "Runs",
    "every run by itself, in the colour of its arm, and its way through the settings",
    "CHART",
    TREATED,
    COLUMNS,
    (
        _charts("runs", "Recovery (100 = healthy)", TALL, _line(RANK), _line(LOSS)),
        _charts(
            "runs",
            "From settings to recovery",
            TALL,
            lambda where: parallel(where, SETTINGS, (LOSS, RANK)),
            columns=1,
        ),
        _charts(
            "runs",
            "Learning rate and steps",
            TALL,
            lambda where: contour(where, ("heal.healing_lr", "heal.healing_steps"), RANK),
            columns=1,
        ),
    ),
)
SIZES = View(
    "sizes",
    "Across sizes",
    "recovery against the number of parameters",
    "CHART",
    TREATED,
    COLUMNS,
    (
        _charts(
            "sizes",
            "Recovery against size",
            TALL,
            lambda where: scatter(where, "n_params", RANK),
            lambda where: scatter(where, "n_params", LOSS),
        ),
        _charts(
            "sizes",
            "From size to recovery",
            TALL,
            lambda where: parallel(where, ("n_params",), (LOSS, RANK)),
            columns=1,
        ),
    ),
)
ATTACKS = View(
    "attacks",
    "Attacks",
    "how the attacks lower rank and raise perplexity, and their alignment beside its baselines",
    "CHART",
    ATTACK,
    (*WHO, ("tags", "spectral_state"), ("metrics", "effective_rank"), ("metrics", "perplexity")),
    (
        _charts(
            "attacks",
            "Collapse",
            TALL,
            _line("effective_rank"),
            _line("perplexity", log=True),
        ),
        _charts(
            "attacks",
            "Alignment and its baselines",
            FLAT,
            *(_line(name) for name in ALIGNMENTS),
        ),
    ),
    grouped=True,
    order="perplexity",
)
SPECTRA = View(
    "spectra",
    "Spectra",
    "singular values of every block by step, run beside run",
    "CHART",
    TREATED,
    COLUMNS,
    (
        _charts(
            "spectra",
            "Spectra by step (grey: healthy)",
            TALL,
            lambda where: pictures(where, SPECTRUM),
            columns=1,
        ),
    ),
)
TABLE = View(
    "table",
    "Table",
    "the verdict and recovery of every run",
    "TABLE",
    HEAL,
    COLUMNS,
    (),
)
VIEWS = (RECOVERY, RUNS, SIZES, ATTACKS, SPECTRA, TABLE)
"""The first is the one that a command's last line opens."""
