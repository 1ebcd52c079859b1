"""Stored healing runs as the statistics see them, read with as few requests as there can be.

A thousand runs are read by one bulk history per metric and hundred runs. A run without it (an older
store, or points that were lost) is read from its own ``metrics.jsonl``, one download each.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

from healing.config.arm_tags import arm_label, arm_role
from healing.errors import TrackingError
from healing.measurements.diagnosis import NONFINITE_STEPS, OK, UNTRAINED
from healing.measurements.recovery import PANEL, panel_metric
from healing.statistics.heal_runs import ENDPOINTS, SHAM_ENDPOINTS, HealRun
from healing.tracking import metric_history
from healing.tracking.metric_history import Trajectory, trajectories
from healing.tracking.queries import RunView
from healing.tracking.run_files import read_jsonl
from healing.tracking.sending.heartbeat import HEARTBEAT
from healing.tracking.store import MlflowStore, Store

STEP_METRIC = "nonfinite_tokens"
"""Logged at every measured step, whatever else is NaN there."""
PPL = "ppl_improvement_pct"
STATUSES = (OK, NONFINITE_STEPS, *UNTRAINED)
SPECTRAL_STATES = ("collapsed", "inflated", "unchanged", "undefined")
LARGEST_RECOVERY = 1e12
"""Percent: a loss of 10⁸ nats where the attack took 0.01. What is larger was never measured."""
OVERFLOWING = 1e50
"""Numbers whose squares' squares are no floats any more."""
MAX_STEP, MAX_NAME, DIGITS = 10**12, 1000, 15
RUNNING = ("RUNNING", "SCHEDULED")
"""Statuses of runs that MLflow does not know to have ended; a run that was killed hard keeps it."""


