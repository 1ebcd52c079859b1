"""The experiment's page in MLflow's UI: its stored views, and the description that leads to them.

Nothing that a person wrote is replaced: what this program writes carries a digest of itself, and is
written anew only where that still holds.
"""

from __future__ import annotations

import hashlib
import re
import time

from mlflow.tracking import MlflowClient

from healing.errors import TrackingError
from healing.tracking.sending.store_errors import stored
from healing.tracking.ui import links
from healing.tracking.ui.views import VIEWS, View, may_replace

NOTE = "mlflow.note.content"
VIEW = "mlflow.sharedViewState."
_MARK = re.compile(r"\n*<!-- llm-healing ([0-9a-f]{16}) -->\s*$")
"""At the end of a description that this program wrote; a browser does not show it."""


def view_link(experiment_id: str, view: View = VIEWS[0]) -> str:
    """Address of a view, relative to the server."""
    return links.view_page(experiment_id, view.key, view.mode)


def description(experiment_id: str) -> str:
    """Markdown that says what the experiment is, how to read it, and where to look."""
    pages = [f"[{view.name}]({view_link(experiment_id, view)})" for view in VIEWS]
    text = (
        f"**Does a collapsed language model heal?** Look at: {' · '.join(pages)}, or "
        f"[all runs]({links.runs_page(experiment_id)}).\n\n"
        "An *attack* collapses a model, *heal* fine-tunes it on clean text; an *arm* is an attack "
        "or its control. `rank_recovery_pct` says how it ended: 0 is as collapsed, 100 as healthy."
    )
    return f"{text}\n\n<!-- llm-healing {_digest(text)} -->"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_ours(note: str) -> bool:
    """Whether a description is empty or was written by this program and not changed since."""
    mark = _MARK.search(note)
    return not note.strip() or bool(mark and mark[1] == _digest(note[: mark.start()]))


def publish(experiment_id: str) -> str:
    """Store the views and the description where they are missing or older; returns the address of
    the first view, relative to the server.

    Raises:
        TrackingError: The store does not take them.
    """
    client = MlflowClient()
    with stored(f"the views of experiment {experiment_id}"):
        tags = client.get_experiment(experiment_id).tags
        now = int(time.time() * 1000)
        wanted = {
            VIEW + view.key: view.encoded(now)
            for view in VIEWS
            if may_replace(tags.get(VIEW + view.key), view)
        }
        note, text = tags.get(NOTE, ""), description(experiment_id)
        if note != text and is_ours(note):
            wanted[NOTE] = text
        for key, value in wanted.items():
            client.set_experiment_tag(experiment_id, key, value)
    return view_link(experiment_id)


def page(experiment_id: str) -> str:
    """As :func:`publish`; of all runs where the store does not take the views, as from a user who
    may only read: they are worth no failure.
    """
    try:
        return publish(experiment_id)
    except TrackingError:
        return links.runs_page(experiment_id)
