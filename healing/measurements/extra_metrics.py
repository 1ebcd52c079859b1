"""Extra measurements of one state: what they are given, and the names that they are logged as."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from healing.errors import ConfigError
from healing.measurements.covariance import Moments
from healing.registry import MEASUREMENTS, NAME


@dataclass(frozen=True)
class ProbeState:
    """One state of a model on the probe, as one pass over it left it.

    Attributes:
        model: In evaluation mode; gradients are off.
        windows: int64 (windows, tokens), on the CPU.
        losses: Cross entropy of every predicted token, nats (windows · (tokens − 1),), in the order
            of the windows; not finite where it cannot be computed.
        moments: Covariance of the hidden states, one per block.
        remembered: State (``healthy``, ``collapsed``) → what the measurement's ``remember`` kept
            of it; without those that there have not been yet.
    """

    model: nn.Module
    windows: torch.Tensor
    losses: torch.Tensor
    moments: tuple[Moments, ...]
    remembered: Mapping[str, Any] = field(default_factory=dict)


Remembered = Mapping[str, Mapping[str, Any]]
"""Measurement → state → what it keeps of it."""

ROOM_BYTES = 2**30
ROOM_SHARE = 2.0
"""What a measurement may keep of one state: so many bytes, or this multiple of the weights' where
that is more, as much as an optimiser's states take."""


def require_room(name: str, model: nn.Module, numbers: int) -> None:
    """Refuse to keep more float32 numbers of a state than there is room for by the rule.

    Raises:
        ConfigError: With the size, and what to do.
    """
    weights = sum(p.numel() for p in model.parameters())
    most = max(ROOM_BYTES, ROOM_SHARE * 4 * weights)
    if 4 * numbers > most:
        raise ConfigError(
            f"measurement {name!r} would keep {4 * numbers / 2**30:.1f} GiB of a state, at most "
            f"{most / 2**30:.1f} GiB are taken: lower --probe-tokens, or leave it out of "
            "--measurements"
        )


def needs(name: str) -> tuple[str, ...]:
    """States that a measurement compares with; its file is not imported."""
    MEASUREMENTS.check(name)
    return tuple(MEASUREMENTS.facts(name).get("NEEDS", ()))


def remember(
    state: str, model: nn.Module, windows: torch.Tensor, names: Sequence[str]
) -> dict[str, Any]:
    """Measurement → what it keeps of the model's present state, of those that compare with it.

    Args:
        state: ``healthy`` or ``collapsed``.
        model: In that state, in evaluation mode; gradients are off.
        windows: The probe's, int64 (windows, tokens).
        names: Measurements asked for.

    Raises:
        ConfigError: A measurement has no ``remember``, or would keep too much.
    """
    found = {}
    for name in names:
        if state not in needs(name):
            continue
        loaded = MEASUREMENTS.load(name)
        if not hasattr(loaded, "remember"):
            raise ConfigError(f"measurement {name!r} names NEEDS and has no remember()")
        found[name] = loaded.remember(model, windows)
    return found


def extra_metrics(
    state: ProbeState, names: Sequence[str], remembered: Remembered
) -> dict[str, float]:
    """``extra/<file>_<name>`` → number, of every measurement asked for.

    Raises:
        ConfigError: A measurement is not there, gives names that no metric can have, or compares
            with states of which none is known.
    """
    found = {}
    for name in names:
        known = remembered.get(name, {})
        if needs(name) and not known:
            raise ConfigError(
                f"measurement {name!r} compares with the {' or '.join(needs(name))} state, and "
                "there is none here: call probe.remembering first, or leave it out"
            )
        given = replace(state, remembered=known)
        for key, value in MEASUREMENTS.load(name).measure(given).items():
            if not NAME.fullmatch(key):
                raise ConfigError(f"measurement {name!r} names a number {key!r}: use a-z, 0-9, _")
            found[f"extra/{name}_{key}"] = float(value)
    return found