def _step(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value // 1:
        raise ValueError(f"step {str(value)[:40]} is not a whole number")
    return int(value)


def from_artifact(view: RunView, store: Store) -> Trajectory:
    """Trajectory of one run from its ``metrics.jsonl``.

    Raises:
        TrackingError: The artifact is missing, or not what a healing run leaves.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:  # MLflow's own would stay behind
            path = store.download(f"runs:/{view.run_id}/metrics.jsonl", folder)
            rows = read_jsonl(path)
        steps = tuple(_step(row["step"]) for row in rows)
        values = {e: tuple(float(row.get(e, math.nan)) for row in rows) for e in ENDPOINTS}
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        reason = f"{type(error).__name__}: {error}"[:300]
        raise TrackingError(f"metrics.jsonl of {view.name} is malformed: {reason}") from error
    if not steps or steps[0] != 0:
        raise TrackingError(f"metrics.jsonl of {view.name} does not begin with step 0")
    return Trajectory(steps, values)


def from_history(views: Sequence[RunView]) -> dict[str, Trajectory]:
    """Trajectories by run id, in bulk, of the runs whose logged history is whole.

    Raises:
        TrackingError: The store has no bulk history.
    """
    ids = [view.run_id for view in views]
    found = trajectories(
        metric_history.metric_page, ids, ENDPOINTS, (STEP_METRIC,), metric_history.page_size()
    )
    last = {view.run_id: view.metrics.get("summary/steps") for view in views}
    return {i: t for i, t in found.items() if t.steps[0] == 0 and last[i] in (None, t.steps[-1])}


def _heal_run(view: RunView, trajectory: Trajectory) -> HealRun:
    tags, values = view.tags, dict(trajectory.values)
    if "sham_run_id" not in tags:
        values = {e: v for e, v in values.items() if e not in SHAM_ENDPOINTS}
    if tags["status"] in UNTRAINED:
        values = {e: (math.nan,) * len(v) for e, v in values.items()}
    return HealRun(
        run_id=view.run_id,
        name=view.name,
        finished=True,
        model=tags["model"],
        arm=tags["arm"],
        role=arm_role(tags["arm"], tags.get("arm_role", "")),
        label=arm_label(tags["arm"], tags.get("arm_label", "")),
        settings=tags["settings"],
        checkpoint=tags["checkpoint_id"],
        seed=tags["attack_seed"],
        n_params=_count(view.params["n_params"], "n_params"),
        final={e: _final(e, v[-1]) for e, v in values.items()},
        steps=trajectory.steps,
        trajectory=values,
        status=tags["status"],
        spectral_state=tags["spectral_state"],
        undefined_reason=tags.get("rank_undefined_reason", ""),
        noise_match=tags.get("noise_match", ""),
        reference=tags.get("reference_checkpoint_id", ""),
        fingerprint=tags.get("fingerprint", ""),
        tokens_per_step=tokens_per_step(view),
        healer=healer(view),
        healers_tried=_count(tags.get("healers_tried", "0"), "healers_tried"),
        panel=panel(view),
        rank_recovery_error=_number(view, "rank_recovery_error"),
        rank_reduction_pct=_number(view, "rank_reduction_pct"),
        start_loss=_number(view, "collapsed_loss"),
        final_loss=math.nan if tags["status"] in UNTRAINED else _number(view, "final_loss"),
        weight_change=_number(view, "weight_change"),
    )


def _number(view: RunView, name: str) -> float:
    """Entry of a run's summary; NaN where it was stored without it, or is beyond all measure."""
    value = view.metrics.get(f"summary/{name}", math.nan)
    return value if abs(value) <= OVERFLOWING else math.nan


def _count(text: str, name: str) -> int:
    """A whole number as a store keeps it."""
    if not (text.isascii() and text.isdecimal() and len(text) <= DIGITS):
        raise ValueError(f"{name} is {text[:40]!r}, not a whole number of at most {DIGITS} digits")
    return int(text)


def _final(endpoint: str, value: float) -> float:
    """Perplexity is exponential in the loss: what overflows there says nothing against a run."""
    return math.nan if endpoint == PPL and abs(value) > OVERFLOWING else value


def objection(run: HealRun) -> str:
    """Why a finished run cannot be what a healing run leaves; empty where it can."""
    if run.n_params < 1:
        return "n_params is 0"
    if run.status not in STATUSES or run.spectral_state not in SPECTRAL_STATES:
        return f"unknown status {run.status!r} or spectral state {run.spectral_state!r}"
    if any(late <= early for early, late in itertools.pairwise(run.steps)):
        return "its steps do not ascend"
    if run.steps[0] != 0 or run.steps[-1] > MAX_STEP:
        return f"its steps are not within 0 and {MAX_STEP:g}"
    for endpoint, values in {**run.trajectory, **{k: (v,) for k, v in run.panel.items()}}.items():
        if endpoint != PPL and any(abs(v) > LARGEST_RECOVERY for v in values):
            return f"{endpoint} is infinite or beyond {LARGEST_RECOVERY:g}"
    for name in ("model", "arm", "settings", "checkpoint", "seed"):
        if len(getattr(run, name)) > MAX_NAME:
            return f"its {name} has more than {MAX_NAME} characters"
    return ""


def panel(view: RunView) -> dict[str, float]:
    """Final recovery by the other measures; empty for a run that was stored without them."""
    if view.tags["status"] in UNTRAINED:
        return {}
    logged = {name: view.metrics.get(panel_metric(name), math.nan) for name in PANEL}
    return {name: value for name, value in logged.items() if math.isfinite(value)}


def healer(view: RunView) -> str:
    """Optimiser and rate (4 digits) for people; empty where a run does not say."""
    names = {"adamw": "AdamW", "sgd": "SGD"}
    optimizer = view.params.get("heal.healing_optimizer", "")
    rate = view.params.get("heal.healing_lr", "")
    method = view.params.get("heal.healing_method", "full")
    if not (optimizer and rate):
        return ""
    with contextlib.suppress(ValueError):  # what is no number stays as it is
        rate = f"{float(rate):.4g}"
    adapters = "" if method == "full" else f", {method}"
    return f"{names.get(optimizer, optimizer)} at {rate}{adapters}"


def tokens_per_step(view: RunView) -> int:
    """Training tokens of one step: batch size times sequence length, else by the metric ``tokens``
    over the steps; 0 where a run tells neither.
    """
    sizes = [view.params.get(f"heal.{name}", "") for name in ("batch_size", "sequence_length")]
    if all(size.isascii() and size.isdecimal() and len(size) <= DIGITS for size in sizes):
        return int(sizes[0]) * int(sizes[1])
    tokens, steps = (view.metrics.get(name, math.nan) for name in ("tokens", "summary/steps"))
    share = tokens / steps if steps > 0 else math.nan
    return int(share) if math.isfinite(share) and share == int(share) else 0


def _failed(view: RunView, why: str) -> HealRun:
    return HealRun(view.run_id, view.name, finished=False, failure=why)


def _read(view: RunView, known: dict[str, Trajectory], store: Store) -> HealRun:
    if view.status in RUNNING:
        beat = view.tags.get(HEARTBEAT, "")[:40].replace("T", " ").removesuffix("+00:00")
        heard = f"last heard of at {beat} UTC" if beat else ""
        return HealRun(view.run_id, view.name, finished=False, running=True, heard=heard)
    if view.status != "FINISHED":
        return _failed(view, view.tags.get("failure", f"status {view.status}"))
    try:
        run = _heal_run(view, known.get(view.run_id) or from_artifact(view, store))
    except TrackingError as error:
        return _failed(view, str(error))
    except KeyError as error:
        return _failed(view, f"it lacks the tag or parameter {error}: not a run of this version")
    except (ValueError, TypeError, ArithmeticError) as error:
        return _failed(view, f"it is not what a healing run leaves: {error}")
    why = objection(run)
    return _failed(view, f"it is not what a healing run leaves: {why}") if why else run


def read_runs(
    views: Sequence[RunView],
    note: Callable[[str], None] = lambda _: None,
    store: Store | None = None,
) -> list[HealRun]:
    """Stored runs as the statistics see them, in the order given.

    Args:
        views: Healing runs; those that failed keep their reason, those that run are told apart.
        note: Told when runs have to be read one by one.
        store: Where they are; ``None`` = MLflow's.
    """
    store = store or MlflowStore()
    finished = [view for view in views if view.status == "FINISHED"]
    why = "their logged history is not whole"
    known: dict[str, Trajectory] = {}
    if finished and store.has_history:
        try:
            known = from_history(finished)
        except TrackingError as error:
            why = str(error)
    lacking = sum(view.run_id not in known for view in finished)
    if lacking and store.has_history:
        note(f"{lacking} of {len(finished)} runs are read one by one from metrics.jsonl: {why}")
    return [_read(view, known, store) for view in views]
