"""The recorded results of the predecessor (NeuroEntropy), read as they are.

A recorded run is a folder with ``config.json`` and ``metrics.jsonl`` (attack runs) and, for healing
runs, ``healing_summary.json``. Its numbers were measured by another instrument than this project's
and mean something else under the same name, so they are kept under their own names and apart.

What can be computed anew is what depends on the stored singular values of the hidden states alone
(:func:`rederive`). :data:`NOT_REDERIVABLE` says what cannot.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from healing.errors import HealingError
from healing.measurements.recovery import Damage, State, recovery_pct
from healing.measurements.spectrum import Spectrum
from healing.tracking.run_files import MAX_JSONL

SOURCE = "neuroentropy"
CONFIG, METRICS, SUMMARY = "config.json", "metrics.jsonl", "healing_summary.json"
THRESHOLD = 0.01
"""Singular values (normalised to sum 1) up to this one were left out of their effective rank."""
LARGEST = 1e15  # of a singular value; they were stored as shares of their sum
PLACEHOLDER_LOSS = 1e10
"""What the predecessor wrote where no loss was computed; not a measurement."""

ARMS = {"treatment": "haep", "control_gaussian": "gaussian_noise",
        "control_random_text": "random_text"}  # fmt: skip
"""Prefix of the recorded training rows → arm. Their ``eigen_prion`` is HAEP."""

NOT_REDERIVABLE = {
    "centring, first tokens, padding": "the singular values are of hidden states whose rows were "
    "neither centred nor selected; the states themselves were not stored",
    "effective rank of each block": "one list of singular values was stored per state",
    "scale of the spectrum": "the stored singular values are divided by their sum",
    "spectral gap as recorded": "it does not follow from the stored singular values",
    "loss and perplexity": "neither logits nor the texts were stored",
    "rank during attack and healing": "no singular values were stored between the two ends",
}
"""What the records do not determine, and why."""

STATES = {"healthy": "baseline", "collapsed": "post_attack"}


class LegacyError(HealingError, ValueError):
    """A recorded file is not what the predecessor wrote; the message names file and line."""


@dataclass(frozen=True)
class LegacyPoint:
    """One line of ``metrics.jsonl``.

    Attributes:
        step: Optimiser step.
        time_ms: When it was written, milliseconds since the epoch (their clock read as UTC: no time
            zone was recorded).
        metrics: Recorded name → number.
    """

    step: int
    time_ms: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Rederived:
    """Spectral numbers of stored singular values, by this project's formulas.

    No threshold, probabilities that sum to 1; see
    :class:`healing.measurements.spectrum.Spectrum`. The matrix behind them stays the
    predecessor's: uncentred, first tokens and padding included.
    """

    effective_rank: float
    participation_ratio: float
    stable_rank: float
    spectral_gap: float


@dataclass(frozen=True)
class LegacyRun:
    """One recorded run.

    Attributes:
        folder: Where it was read.
        study: First folder below the imported one, such as ``priority1_scaling_law``.
        kind: ``attack`` or ``heal``.
        model: Size, such as ``1b``.
        arm: In this project's words.
        optimizer: ``adamw``, or ``sgd`` where the folder's name says so (no other record of it).
        precision: ``fp16``, ``8bit`` or ``4bit``.
        params: ``config.json``, flattened with dots.
        points: ``metrics.jsonl``.
        healthy: Singular values before the attack; empty where none were stored.
        collapsed: Singular values after it; empty where none were stored.
        summary: ``healing_summary.json``; empty for attack runs.
        fingerprint: Hash of the files' bytes.
        results: Hash of the recorded numbers without their time stamps: equal for a run that was
            recorded twice, and for repetitions that drew nothing anew.
    """

    folder: pathlib.Path
    study: str
    kind: str
    model: str
    arm: str
    optimizer: str
    precision: str
    params: Mapping[str, Any]
    points: tuple[LegacyPoint, ...]
    healthy: tuple[float, ...] = ()
    collapsed: tuple[float, ...] = ()
    summary: Mapping[str, float] = field(default_factory=dict)
    fingerprint: str = ""
    results: str = ""

    @property
    def name(self) -> str:
        """Study and folder name."""
        return "/".join(dict.fromkeys((self.study, self.folder.name)))

    @property
    def start_ms(self) -> int:
        """First time stamp."""
        return min(p.time_ms for p in self.points)

    @property
    def end_ms(self) -> int:
        """Last time stamp."""
        return max(p.time_ms for p in self.points)

    def recorded(self, name: str) -> float:
        """First recorded value of a metric; NaN where there is none."""
        return next((p.metrics[name] for p in self.points if name in p.metrics), math.nan)

    @property
    def damage(self) -> Damage:
        """Healthy and collapsed state, as recorded (their rank, their perplexity)."""
        if self.kind == "heal":
            s = self.summary
            names = [(s[f"{n}_rank"], s[f"{n}_perplexity"]) for n in ("original", "collapsed")]
        else:
            names = [
                (self.recorded(f"{n}_effective_rank"), self.recorded(f"{n}_perplexity"))
                for n in STATES.values()
            ]
        healthy, collapsed = (State(rank, _log(ppl), ppl) for rank, ppl in names)
        return Damage(healthy, collapsed)

    @property
    def rank_change_pct(self) -> float:
        """100·(collapsed − healthy)/healthy of the recorded rank; positive where it rose."""
        return -self.damage.rank_reduction_pct

    @property
    def rederived_change_pct(self) -> float:
        """The same of the rank computed anew from all singular values; NaN without them."""
        if not self.healthy or not self.collapsed:
            return math.nan
        healthy, collapsed = (rederive(v).effective_rank for v in (self.healthy, self.collapsed))
        return 100.0 * (collapsed - healthy) / healthy

    @property
    def unclamped_recovery_pct(self) -> float:
        """Rank recovery of a healing run by the formula alone, neither clamped nor judged."""
        ends = (self.damage.collapsed.effective_rank, self.damage.healthy.effective_rank)
        return recovery_pct(self.summary.get("final_effective_rank", math.nan), *ends)

    @property
    def undefined_reason(self) -> str:
        """Why a healing run says nothing of recovery from a collapse; empty where it may."""
        if self.kind != "heal":
            return ""
        if self.rank_change_pct > 0:
            return f"the attack raised the rank by {self.rank_change_pct:.1f} %"
        return self.damage.rank_reason


def _log(perplexity: float) -> float:
    return math.log(perplexity) if perplexity > 0 else math.nan


def legacy_effective_rank(singular_values: Sequence[float]) -> float:
    """The predecessor's effective rank, for reading its records only: exp(−Σ pᵢ ln pᵢ) over the
    pᵢ = σᵢ/Σσ above 0.01, which are *not* renormalised.

    Dropping the small ones and keeping the others' weights bounds it: it is no entropy, and it can
    fall where the true rank rises.

    Args:
        singular_values: Non-negative, at least one above zero.
    """
    total = math.fsum(singular_values)
    kept = [s / total for s in singular_values if s / total > THRESHOLD]
    return math.exp(-math.fsum(p * math.log(p) for p in kept))


def rederive(singular_values: Sequence[float]) -> Rederived:
    """This project's spectral numbers of stored singular values (see :class:`Rederived`)."""
    sigma = torch.tensor(sorted(singular_values, reverse=True), dtype=torch.float64)
    found = Spectrum(sigma.square(), len(sigma), 0.0)
    return Rederived(
        found.effective_rank,
        found.participation_ratio,
        found.stable_rank,
        found.spectral_gap if len(sigma) > 1 else math.inf,
    )


