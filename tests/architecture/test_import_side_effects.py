"""Importing this project changes nothing in the process that imports it, and drawing neither."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow

# What libraries do when they are imported is theirs: they are imported first.
IMPORT_ALL = """
import importlib, json, os, pkgutil, sys, warnings
import jinja2, matplotlib, mlflow, mlflow.tracking, numpy, peft, torch, tqdm, transformers
import datasets, huggingface_hub, scipy.integrate, scipy.optimize, scipy.special, scipy.stats
import matplotlib.axes, matplotlib.figure, matplotlib.backends.backend_agg, matplotlib.ticker
import optuna.importance, torch.func
def state():
    return {
        "environment": dict(os.environ),
        "backend": matplotlib.get_backend(),
        "settings": {k: str(v) for k, v in matplotlib.rcParams.items()},
        "threads": torch.get_num_threads(),
        "filters": [str(f) for f in warnings.filters],
        "default type": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "random": torch.initial_seed(),
    }
torch.manual_seed(7)
before = state()
import healing
names = [found.name for found in pkgutil.walk_packages(healing.__path__, "healing.")]
for name in names:
    importlib.import_module(name)
imported = state()
import pathlib
from healing.reporting.plots.runs import loss_curve
loss_curve(pathlib.Path(sys.argv[1]) / "loss.png", "nano", [1e6, 2e6], [3.0, 2.0], [3.0, 2.5], 4.0)
print(json.dumps([len(names), before, imported, state()]))
"""


def test_importing_everything_and_drawing_leave_the_process_as_it_was(tmp_path):
    # A backend that no figure would choose, as a notebook's inline one is.
    environment = os.environ | {"MPLBACKEND": "svg"}
    command = [sys.executable, "-c", IMPORT_ALL, str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    number, before, imported, drawn = json.loads(done.stdout.splitlines()[-1])
    assert number > 90
    assert before["backend"] == "svg"
    assert imported == before
    assert drawn == before
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_figures_do_not_need_pyplot():
    """It would choose a backend for the whole process."""
    code = (
        "import sys, healing.reporting.plots.runs, healing.reporting.plots.groups, "
        "healing.reporting.plots.basin; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
