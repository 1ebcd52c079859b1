"""A run that was cut at any step and goes on leaves what an uninterrupted one leaves, bit for bit.

The cut is made where the state is kept: the process is told to stop there, or dies.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import mlflow
import pytest
import torch
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from entrypoints.attack import main as attack_command
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.pretrain import PretrainConfig
from healing.progress import Stop, Stopped
from healing.stages.attack import attack
from healing.stages.cells.state_classes import STATE_CLASSES
from healing.stages.driver import Driver
from healing.stages.heal import heal
from healing.stages.pretrain import pretrain
from healing.stages.terminal.console import Console, Silence
from healing.tracking import output_folder
from healing.tracking.page_text import plain_tags
from healing.tracking.run_files import read_json, read_jsonl
from healing.tracking.snapshots import FileSnapshots, Kept

pytestmark = pytest.mark.slow

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "measurement_interval": 2, "verbosity": "quiet", "checkpoint_interval": 1}  # fmt: skip
ATTACK = {**SMALL, "attack_steps": 5, "search_steps": 1, "search_candidates": 2,
          "baseline_draws": 3, "rayleigh_draws": 1, "curvature_tokens": 128}  # fmt: skip
HEAL = {**SMALL, "healing_steps": 5, "healing_lr": 3e-3, "save_healed": True}
UNLIKE = {
    "seconds", "tokens_per_second", "run_id", "heal_run_id", "attack_run_id", "output_dir",
    "checkpoint", "collapsed_checkpoint", "reference_checkpoint", "direction_checkpoint",
    "resumed_from", "digests",
}  # fmt: skip
"""What says when and where, or which run it was."""


class Died(BaseException):
    """As a hard kill: nothing is told to anybody."""


class CutAt(FileSnapshots):
    """Snapshots of a process that ends when it has kept the state of a step."""

    def __init__(self, step: int, stop: Stop, *, dies: bool) -> None:
        super().__init__(STATE_CLASSES)
        self.step, self.stop, self.dies, self.saved = step, stop, dies, []

    def save(self, folder: pathlib.Path, kept: Kept) -> None:
        super().save(folder, kept)
        self.saved.append(kept.step)
        if kept.step == self.step:
            if self.dies:
                raise Died
            self.stop.set()


def driver(step: int = -1, *, dies: bool = False) -> tuple[Driver, CutAt]:
    stop = Stop()
    snapshots = CutAt(step, stop, dies=dies)
    return Driver(Console("quiet"), stop=stop, snapshots=snapshots), snapshots


def without(value: Any, names: set[str] = UNLIKE) -> Any:
    """A document without what differs from run to run."""
    if isinstance(value, dict):
        return {k: without(v) for k, v in value.items() if k not in names}
    if isinstance(value, list):
        return [without(v) for v in value]
    return value


def content(path: pathlib.Path) -> Any:
    if path.suffix == ".jsonl":
        return without(read_jsonl(path))
    if path.suffix == ".json":
        return without(read_json(path))
    if path.suffix in (".pt", ".pth"):
        stored = without(torch.load(path, weights_only=True))
        weights = stored.pop("model_state_dict")
        return stored, {name: t.numpy().tobytes() for name, t in weights.items()}
    return path.read_bytes()


def files(root: pathlib.Path, stage: str) -> dict[str, Any]:
    """Path → content of every file of the folders of a stage's runs."""
    return {
        path.relative_to(root).as_posix(): content(path)
        for path in sorted(root.rglob("*"))
        if path.is_file() and stage in path.relative_to(root).as_posix()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }  # fmt: skip


@contextlib.contextmanager
def a_store(path: pathlib.Path) -> Iterator[None]:
    """A copy of the test's store, for the block."""
    shutil.copy(path.parent / "mlflow.db", path)
    before = mlflow.get_tracking_uri()
    os.environ.pop("MLFLOW_EXPERIMENT_ID", None)
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)  # MLflow's memory of where it was


def histories() -> list[dict[str, Any]]:
    """Of the finished runs of cells, oldest first: metric → [(step, value)]."""
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(
        experiments, "attributes.status = 'FINISHED'", order_by=["attributes.start_time ASC"]
    )
    return [
        {
            name: [(m.step, repr(m.value)) for m in client.get_metric_history(r.info.run_id, name)]
            for name in r.data.metrics
            if not name.startswith(("seconds", "tokens_per_second"))
        }
        for r in runs
        if "fingerprint" in r.data.tags
    ]


