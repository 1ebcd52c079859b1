"""What a run's page says: links that the UI opens, tags that say something, who ran what."""

from __future__ import annotations

import platform
import re
from urllib.parse import parse_qs, urlsplit

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient

from healing.tracking import git_version, open_runs
from healing.tracking.journal import Journal
from healing.tracking.page_text import resolved
from healing.tracking.processes import Process
from healing.tracking.queries import get_run
from healing.tracking.run_files import read_jsonl

A, B = "a" * 32, "b" * 32


def links(markdown: str) -> dict[str, str]:
    """Text → address, as Markdown has them."""
    return dict(re.findall(r"\[([^]]*)\]\(([^)]*)\)", markdown))


def test_addresses_are_hash_routes_with_the_mode_inside_the_hash():
    text = f"[the attack](runs:/{A}) and [all](runs:?tags.arm = 'h&p' and params.x = '1')"
    found = links(resolved(text, "7", "", lambda _: "3"))
    for name, path in (("the attack", f"/experiments/3/runs/{A}"), ("all", "/experiments/7/runs")):
        address = urlsplit(found[name])
        assert (address.path, address.query) == ("", "")  # relative to wherever the UI is
        route = urlsplit(address.fragment)
        assert route.path == path
        assert parse_qs(route.query)["workflowType"] == ["machine_learning"]
    query = parse_qs(urlsplit(urlsplit(found["all"]).fragment).query)
    assert query["searchFilter"] == ["tags.arm = 'h&p' and params.x = '1'"]


def test_files_of_a_run_are_served_as_artifacts():
    found = links(resolved(f"![x](runs:/{A}/plots/a b.png)", "7", "", str))["x"]
    assert parse_qs(urlsplit(found).query) == {"path": ["plots/a b.png"], "run_uuid": [A]}
    assert urlsplit(found).path == "get-artifact"


def test_the_line_of_the_parent_is_there_only_with_a_parent():
    text = "first\nPart of [it](runs:/parent).\nlast"
    assert resolved(text, "7", "", str) == "first\nlast"
    assert f"#/experiments/7/runs/{B}?" in links(resolved(text, "7", B, lambda _: "7"))["it"]


def test_other_text_stays_as_it_is():
    text = "a [b](https://example.org/runs:/x) `runs:/y` (runs:/z)\n| c | d |"
    assert resolved(text, "7", "", str) == text


def test_a_description_in_the_store_names_the_experiment_of_other_runs(store):
    with open_runs.start("a", {}, experiment="elsewhere") as other:
        pass
    with open_runs.start("b", {}) as run:
        run.describe(f"[a](runs:/{other.run_id}) [gone](runs:/{A})")
    note = MlflowClient().get_run(run.run_id).data.tags["mlflow.note.content"]
    assert run.experiment_id != other.experiment_id
    assert f"/experiments/{other.experiment_id}/runs/{other.run_id}?" in links(note)["a"]
    assert f"/experiments/{run.experiment_id}/runs/{A}?" in links(note)["gone"]


def test_what_says_nothing_is_no_tag_and_no_parameter(store):
    with open_runs.start("a", {"stage": "heal", "noise_match": ""}) as run:
        run.tags({"draw": "", "zero": 0, "no": False})
        run.params("heal", {"tokenizer": "", "healing_steps": 0})
        with open_runs.child(run, "b", {"reference": "", "arm": "haep"}) as child:
            pass
    found = [MlflowClient().get_run(r.run_id).data for r in (run, child)]
    assert all("" not in (*data.tags.values(), *data.params.values()) for data in found)
    assert (found[0].tags["zero"], found[0].tags["no"]) == ("0", "False")
    assert found[0].params == {"heal.healing_steps": "0"}


def test_children_say_who_ran_them_as_their_parents_do(store):
    with (
        open_runs.start("a", {}) as run,
        open_runs.child(run, "b", {}) as child,
        open_runs.child(child, "c", {}) as below,
    ):
        pass
    told = [MlflowClient().get_run(r.run_id).data.tags for r in (run, child, below)]
    for name in ("mlflow.user", "mlflow.source.name", "mlflow.source.type"):
        assert told[0][name] == told[1][name] == told[2][name] != ""
    assert told[1].get("mlflow.source.git.commit") == told[0].get("mlflow.source.git.commit")
    assert "mlflow.parentRunId" not in told[0]


