"""The load of the machine as metrics of a run, sampled by MLflow's own monitors.

MLflow's thread would ask the store for the run's status at every sample, and hang with a store that
hangs; here the samples go the way of everything that a run is told.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mlflow.entities import Metric

from healing.errors import HealingError, TrackingError

JOIN_SECONDS = 5.0
"""That the end of a run waits for a sample that is being taken."""


class SystemMetrics:
    """Samples the machine from a thread of its own, every ten seconds or as MLflow's environment
    variables say, and once more at the end.

    Args:
        run_id: Of the run.
        send: Takes the points of one sample; waits for nothing.

    Raises:
        TrackingError: psutil is missing.
    """

    def __init__(self, run_id: str, send: Callable[[list[Metric]], None]) -> None:
        try:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self._monitor = SystemMetricsMonitor(run_id)
        except ImportError as error:
            raise TrackingError(
                f"--system-metrics needs psutil, which cannot be imported ({error}): pip install "
                "psutil, or leave it out"
            ) from error
        # Its logger would send by itself.
        self._monitor.mlflow_logger = _Logger(send)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="system metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """The last sample."""
        self._ended.set()
        if self._thread is not threading.current_thread():
            self._thread.join(JOIN_SECONDS)

    def _sample(self) -> None:
        monitor: Any = self._monitor
        samples = max(1, int(monitor.samples_before_logging))
        try:
            monitor.collect_metrics()
            while True:
                for _ in range(samples):
                    if self._ended.wait(monitor.sampling_interval):
                        break
                    monitor.collect_metrics()
                monitor.publish_metrics(monitor.aggregate_metrics())
                if self._ended.is_set():
                    return
                monitor.collect_metrics()
        except (HealingError, OSError, RuntimeError):
            return  # the machine's load is worth no failure


class _Logger:
    """Stands where MLflow's monitor has its own logger."""

    def __init__(self, send: Callable[[list[Metric]], None]) -> None:
        self._send = send

    def record_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        moment = int(time.time() * 1000)
        points = [Metric(name, float(value), moment, step) for name, value in metrics.items()]
        if points:
            self._send(points)
