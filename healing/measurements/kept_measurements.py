"""Measurements with standard errors of states that a process meets again: the healthy model in
every cell of a sweep, a collapsed one at the end of its attack and before its healing.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

import torch

from healing.measurements.probe import Measurement, Probe
from healing.measurements.rank_standard_error import BOOTSTRAP_MAX_DIMENSION
from healing.models.loading import LoadedModel, state_digest
from healing.randomness import named_generator

MOST = 64
"""Measurements kept; one of 16 blocks of 2,048 units takes 0.3 MB."""

_Key = tuple[object, ...]
_KEPT: OrderedDict[_Key, Measurement] = OrderedDict()
_LOCK = threading.Lock()


def forget() -> None:
    """Keep nothing of what was measured so far."""
    with _LOCK:
        _KEPT.clear()


def measured(probe: Probe, loaded: LoadedModel, seed: int, weights: str = "") -> Measurement:
    """What :meth:`healing.measurements.probe.Probe.measure` gives with the bootstrap of a seed,
    measured once per process: it depends on weights, architecture, tokenizer, probe, threads and
    device, and above the bootstrap's size not on the seed, since nothing is drawn there.

    Args:
        probe: Frozen windows. Where it remembers states that extra measurements compare with,
            nothing is kept: the same weights measure something else beside other states.
        loaded: The model as it is now.
        seed: Of the run.
        weights: Digest of the weights that the model has now; empty = they are hashed here, but
            not on an accelerator, which measures sooner than that.
    """
    if probe.remembered:
        return probe.measure(loaded.model, named_generator(seed, "bootstrap"))
    if not weights and loaded.device.type == "cpu":
        weights = state_digest(loaded.model.state_dict())
    state: _Key = (
        loaded.identity,
        weights,
        hashlib.sha256(probe.windows.numpy().tobytes()).digest(),
        tuple(probe.windows.shape),
        probe.extra,
        # Which states are compared with; the healthy one is the model's identity, and the collapsed
        # one, where it is known, the state itself.
        tuple((name, *sorted(states)) for name, states in sorted(probe.remembered.items())),
        torch.get_num_threads(),
        loaded.device.type,
    )
    if weights and (found := _find((state, None)) or _find((state, seed))):
        return found
    made = probe.measure(loaded.model, named_generator(seed, "bootstrap"))
    if weights:
        drawn = len(made.spectra[0].eigenvalues) <= BOOTSTRAP_MAX_DIMENSION
        with _LOCK:
            _KEPT[state, seed if drawn else None] = made
            while len(_KEPT) > MOST:
                _KEPT.popitem(last=False)
    return made


def _find(key: _Key) -> Measurement | None:
    with _LOCK:
        if key in _KEPT:
            _KEPT.move_to_end(key)
        return _KEPT.get(key)