def test_a_child_of_a_project_names_the_project_not_the_script(store, monkeypatch):
    client = MlflowClient()
    experiment = mlflow.set_experiment("e").experiment_id
    given = {"mlflow.source.name": "https://example.org/x", "mlflow.source.git.commit": "c" * 40}
    outer = client.create_run(experiment, tags=given)
    monkeypatch.setenv("MLFLOW_RUN_ID", outer.info.run_id)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    with open_runs.start("a", {}) as run, open_runs.child(run, "b", {}) as child:
        pass
    tags = client.get_run(child.run_id).data.tags
    assert given.items() <= tags.items()


def test_versions_are_tags_of_every_run_but_of_what_ran_elsewhere(store):
    with open_runs.start("a", {}) as run:
        with open_runs.child(run, "b", {}) as child:
            pass
        with open_runs.child(run, "old", {}, start_ms=1, end_ms=2) as imported:
            pass
    for made in (run, child):
        tags = MlflowClient().get_run(made.run_id).data.tags
        assert (tags["python"], tags["torch"]) == (platform.python_version(), torch.__version__)
    assert "torch" not in MlflowClient().get_run(imported.run_id).data.tags


def test_tags_for_code_alone_have_names_that_no_page_shows(store):
    given = {"stage": "heal", "settings": "abc", "replicate": "0", "arm": "haep"}
    with open_runs.start("a", {"stage": "main"}) as run, open_runs.child(run, "b", given) as child:
        child.tags({"checkpoint_id": "1234", "verdict": "partial"})
    tags = MlflowClient().get_run(child.run_id).data.tags
    shown = [name for name in tags if not name.startswith("mlflow.")]
    # In the order in which a page lists them; versions of libraries between the two.
    assert (shown[:2], shown[-1]) == (["stage", "arm"], "verdict")
    assert not {"settings", "replicate", "checkpoint_id", "process", "local_run_id"} & set(shown)
    read = get_run(child.run_id).tags
    assert (read["settings"], read["replicate"], read["checkpoint_id"]) == ("abc", "0", "1234")
    assert Process.read(read["process"]).is_here
    assert get_run(read["local_run_id"]).run_id == child.run_id


def test_tags_of_before_are_read_under_their_names(store):
    client = MlflowClient()
    tags = {"settings": "old", "mlflow.llm_healing.settings": "new", "local_run_id": "c" * 32}
    made = client.create_run(client.create_experiment("e"), tags=tags).info.run_id
    assert get_run(made).tags["settings"] == "old"  # what a person sets counts
    assert get_run("c" * 32).run_id == made


@pytest.mark.parametrize(
    ("mlflows", "dirty", "expected"),
    [
        ("c" * 40, False, {}),
        ("c" * 40, True, {"git_dirty": "true"}),
        ("", False, {"git_commit": "c" * 40}),
        ("d" * 40, True, {"git_commit": "c" * 40, "git_dirty": "true"}),
    ],
)
def test_the_commit_is_a_tag_where_mlflow_names_another(monkeypatch, mlflows, dirty, expected):
    found = git_version.Checkout(commit="c" * 40, is_dirty=dirty)
    monkeypatch.setattr(git_version, "checkout", lambda: found)
    known = {"mlflow.source.git.commit": mlflows} if mlflows else {}
    assert git_version.code_version(known) == expected


@pytest.mark.parametrize(
    ("remote", "shown"),
    [
        ("https://github.com/o/r.git", "https://github.com/o/r.git"),
        ("https://me:secret@github.com/o/r.git", "https://github.com/o/r.git"),
        ("git@github.com:o/r.git", "git@github.com:o/r.git"),
        ("ssh://git@host/o/r.git", "ssh://git@host/o/r.git"),
        ("/home/me/r", ""),
        ("../r", ""),
        ("", ""),
    ],
)
def test_a_remote_is_shown_without_logins_and_folders(remote, shown):
    assert git_version.public_address(remote) == shown


def test_numbers_of_blocks_are_on_disk_and_no_charts(store):
    values = {"loss": 1.0, "layers/effective_rank_00": 2.0}
    with open_runs.start("a", {}) as run:
        Journal(store / "m.jsonl", run, kept_back=("layers/",)).record(0, values)
        Journal(store / "all.jsonl", run).record(1, {"layers/b": 1.0})
    assert MlflowClient().get_run(run.run_id).data.metrics.keys() == {"loss", "layers/b"}
    (row,) = read_jsonl(store / "m.jsonl")
    assert values.items() <= row.items()
