"""Figures that tests look at."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from healing.reporting.plots import style


@pytest.fixture
def kept(monkeypatch):
    """Figures for inspection, as they are made."""
    found = []

    def made(**settings):
        found.append(Figure(**settings))
        return found[-1]

    monkeypatch.setattr(style, "Figure", made)
    return found
