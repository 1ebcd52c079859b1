"""A folder per module: hypothesis calls one test many times, and a fixture per test would mix."""

from __future__ import annotations

import pathlib

import pytest


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("hostile")
