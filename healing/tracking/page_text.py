"""What a run's page says: tags that say something, and a description whose links open.

A description is written with ``runs:/RUN`` (a page), ``runs:/RUN/path.png`` (a file of a run) and
``runs:?FILTER`` (all runs of the experiment that match). The UI opens none of these. Its pages are
hash routes, and only a ``workflowType`` inside the hash leaves the mode that hides runs; files are
served by ``get-artifact``. All are written relative to the page, so that they hold for every
address of the server.

A page lists every tag in the order of their making, but those whose names begin with ``mlflow.``.
What commands look up in other runs and no reader asks for is stored under such a name, so that arm,
verdict and versions stand alone in the first screen. Everywhere else in this program tags have
their plain names; runs of before have them in the store too. (Read in a browser, MLflow 3.17.2.)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote

MAX_TAG = 8000
"""Characters; MLflow cuts longer tags anywhere."""
ORIGIN = re.compile(r"mlflow\.(user|source\..+|project\.entryPoint|git\..+)")
"""MLflow's own tags that say who ran what."""
MODE = "workflowType=machine_learning"
PARENT = "runs:/parent"
"""Stands for the page of the run above; a line with it is left out where there is none."""
HIDDEN = "mlflow.llm_healing."
"""Beginning of the stored names of :data:`UNSHOWN`."""
UNSHOWN = frozenset((
    "arm_label", "attack_seed", "checkpoint", "checkpoint_id", "healer", "healer_budget_tokens",
    "healer_selection", "healers_tried", "local_run_id", "model_source", "process",
    "reference_checkpoint_id", "replicate", "settings",
))  # fmt: skip
"""Tags for code, not for readers: what of them a reader may ask for is a parameter of the run, in
its description or in its ``config.json``."""
_TARGET = re.compile(r"(?P<image>!?)\[(?P<text>[^]\n]*)\]\(runs:(?P<target>[^)\n]+)\)")


def said(tags: Mapping[str, Any]) -> dict[str, str]:
    """Tags as text, without those that say nothing."""
    return {name: str(value) for name, value in tags.items() if str(value)}


def stored_name(name: str) -> str:
    """A tag's name in the store."""
    return HIDDEN + name if name in UNSHOWN else name


def plain_tags(stored: Mapping[str, str]) -> dict[str, str]:
    """Tags of the store under their plain names; one that has its plain name there already (of
    a run of before, or set by a person) counts.
    """
    hidden = {k.removeprefix(HIDDEN): v for k, v in stored.items() if k.startswith(HIDDEN)}
    shown = {k: v for k, v in stored.items() if not k.startswith(HIDDEN)}
    return {**hidden, **shown}


def has_tag(name: str, value: str) -> tuple[str, ...]:
    """Filters, the first for runs of today, of which any that matches finds a run by a tag."""
    return tuple(f"tags.`{n}` = '{value}'" for n in dict.fromkeys((stored_name(name), name)))


def origin(tags: Mapping[str, str]) -> dict[str, str]:
    """Of a run's tags those that its children share: who ran what."""
    return {name: value for name, value in tags.items() if ORIGIN.fullmatch(name)}


def whole_lines(text: str, elsewhere: str, spare: int = 0) -> str:
    """As many whole lines of a text as a tag holds, and where the rest is; ``spare`` characters are
    left free.
    """
    most = MAX_TAG - spare
    if len(text) <= most:
        return text
    more = f"\n\nThe rest is in {elsewhere}."
    return text[: most - len(more)].rpartition("\n")[0] + more


def run_page(experiment_id: str, run_id: str) -> str:
    """Address of a run's page."""
    return f"#/experiments/{experiment_id}/runs/{run_id}?{MODE}"


def runs_page(experiment_id: str, filter_string: str) -> str:
    """Address of the table of the runs that match."""
    found = quote(filter_string, safe="")
    return f"#/experiments/{experiment_id}/runs?searchFilter={found}&{MODE}"


def artifact(run_id: str, path: str) -> str:
    """Address of a file of a run."""
    return f"get-artifact?path={quote(path, safe='')}&run_uuid={run_id}"


def resolved(
    markdown: str, experiment_id: str, parent_id: str, experiment_of: Callable[[str], str]
) -> str:
    """A description with addresses that the UI opens.

    Args:
        markdown: With ``runs:`` addresses.
        experiment_id: Of the run that is described.
        parent_id: Of the run above it; empty = none.
        experiment_of: Experiment of another run.
    """
    kept = [line for line in markdown.split("\n") if parent_id or f"({PARENT})" not in line]

    def address(found: re.Match[str]) -> str:
        target = found["target"]
        if target.startswith("?"):
            place = runs_page(experiment_id, target[1:])
        else:
            run_id, _, path = target.removeprefix("/").partition("/")
            run_id = parent_id if run_id == "parent" else run_id
            place = artifact(run_id, path) if path else run_page(experiment_of(run_id), run_id)
        return f"{found['image']}[{found['text']}]({place})"

    return _TARGET.sub(address, "\n".join(kept))