def attacked(root: pathlib.Path, arm: str, driven: Driver, **changes: Any) -> None:
    attack(AttackConfig(**({**ATTACK, "arm": arm, "output_dir": str(root)} | changes)), driven)


def same_after_a_cut(run: Any, root: pathlib.Path, stage: str, steps: Sequence[int]) -> None:
    """Cut a run at each of the steps, go on, and compare with the uninterrupted one; at even steps
    the process dies, at odd ones it is told to stop.
    """
    with a_store(root / "whole.db"):
        run(root / "whole", driver()[0])
        whole, whole_history = files(root / "whole", stage), histories()
    assert whole
    for step in steps:
        dies, place = step % 2 == 0, root / f"cut{step}"
        with a_store(root / f"cut{step}.db"):
            with pytest.raises(Died if dies else Stopped):
                run(place, driver(step, dies=dies)[0])
            going_on, snapshots = driver()
            run(place, going_on)
            assert snapshots.saved[:1] == [step + 1] or step == 5, "it began anew"
            found = files(place, stage)
            assert found.keys() == whole.keys(), step
            assert [n for n in whole if whole[n] != found[n]] == [], step
            assert histories() == whole_history, step
        assert not list(place.rglob(".*.state")), "the states of a finished run are gone"


@pytest.mark.parametrize("arm", ["haep", "random_tokens"])
def test_an_attack_cut_at_any_step(store, arm):
    same_after_a_cut(lambda root, d: attacked(root, arm, d), store, "_attack_", range(1, 6))


@pytest.mark.parametrize(
    "changes", [{"attack_optimizer": "sgd"}, {"warmup_steps": 2}], ids=["sgd", "warm-up"]
)
def test_an_attack_with_another_optimiser_or_a_warm_up(store, changes):
    same_after_a_cut(lambda root, d: attacked(root, "haep", d, **changes), store, "_attack_", [3])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"healing_optimizer": "sgd", "healing_momentum": 0.9},
        {"healing_decay": "cosine", "healing_warmup": 0.4, "gradient_clip": 1.0},
        {"healing_method": "lora"},
        {"precision": "bf16"},
        {"precision": "bf16", "precision_mode": "pure"},
        {"sham": True},
        {"measurements": "weight_distance"},
    ],
    ids=["default", "sgd", "schedule", "lora", "bf16", "pure", "sham", "measurement"],
)
def test_a_healing_cut_at_any_step(store, changes):
    attacked(store / "attack", "random_tokens", driver()[0])
    (checkpoint,) = (store / "attack").rglob("checkpoint_post_treatment.pt")

    def run(root: pathlib.Path, d: Driver) -> None:
        given = {**HEAL, "collapsed_checkpoint": str(checkpoint), "output_dir": str(root)}
        heal(HealConfig(**(given | changes)), d)

    same_after_a_cut(run, store, "_run", [2, 5] if changes else range(1, 6))


def test_a_training_cut_early_and_late(store):
    def run(root: pathlib.Path, d: Driver) -> None:
        pretrain(
            PretrainConfig(
                model="nano", tokens_per_parameter=0.009, batch_size=2, sequence_length=256,
                measurement_interval=2, output_dir=str(root), checkpoint_interval=1,
                verbosity="quiet", max_documents=300,
            ),
            d,
        )  # fmt: skip

    same_after_a_cut(run, store, "", [1, 4])


class CutAtSave(FileSnapshots):
    """Snapshots of a process that is told to stop, or dies, when it keeps its n-th state."""

    def __init__(self, last: int, stop: Stop, *, dies: bool) -> None:
        super().__init__(STATE_CLASSES)
        self.left, self.stop, self.dies = last, stop, dies

    def save(self, folder: pathlib.Path, kept: Kept) -> None:
        super().save(folder, kept)
        self.left -= 1
        if self.left == 0:
            if self.dies:
                raise Died
            self.stop.set()


def children() -> list[tuple[str, str, str]]:
    """Replicate, status and parent of every healing run below a parent, oldest first."""
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(
        experiments, "tags.stage = 'heal'", order_by=["attributes.start_time ASC"]
    )
    return [
        (plain_tags(r.data.tags)["replicate"], r.info.status, r.data.tags["mlflow.parentRunId"])
        for r in runs
        if "replicate" in plain_tags(r.data.tags)
    ]


