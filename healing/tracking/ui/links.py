"""Addresses of pages in MLflow's UI.

The UI is a program in the browser: what it shows stands behind the ``#``. It opens in its mode for
generative models, which shows no run, unless ``workflowType=machine_learning`` is among the
parameters *behind* the ``#``; before it the parameter does nothing (3.17.2).
"""

from __future__ import annotations

import urllib.parse

import mlflow

ADDRESS = "http://127.0.0.1:5000"
"""Where a store on this machine is served, if port 5000 is free."""
MODE = {"workflowType": "machine_learning"}


def page(path: str, **query: str) -> str:
    """Address of a page, relative to the server: it holds wherever that is.

    Args:
        path: As ``/experiments/1/runs``.
        query: Further parameters.
    """
    return f"#{path}?{urllib.parse.urlencode({**query, **MODE})}"


def runs_page(experiment_id: str) -> str:
    """All runs of an experiment."""
    return page(f"/experiments/{experiment_id}/runs")


def run_page(experiment_id: str, run_id: str) -> str:
    """One run."""
    return page(f"/experiments/{experiment_id}/runs/{run_id}")


def view_page(experiment_id: str, key: str, mode: str) -> str:
    """A stored view; ``mode`` is ``CHART`` or ``TABLE``."""
    path = f"/experiments/{experiment_id}/runs"
    return page(path, viewStateShareKey=key, compareRunsMode=mode)


def is_served() -> bool:
    """Whether the tracking store is a server, which shows the UI by itself."""
    return mlflow.get_tracking_uri().startswith(("http://", "https://"))


def absolute(relative: str) -> str:
    """The whole address of a page, on the tracking server or else on this machine.

    A user and password in the tracking URI are left out.
    """
    if not is_served():
        return f"{ADDRESS}/{relative} (served by: llm-healing ui)"
    parts = urllib.parse.urlsplit(mlflow.get_tracking_uri())
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="")
    return f"{bare.geturl().rstrip('/')}/{relative}"
