"""The parts of the protocol."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from findings.protocol import PRESET, STRONG, Arm, Part
from healing.config.healer import INCLUDED


def _tuned(model: str) -> Mapping[str, Any]:
    """Selected on HAEP states of seeds 100 and 101 of the model."""
    found = json.loads((INCLUDED / f"{model}.json").read_text(encoding="utf-8"))
    settings: Mapping[str, Any] = found["settings"]
    return settings


_SHAPE = {"healing_warmup": 0.1, "healing_decay": "linear", "gradient_clip": 1.0}
"""That of nano's winner, for a model whose rate was chosen on its own."""

# Stopped where the rank fell by 35 %, looked at after every step: equal collapse, whatever the arm.
_ATTACK = {"measurement_interval": 1, "rayleigh_draws": 0}

_LOW_RANK = Arm("low_rank_noise", {"match": "rank", "noise_rank": 4}, reference="haep")

PARTS: dict[str, Part] = {
    "nano": Part(
        "nano",
        (
            Arm("none", seeds=3),
            Arm("haep", healers=(STRONG, PRESET)),
            Arm("random_tokens"),
            Arm("random_text"),
            _LOW_RANK,
            Arm("reinitialised", seeds=3),
        ),
        tuple(range(10)),
        {STRONG: _tuned("nano"), PRESET: {"healing_lr": 1e-3}},
        960,
        20,
        _ATTACK,
        {"threads": 1},
        "35d55ec",
    ),
    "micro": Part(
        "micro",
        (
            Arm("none", seeds=2),
            Arm("haep"),
            Arm("random_tokens", seeds=10),
            Arm("random_text", seeds=10),
            Arm("reinitialised", seeds=2),
        ),
        tuple(range(20)),
        {STRONG: _tuned("micro")},
        240,
        10,
        _ATTACK,
        {"threads": 1},
        "f9f1d48",
    ),
    "smollm2-135m": Part(
        "smollm2-135m",
        (
            Arm("none", seeds=1),
            Arm("haep"),
            Arm("random_tokens"),
            _LOW_RANK,
        ),
        (0, 1, 2),
        {STRONG: {**_SHAPE, "healing_lr": 1e-3}},
        40,
        10,
        {**_ATTACK, "attack_lr": 3e-3, "attack_steps": 40},
        {"threads": 1},
        "7579ef5",
    ),
}

REPLICATIONS: dict[str, Part] = {
    "nano-replication": replace(
        PARTS["nano"],
        arms=(Arm("none", seeds=3), Arm("haep"), Arm("reinitialised", seeds=3)),
        seeds=tuple(range(10, 30)),
        commit="f9f1d48",
    ),
}
"""Other seeds of a part whose result is known: its own verdict rests on these alone."""

MECHANISM: dict[str, Part] = {
    "nano-mechanism": replace(
        PARTS["nano"],
        arms=(Arm("haep_oracle", {"attack_steps": 200}, healed=False),),
        commit="9bb5341",
    ),
}
"""The arm of HAEP's theory alone: how far it comes, in five times the default's steps."""


def part_of(model: str) -> Part:
    """The part of a model, as the tables call it."""
    return next(part for part in PARTS.values() if part.model == model)


ALL_PARTS = PARTS | REPLICATIONS | MECHANISM
"""What ``python -m findings run`` takes."""