@pytest.mark.parametrize("dies", [False, True])
def test_several_healings_go_on_by_the_same_command(store, dies):
    """Three replicates of two steps, cut in the second, then in the third; each is made once, and
    the same command makes all three anew once a parent went through.
    """
    attacked(store / "attack", "random_tokens", driver()[0])
    (checkpoint,) = (store / "attack").rglob("checkpoint_post_treatment.pt")

    def run(last: int = 0, **changes: Any) -> list[int]:
        stop = Stop()
        given = {**HEAL, "healing_steps": 2, "num_runs": 3, "collapsed_checkpoint": str(checkpoint)}
        d = Driver(Console("quiet"), stop=stop, snapshots=CutAtSave(last, stop, dies=dies))
        made = heal(HealConfig(**(given | changes)), d)
        return [outcome.cell.replicate for outcome in made]

    for last in (3, 2):
        with pytest.raises(Died if dies else Stopped):
            run(last)
    finished = [r for r, status, _ in children() if status == "FINISHED"]
    assert finished == ["0", "1"]
    if not dies:
        client = MlflowClient()
        (experiment,) = client.search_experiments(filter_string="name = 'llm-healing'")
        parents = client.search_runs([experiment.experiment_id], "tags.role = 'parent'")
        assert [p.data.tags["stopped_by"] for p in parents] == ["request", "request"]
    assert run() == [2], "the third alone, after two cuts"
    runs = children()
    assert [r for r, status, _ in runs if status == "FINISHED"] == ["0", "1", "2"]
    assert len({parent for r, _, parent in runs if r == "1"}) == 2, "cut in one, made in another"
    assert run(num_runs=2) == [0, 1], "another command"
    with pytest.raises(Died if dies else Stopped):
        run(1)
    assert run() == [0, 1, 2], "nothing of the one that went through before"


def stopped_while_loading() -> Driver:
    """Told to stop once its settings are stored, before anything else is known of its run."""
    stop = Stop()
    d = Driver(Console("quiet"), stop=stop, snapshots=FileSnapshots(STATE_CLASSES))

    class Watching(Silence):
        def phase(self, name: str, done: int, total: int | None, note: str = "") -> None:
            if name == "loading model":
                stop.set()

    d.console.progress = lambda title: Watching()  # type: ignore[method-assign]
    return d


@pytest.mark.parametrize("named", ["reference and direction", "start"])
def test_an_attack_whose_checkpoints_were_fetched_goes_on_by_its_run(store, named):
    """What a run fetches goes with its process: as if it had ended, the downloads are removed."""
    attacked(store / "first", "random_tokens", driver()[0])
    (reference,) = (store / "first").rglob("checkpoint_post_treatment.pt")
    of = torch.load(reference, weights_only=True)["config"]["attack_run_id"]
    given: dict[str, Any] = {
        "arm": "ray",
        "match": "loss",
        "reference_run_id": of,
        "direction_run_id": of,
    }
    if named == "start":
        collapsed = {"collapsed_checkpoint": str(reference), "output_dir": str(store / "healed")}
        heal(HealConfig(**{**HEAL, **collapsed, "healing_steps": 2}), driver()[0])
        (healed,) = (store / "healed").rglob("checkpoint_post_healing.pt")
        of = torch.load(healed, weights_only=True)["config"]["heal_run_id"]
        given = {"start_checkpoint": f"runs:/{of}/checkpoints/{healed.name}"}
    config = AttackConfig(**SMALL, **given, output_dir=str(store / "second"))
    with pytest.raises(Stopped):
        attack(config, stopped_while_loading())
    client = MlflowClient()
    experiments = [e.experiment_id for e in client.search_experiments()]
    (cut,) = client.search_runs(experiments, "attributes.status = 'KILLED'")
    output_folder._temporary().cleanup()
    output_folder._temporary.cache_clear()
    options = ["--resume-run-id", cut.info.run_id, "--verbosity", "quiet"]
    done = CliRunner().invoke(attack_command, options)
    assert done.exit_code == 0, done.output
    tag = "start_run_id" if named == "start" else "reference_run_id"
    last = client.search_runs(experiments, "", order_by=["attributes.start_time DESC"])[0]
    assert (last.info.status, last.data.tags[tag]) == ("FINISHED", of)
    assert list((store / "second").rglob("checkpoint_post_treatment.pt"))
