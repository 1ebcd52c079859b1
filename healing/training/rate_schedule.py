"""The learning rate of healing at each step: a pure function of the step."""

from __future__ import annotations

import math


def rate_factor(step: int, total: int, warmup: float = 0.0, decay: str = "constant") -> float:
    """Factor on the learning rate at one step.

    With w = round(warmup·total) warm-up steps: step/(w + 1) up to step w, so that no step is
    wasted at rate 0 and step w + 1 is the first at the full rate; from there, with the share
    p = (step − 1 − w)/(total − w) of the decay that is over, 1 (constant), (1 + cos πp)/2 (cosine;
    Loshchilov & Hutter 2017, arXiv 1608.03983, without restarts) or 1 − p (linear). The rate after
    the last step would be 0.

    Args:
        step: From 1.
        total: Steps of the whole run: the horizon, also of a run that ends early.
        warmup: Share of the steps, 0 to 1.
        decay: ``constant``, ``cosine`` or ``linear``.
    """
    rising = round(warmup * total)
    if step <= rising:
        return step / (rising + 1)
    if decay == "constant":
        return 1.0
    over = (step - 1 - rising) / (total - rising)
    return 0.5 * (1.0 + math.cos(math.pi * over)) if decay == "cosine" else 1.0 - over
