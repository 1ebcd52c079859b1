"""The parts of the protocol."""

from __future__ import annotations

import json

from findings.protocol import PRESET, STRONG, Arm, Part
from healing.config.healer import INCLUDED

# Selected on nano's seeds 100 and 101; the other models are not tuned for.
_TUNED = json.loads((INCLUDED / "nano.json").read_text(encoding="utf-8"))["settings"]

_SHAPE = {"healing_warmup": 0.1, "healing_decay": "linear", "gradient_clip": 1.0}
"""That of the winner, for a model whose rate was chosen on its own."""

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
        {STRONG: _TUNED, PRESET: {"healing_lr": 1e-3}},
        960,
        20,
        _ATTACK,
        {"threads": 1},
        "35d55ec",
    ),
    "micro": Part(
        "micro",
        (
            Arm("none", seeds=1),
            Arm("haep"),
            Arm("random_tokens"),
            Arm("random_text"),
            Arm("reinitialised", seeds=1),
        ),
        tuple(range(5)),
        {STRONG: _TUNED},
        480,
        20,
        _ATTACK,
        {"threads": 1},
        "283ee32",
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


def part_of(model: str) -> Part:
    """The part of a model, as the tables call it."""
    return next(part for part in PARTS.values() if part.model == model)