def find_folders(root: pathlib.Path) -> list[pathlib.Path]:
    """Every folder below (or at) the root that holds a file of a recorded run, sorted.

    Raises:
        LegacyError: No such folder, or no recorded run in it.
    """
    if not root.is_dir():
        raise LegacyError(f"--folder {root} is not a folder: name the predecessor's results")
    found = {path.parent for name in (CONFIG, METRICS, SUMMARY) for path in root.rglob(name)}
    if not found:
        raise LegacyError(f"no {CONFIG} or {METRICS} below {root}: nothing to import")
    return sorted(found)


def _text(path: pathlib.Path) -> tuple[str, bytes]:
    try:
        if path.stat().st_size > MAX_JSONL:
            raise LegacyError(f"{path}: more than {MAX_JSONL} bytes")
        raw = path.read_bytes()
        return raw.decode(), raw
    except OSError as error:
        raise LegacyError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise LegacyError(f"{path}: not UTF-8 text (byte {error.start})") from error


def _object(path: pathlib.Path, line: int, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise LegacyError(f"{path}:{line + error.lineno - 1}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # thousands of digits, or of levels
        raise LegacyError(f"{path}:{line}: not JSON that can be read ({error})") from error
    if not isinstance(value, dict):
        raise LegacyError(f"{path}:{line}: a JSON object is needed, not {type(value).__name__}")
    return value


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 2**63)


def _time_ms(where: str, value: Any) -> int:
    try:
        moment = datetime.datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise LegacyError(f"{where}: timestamp {value!r} is not an ISO date and time") from error
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=datetime.UTC)
    if moment.year < 1971:
        raise LegacyError(f"{where}: timestamp {value!r} lies before any recorded run")
    return round(moment.timestamp() * 1000)


def _singular_values(where: str, name: str, value: Any) -> tuple[float, ...]:
    good = isinstance(value, list) and all(_is_number(v) and 0 <= v <= LARGEST for v in value)
    if not good or not any(value):
        raise LegacyError(f"{where}: {name} is not a list of non-negative numbers")
    return tuple(map(float, value))


