"""What a group is said to show: by the protocol, and by the stricter rule of the project."""

from __future__ import annotations

import math

from findings.estimates import Group, share_bounds
from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, Verdict
from healing.reporting.verdict_sentences import OUTCOMES


def counted(own: Group) -> str:
    """How many lie above 70 %, and what that says of others."""
    k = own.above()
    low, high = share_bounds(k, own.n)
    bound = f"at least {low:.0f} %" if k == own.n else f"{low:.0f} to {high:.0f} %"
    return f"{k} of {own.n} ({bound})"


def beats_scratch(own: Group, scratch: Group | None) -> bool | None:
    """Whether every checkpoint has a lower loss than the best run from scratch at equal tokens."""
    if scratch is None:
        return None
    best = min(run.states[own.step]["loss"] for run in scratch.runs)
    return all(run.states[own.step]["loss"] < best for run in own.runs)


def verdict(own: Group, scratch: Group | None) -> str:
    """By the rule of the protocol: interval and count and knowledge together."""
    found, k = own.interval(), own.above()
    if math.isnan(found.low) or own.n < 5:
        return "no verdict: too few checkpoints"
    above = found.low > REVERSIBLE_ABOVE and share_bounds(k, own.n)[0] > 50
    if above and beats_scratch(own, scratch) is not False:
        return "heals"
    low = sum(value < IRREVERSIBLE_BELOW for value in own.recoveries())
    if found.high < IRREVERSIBLE_BELOW and share_bounds(low, own.n)[0] > 50:
        return "does not heal within this budget"
    return "no verdict: neither under 20 nor over 70 % with certainty"


def strict(own: Group) -> str:
    """The same by the rule that is wrong in at most 5 % of the regimes simulated."""
    found = own.verdict()
    if found.verdict in OUTCOMES:
        return OUTCOMES[found.verdict]
    if found.verdict is Verdict.TOO_FEW and found.n_needed:
        return f"too few: takes {found.n_needed} that agree"
    return "undecided"
