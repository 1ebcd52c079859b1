"""Attacks and healing runs of one seed, as rows of a table.

The project's own cells do the work; nothing is tracked, so that it runs where MLflow is not
installed. A row holds the fingerprints that tracked runs of the same settings and code have.
"""

from __future__ import annotations

import math
import pathlib
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from typing import Any

from findings.protocol import ATTACK_ALONE, STRONG, Arm, Part
from healing.attacks.base import AttackRecord
from healing.config.arm_tags import SHAM_ARM
from healing.config.attack import AttackConfig
from healing.config.fingerprint import as_params
from healing.config.heal import HealConfig
from healing.measurements.probe import Measurement
from healing.models.checkpoints import save_checkpoint
from healing.stages.cells.attack import AttackOutcome, attack_cell, attack_code, noise_match
from healing.stages.cells.events import outcome_of
from healing.stages.cells.heal import heal_cell, resolve_from_checkpoint
from healing.stages.cells.heal_outcome import HealCell, HealOutcome
from healing.stages.cells.inputs import resolve_from_model, use_threads

Row = dict[str, Any]

COLUMNS = (
    "model", "arm", "seed", "healer", "step", "tokens", "effective_rank", "last_block_rank",
    "min_block_rank", "participation_ratio", "loss", "accuracy", "status", "weight_change",
    "attack_steps", "attack_fingerprint", "heal_fingerprint",
)  # fmt: skip
DIGITS = 7
"""Significant ones in the table: more than any statement needs, and a smaller file."""


def _number(value: float) -> str:
    return f"{value:.{DIGITS}g}" if math.isfinite(value) else str(value)


def _numbers(measured: Measurement) -> Row:
    ranks = [spectrum.effective_rank for spectrum in measured.spectra]
    found = {
        "effective_rank": measured.effective_rank,
        "last_block_rank": ranks[-1],
        "min_block_rank": min(ranks),
        "participation_ratio": measured.metrics()["participation_ratio"],
        "loss": measured.loss,
        "accuracy": measured.extra.get("extra/accuracy_top1", math.nan),
    }
    return {name: _number(value) for name, value in found.items()}


def _attacked(part: Part, arm: Arm, seed: int, reference: str, **place: Any) -> AttackOutcome:
    settings = {**part.shared, **part.attack, **arm.settings, **place}
    if reference:
        settings["reference_checkpoint"] = reference
    config = resolve_from_model(AttackConfig(arm=arm.name, seed=seed, **settings))
    use_threads(config)
    return outcome_of(attack_cell(config))


def keep_collapsed(outcome: AttackOutcome, path: pathlib.Path) -> None:
    """The collapsed weights, with what a later cell asks of their origin."""
    config = outcome.config
    made = {
        **as_params(config),
        "noise_match": noise_match(config),
        "code": attack_code(config),
        "fingerprint": outcome.fingerprint,
        "attack_run_id": "",
        "healthy_digest": outcome.loaded.digest,
        "model_commit": outcome.loaded.commit,
        "corpus_digests": outcome.digests,
    }
    save_checkpoint(path, outcome.loaded.model, outcome.last.step, "findings", made)


def _healed(part: Part, healer: str, seed: int, checkpoint: str, **place: Any) -> HealOutcome:
    settings = {
        **part.shared,
        "healing_steps": part.steps,
        "measurement_interval": part.interval,
        "measurements": "accuracy",
        **part.healers[healer],
        **place,
    }
    config = resolve_from_checkpoint(HealConfig(seed=seed, **settings), None, checkpoint)
    use_threads(config)  # a sham's chain attacks nothing before
    outcome, _ = outcome_of(heal_cell(HealCell(config, checkpoint)))
    return outcome


def _wanted(chain: Sequence[Arm], done: Collection[tuple[str, str]]) -> dict[Arm, list[str]]:
    """Arms → the healers left to run; an arm that another one needs may have none left."""
    healers = {a: a.healers or (STRONG if a.healed else ATTACK_ALONE,) for a in chain}
    left = {a: [h for h in healers[a] if (a.name, h) not in done] for a in chain}
    needed = {arm.reference for arm in chain if left[arm]}
    return {arm: healers for arm, healers in left.items() if healers or arm.name in needed}


def chain_rows(
    part: Part,
    chain: Sequence[Arm],
    seed: int,
    label: str,
    deadline: float = math.inf,
    done: Collection[tuple[str, str]] = (),
    **place: Any,
) -> Iterator[list[Row]]:
    """Rows of some arms of a seed, a list per healing run; nothing begins after the deadline.

    Args:
        part: Of the protocol.
        chain: Of its arms, a reference before what is matched to it.
        seed: Of attacks and healing.
        label: What the model is called in the table.
        deadline: Of ``time.time()``.
        done: Arm and healer of what is there already.
        place: Model and device, for attack and healing.
    """
    with tempfile.TemporaryDirectory() as folder:
        for arm, healers in _wanted(chain, done).items():
            if time.time() > deadline:
                return
            path = pathlib.Path(folder) / f"{arm.name}.pt"
            reference = str(pathlib.Path(folder) / f"{arm.reference}.pt") if arm.reference else ""
            shared = {"model": label, "arm": arm.name, "seed": seed}
            checkpoint, record, own = "", None, ""
            if arm.name != SHAM_ARM:
                attacked = _attacked(part, arm, seed, reference, **place)
                keep_collapsed(attacked, path)
                checkpoint, record, own = str(path), attacked.last, attacked.fingerprint
                if not arm.healed:
                    yield list(_attack_rows(attacked, {**shared, "healer": ATTACK_ALONE}))
                    continue
                del attacked  # its model: the healing run loads one of its own
            for healer in healers:
                if time.time() > deadline:
                    return
                outcome = _healed(part, healer, seed, checkpoint, **place)
                facts = {
                    **shared,
                    "healer": healer,
                    "status": outcome.status,
                    **_attack_facts(record, own),
                    "heal_fingerprint": outcome.fingerprint,
                }
                yield list(_rows(outcome, facts))


def _attack_facts(record: AttackRecord | None, fingerprint: str) -> Row:
    return {
        "weight_change": _number(record.weight_change if record else 0.0),
        "attack_steps": record.step if record else 0,
        "attack_fingerprint": fingerprint,
    }


def _attack_rows(outcome: AttackOutcome, facts: Row) -> Iterator[Row]:
    """The healthy state as step −1 and the state after the attack as step 0."""
    made = {**facts, "status": "ok", **_attack_facts(outcome.last, outcome.fingerprint)}
    for step, measured in ((-1, outcome.healthy), (0, outcome.collapsed)):
        yield {**made, "step": step, "tokens": 0, **_numbers(measured)}


def _rows(outcome: HealOutcome, facts: Row) -> Iterator[Row]:
    """The healthy state as step −1, then every measured step."""
    yield {**facts, "step": -1, "tokens": 0, **_numbers(outcome.healthy)}
    for record in outcome.records:
        yield {
            **facts,
            "step": record.step,
            "tokens": record.tokens,
            **_numbers(record.measurement),
        }
