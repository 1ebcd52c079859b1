"""Requests that are damaged, of another version, or made by somebody else: refused by themselves,
and everything around them arrives.
"""

from __future__ import annotations

import json
import math
import pathlib
import re
from typing import Any

import PIL.Image
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from entrypoints.sync import main as sync
from healing.tracking.sending import left_behind
from healing.tracking.sending.outbox import PLACE

RUN, MODEL = "a" * 32, "c" * 32
CREATE = {"experiment": {"name": "e"}, "name": "x", "tags": {"t": "1"}, "start": 1}
BATCH = {"what": "metrics", "metrics": [["m", 1.5, 1, 1]], "params": {"p": "1"}, "tags": {"t": "2"}}
END = {"status": "FINISHED", "time": 2}
FILE = {"path": "f.txt", "folder": None}
IMAGE = {"path": "p.png", "key": "k/l", "step": 1, "time": 1, "id": "i" * 8}
TABLE = {"name": "t", "columns": {"a": [1], "b": ["x"]}}
ABOUT = {"id": MODEL, "name": "n", "facts": {"f": "1"}, "tags": {"t": "1"}}
WHOLE = {
    "create": CREATE, "batch": BATCH, "end": END, "artifact": FILE, "image": IMAGE, "table": TABLE,
    "describe": {"markdown": "# text", "parent": ""}, "join": {},
    "input": {"name": "n", "digest": "d", "context": "c", "facts": {"f": "1"}},
    "model": {**ABOUT, "step": 0}, "model_file": {"id": MODEL, "name": "n", **FILE},
    "model_ready": {**ABOUT, "metrics": [["m", 1.5, 1, 1]], "register_as": ""},
}  # fmt: skip
NONSENSE = (
    None, 7, 10**30, math.nan, [], [1], {}, {"a": {"b": 1}}, "\ud800", "a\0b", "../../../out",
)  # fmt: skip
"""What an entry may hold that it should not; some of it is right for some."""
HUGE = [["m", 10**400, 1, 1]], [["m", 1.0, 1, 10**30]], [["m", "1", 1, 1]], [["m", 1.0]], {"m": 1}
SPECIAL = [
    ("batch", {**BATCH, "metrics": metrics}) for metrics in HUGE
] + [
    ("artifact", {"path": "f.txt", "folder": "/etc"}),
    ("artifact", {"path": "f.txt", "folder": "a/../../b"}),
    ("image", {**IMAGE, "path": "f.txt"}),
    ("image", {**IMAGE, "path": "half.png"}),
    ("table", {"name": "../t", "columns": {}}),
    ("table", {"name": "t", "columns": {"a": [1], "b": [1, 2]}}),
    ("create", {**CREATE, "experiment": {}}),
    ("end", {"status": "BOGUS", "time": 1}),
    ("of the next version", {"what": "ever"}),
]  # fmt: skip


def written(output: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    """An outbox of a process that is gone, with files beside it."""
    folder = output / PLACE / "1"
    folder.mkdir(parents=True)
    (folder / "requests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (output / "f.txt").write_text("text")
    picture = PIL.Image.effect_noise((64, 64), 9)
    picture.save(output / "p.png")
    (output / "half.png").write_bytes((output / "p.png").read_bytes()[:2000])
    return folder


def synced(output: pathlib.Path) -> tuple[int, str]:
    done = CliRunner().invoke(sync, [str(output)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stderr


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(left_behind, "PAUSES", ())


def test_what_this_version_writes_is_taken(store, tmp_path) -> None:
    kinds = [kind for kind in WHOLE if kind not in ("create", "end", "join")]
    between = [[RUN, kind, WHOLE[kind]] for kind in kinds]
    written(tmp_path / "out", [[RUN, "create", CREATE], *between, [RUN, "end", END]])
    code, said = synced(tmp_path / "out")
    assert code == 0, said
    assert not (tmp_path / "out" / PLACE).exists()


def odd() -> list[tuple[str, dict[str, Any]]]:
    found = list(SPECIAL)
    for kind, content in WHOLE.items():
        for name, value in content.items():
            found += [(kind, {**content, name: odd}) for odd in NONSENSE if odd != value]
            found.append((kind, {k: v for k, v in content.items() if k != name}))
    return found


@pytest.mark.slow
def test_an_odd_request_costs_nothing_around_it(store, tmp_path) -> None:
    """All of them in one outbox: none is taken for an outage, none is lost without a word."""
    model = [RUN, "model", WHOLE["model"]]
    for number, (kind, content) in enumerate(odd()):
        output = tmp_path / f"out{number}"
        before = [[RUN, "create", CREATE]] if kind != "create" else []
        before += [model] if kind.startswith("model_") else []
        own = RUN if kind != "create" else f"{number:032x}"
        after = [[RUN, "create", CREATE], [RUN, "batch", BATCH], [RUN, "end", END]]
        folder = written(output, [*before, [own, kind, content], *after])
        code, said = synced(output)
        refused = folder / "refused.jsonl"
        if code == 0:  # of a right value
            assert not folder.exists(), (kind, content)
            assert kind in WHOLE, kind
        else:
            assert code == 1, (kind, content, said)
            assert re.search(r"(cannot|could not) be stored|is not in ", said), said
            (why,) = refused.read_text().strip().splitlines()
            assert json.loads(why)["kind"] == kind
    assert not list(tmp_path.rglob("out[!0-9]*"))
    client = MlflowClient()
    experiment = client.get_experiment_by_name("e")
    runs = client.search_runs([experiment.experiment_id])
    whole = [run for run in runs if run.data.metrics.get("m") == 1.5]
    assert {run.info.status for run in whole} == {"FINISHED"}