def _point(where: str, row: Mapping[str, Any]) -> LegacyPoint:
    step = row.get("step")
    if not isinstance(step, int) or not _is_number(step) or step < 0:
        raise LegacyError(f"{where}: step {step!r} is not a whole number from 0")
    numbers = {k: float(v) for k, v in row.items() if k != "step" and _is_number(v)}
    kept = {k: v for k, v in numbers.items() if not (k.endswith("loss") and v == PLACEHOLDER_LOSS)}
    return LegacyPoint(step, _time_ms(where, row.get("timestamp")), kept)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _arm(path: pathlib.Path, names: set[str]) -> str:
    """Of the training rows; a run whose attack left none, or two kinds, is not understood."""
    if any(name.startswith("healing_") for name in names):
        raise LegacyError(f"{path.parent}: no {SUMMARY}, and {METRICS} is of a healing run")
    found = {arm for prefix, arm in ARMS.items() if any(n.startswith(prefix) for n in names)}
    if len(found) != 1:
        rows = f"rows of exactly one of {', '.join(ARMS)}"
        raise LegacyError(f"{path}: {rows} are needed; found {len(found)}")
    return found.pop()


def _precision(folder: str, params: Mapping[str, Any]) -> str:
    if params.get("model.use_quantization"):
        return f"{params.get('model.quantization_bits')}bit"
    return "fp16" if "fp16" in folder else "unknown"


SUMMARY_NUMBERS = (
    "original_rank", "collapsed_rank", "final_effective_rank", "original_perplexity",
    "collapsed_perplexity", "final_perplexity", "rank_recovery_pct", "ppl_improvement_pct",
)  # fmt: skip


def _summary(path: pathlib.Path, text: str) -> dict[str, float]:
    values = _object(path, 1, text)
    for name in SUMMARY_NUMBERS:
        if not _is_number(values.get(name)):
            raise LegacyError(f"{path}: {name} is not a number")
    return {k: float(v) for k, v in values.items() if _is_number(v)}


def _rows(path: pathlib.Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise LegacyError(f"{path}: empty")
    return [(f"{path}:{i}", _object(path, i, line)) for i, line in lines]


def _states(rows: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, tuple[float, ...]]:
    found = {}
    for where, row in rows:
        for state, prefix in STATES.items():
            name = f"{prefix}_singular_values"
            if name in row:
                found[state] = _singular_values(where, name, row[name])
    return found


def _model(path: pathlib.Path, params: Mapping[str, Any]) -> str:
    name = params.get("model.name")
    if not isinstance(name, str) or not name.startswith("pythia-"):
        raise LegacyError(f"{path}: model.name is {name!r}, not a Pythia model's name")
    return name.removeprefix("pythia-")


def read_run(folder: pathlib.Path, root: pathlib.Path) -> LegacyRun:
    """One recorded run.

    Args:
        folder: Holds its files.
        root: The imported folder; the study is the first folder below it.

    Raises:
        LegacyError: A file is missing or not what the predecessor wrote.
    """
    for path in (folder / CONFIG, folder / METRICS, folder / SUMMARY):
        if path.name != SUMMARY and not path.is_file():
            raise LegacyError(f"{folder}: no {path.name}")
        if not path.resolve().is_relative_to(root.resolve()):
            raise LegacyError(f"{path}: a link that leads out of {root}, which is not followed")
    config, config_bytes = _text(folder / CONFIG)
    metrics, metrics_bytes = _text(folder / METRICS)
    heals = (folder / SUMMARY).is_file()
    summary, summary_bytes = _text(folder / SUMMARY) if heals else ("", b"")
    params, rows = _flat(_object(folder / CONFIG, 1, config)), _rows(folder / METRICS, metrics)
    points = tuple(_point(where, row) for where, row in rows)
    states = _states(rows)
    numbers = [{k: v for k, v in row.items() if k != "timestamp"} for _, row in rows]
    # Three files, no separator needed: each digest has a fixed length.
    parts = (config_bytes, metrics_bytes, summary_bytes)
    digest = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts))
    run = LegacyRun(
        folder=folder,
        study=(*folder.relative_to(root).parts, folder.name)[0],
        kind="heal" if heals else "attack",
        model=_model(folder / CONFIG, params),
        arm="haep" if heals else _arm(folder / METRICS, {n for p in points for n in p.metrics}),
        optimizer="sgd" if folder.name.endswith("_sgd") else "adamw",
        precision=_precision(folder.name, params),
        params=params,
        points=points,
        healthy=states.get("healthy", ()),
        collapsed=states.get("collapsed", ()),
        summary=_summary(folder / SUMMARY, summary) if heals else {},
        fingerprint=digest.hexdigest()[:16],
        results=hashlib.sha256(json.dumps(numbers).encode()).hexdigest()[:16],
    )
    damage = run.damage
    if not (damage.healthy.effective_rank > 0 and damage.collapsed.effective_rank > 0):
        raise LegacyError(f"{folder / METRICS}: no effective rank before and after the attack")
    return run
