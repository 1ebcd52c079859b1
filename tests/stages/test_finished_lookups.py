"""What a sweep asks of its store where cells were run before: one question, however many."""

from __future__ import annotations

import dataclasses
import pathlib
from collections import Counter
from collections.abc import Iterator

import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.tracking import MlflowClient

from healing.stages.sweep import sweep
from healing.tracking.queries import RunView
from healing.tracking.sending.workers import finished_views
from healing.tracking.store import MlflowStore
from tests.conftest import ROOT

# A handful of seeds: what is said of the intervals is not looked at.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def asked(store: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """How often each method of the store is called from outside of it; cells compute nothing."""
    monkeypatch.syspath_prepend(ROOT)  # `benchmarks` is no installed package
    from benchmarks.trivial_cells import trivial_cells

    counts: Counter[str] = Counter()
    # Not log_batch: how many of them there are, the sender decides by the clock.
    for name in ("search_runs", "get_run", "create_run", "get_metric_history_bulk"):
        original = getattr(SqlAlchemyStore, name)

        def counted(self, *args, name=name, original=original, **kwargs):
            counts[name] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(SqlAlchemyStore, name, counted)
    with trivial_cells():
        yield counts


def questions(asked: Counter[str], folder: pathlib.Path, cells: int) -> dict[str, int]:
    """Of a sweep all of whose cells are finished."""
    from benchmarks.trivial_cells import settings

    sweep(settings(cells, folder / "output"))
    runs = asked["create_run"]
    asked.clear()
    sweep(settings(cells, folder / "output"))
    assert runs > asked["create_run"] == 2, "the sweep and its summary"
    return dict(asked)


def test_questions_do_not_grow_with_finished_cells(asked, store):
    few = questions(asked, store, 4)
    many = questions(asked, store, 16)
    assert many == few
    assert many["search_runs"] <= 4
    client = MlflowClient()
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name != "Default"]
    heals = client.search_runs([experiment], "tags.stage = 'heal'")
    assert len(heals) == 16, "the four first are among them"
    last = client.search_runs([experiment], "tags.stage = 'main'", max_results=1)[0].data.tags
    assert (last["heal_runs"], last["reused_runs"]) == ("16", "16")


def test_what_another_finished_meanwhile_is_found_though_it_was_not_ahead(asked, store):
    own, other = MlflowStore(), MlflowStore()
    with own.start("sweep", {"stage": "main"}) as run:
        own.look_ahead(run.experiment_id, (), lambda view: True)
        with other.child(run, "heal", {"stage": "heal", "fingerprint": "f"}) as child:
            pass
        found = own.find_finished(run.experiment_id, "f")
        assert found is not None
        assert found.run_id == child.run_id


def test_only_runs_that_are_wanted_are_kept(asked, store):
    from benchmarks.trivial_cells import settings
    from healing.stages.launching.chain import chains_of, is_of, shared_out

    sweep(settings(8, store / "output"))
    (experiment,) = [
        e.experiment_id for e in MlflowClient().search_experiments() if e.name != "Default"
    ]
    chains = chains_of(settings(4, store / "output"), {})
    kept = finished_views(experiment, {"nano"}, is_of(chains))
    assert {view.params["seed"] for view in kept.values()} == {"0"}
    assert len(kept) == 4 + 3, "the sham has no attack"
    every = finished_views(experiment)
    assert len(every) == 2 * len(kept)
    # A landscape has no seed of its own, but its healing's.
    for seed in "01":
        (healed, *_) = (v for v in every.values() if v.params.get("seed") == seed and is_heal(v))
        tags = {"model": "nano", "fingerprint": f"landscape {seed}", "heal_run_id": healed.run_id}
        every[tags["fingerprint"]] = dataclasses.replace(
            healed, run_id=f"basin{seed}", params={}, tags=tags
        )
    both = chains_of(settings(8, store / "output"), {})
    first, second = shared_out(both, every)
    assert set(first) | set(second) == set(every)
    assert {view.params.get("seed") for view in first.values()} == {"0", None}
    assert {view.params.get("seed") for view in second.values()} == {"1", None}
    assert ("landscape 0" in first, "landscape 1" in second) == (True, True)
    assert shared_out(chains, every) == [first]


def is_heal(view: RunView) -> bool:
    return view.tags["stage"] == "heal"
