"""``--system-metrics``: MLflow's monitors, our way of sending."""

from __future__ import annotations

import builtins
import threading
import time

import psutil
import pytest
from mlflow.tracking import MlflowClient

from healing.config.attack import AttackConfig
from healing.errors import TrackingError
from healing.stages.attack import attack
from healing.tracking import open_runs

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "measurement_interval": 2, "verbosity": "quiet", "arm": "random_tokens",
         "attack_steps": 2}  # fmt: skip


def system_names(run_id: str) -> set[str]:
    found = MlflowClient().get_run(run_id).data.metrics
    return {name for name in found if name.startswith("system/")}


def threads() -> list[str]:
    return [t.name for t in threading.enumerate() if "metrics" in t.name.lower()]


def test_the_load_is_sampled_while_the_run_lasts(store, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    with open_runs.start("r", {"stage": "s"}) as run:
        run.system_metrics()
        run.system_metrics()
        assert len(threads()) == 1, "one, however often it is asked for"
        time.sleep(1.5)
    assert threads() == []
    client = MlflowClient()
    points = client.get_metric_history(run.run_id, "system/system_memory_usage_percentage")
    assert 4 <= len(points) <= 9
    assert [p.step for p in points] == list(range(len(points)))
    end = client.get_run(run.run_id).info.end_time
    assert all(p.timestamp <= end for p in points)
    assert abs(points[-1].value - psutil.virtual_memory().percent) < 25
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= system_names(
        run.run_id
    )


def test_a_run_shorter_than_the_interval_has_one_sample_and_ends_at_once(store) -> None:
    began = time.monotonic()
    with open_runs.start("r", {"stage": "s"}) as run:
        run.system_metrics()
    assert time.monotonic() - began < 8.0
    points = MlflowClient().get_metric_history(run.run_id, "system/cpu_utilization_percentage")
    assert [p.step for p in points] == [0]


def test_a_run_that_fails_ends_them_too(store) -> None:
    def fail() -> None:
        with open_runs.start("r", {"stage": "s"}) as run:
            run.system_metrics()
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        fail()
    assert threads() == []


def test_an_attack_has_them_where_they_are_asked_for(store) -> None:
    plain, _ = attack(AttackConfig(**SMALL))
    loaded, _ = attack(AttackConfig(**SMALL, system_metrics=True))
    assert system_names(plain) == set()
    assert len(system_names(loaded)) >= 5
    first, second = (MlflowClient().get_run(run).data.tags for run in (plain, loaded))
    assert first["fingerprint"] == second["fingerprint"]


def test_without_psutil_one_line_says_so_before_any_work(store, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *args, **more):
        if name == "mlflow.system_metrics.system_metrics_monitor":
            raise ImportError("No module named 'psutil'")
        return real(name, *args, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(TrackingError, match="--system-metrics needs psutil") as caught:
        attack(AttackConfig(**SMALL, system_metrics=True))
    assert "\n" not in str(caught.value)
    assert not (store / "experiments/results/priority5_healing").exists()
