"""A part's main question again on seeds that were fixed when its result was known."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from findings.estimates import Group, bounds, excess_loss, group, read, sham_of
from findings.parts import REPLICATIONS
from findings.protocol import SCRATCH_ARM, STRONG, TREATMENT, Part
from findings.verdicts import counted, strict, verdict


@dataclass(frozen=True)
class Replication:
    """What came out of one.

    Attributes:
        part: Of the protocol.
        own: Its checkpoints at the end of the budget.
        sham: The healthy model through the same healing.
        scratch: Untrained models through it.
    """

    part: Part
    own: Group
    sham: Group
    scratch: Group


def read_all(tables: pathlib.Path) -> list[Replication]:
    """Those whose table is there."""
    found = []
    for name, part in REPLICATIONS.items():
        path = tables / f"{name}.csv"
        if path.exists():
            runs = read(path)
            own = group(runs, part.model, TREATMENT, STRONG, part.steps)
            sham = sham_of(runs, part.model, STRONG, part.steps)
            scratch = group(runs, part.model, SCRATCH_ARM, STRONG, part.steps)
            if own and sham and scratch:
                found.append(Replication(part, own, sham, scratch))
    return found


def sentence(model: str, found: Sequence[Replication]) -> str:
    """What it adds to the answer on a model."""
    own = next((r.own for r in found if r.part.model == model), None)
    if own is None:
        return ""
    return (
        f" Again on {own.n} other seeds: {bounds(own.interval())} % ({own.above()} over 70 %); by the "
        f"stricter rule: {strict(own)}."
    )


def section(found: Sequence[Replication]) -> Iterator[str]:
    """Of the findings."""
    yield "## Again on other seeds"
    yield ""
    yield (
        "A verdict from the same checkpoints with a few more would be one chosen by its result. So the protocol names other "
        "seeds, after the first result and before these runs, and their verdict rests on them alone."
    )
    yield ""
    yield (
        "| model | seeds | commit | rank recovery % [95 %] | over 70 % (share of others) | lowest, highest | loss above the sham's, "
        "nats | by the protocol | by docs/method.md |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for r in found:
        values, seeds = r.own.recoveries(), [run.seed for run in r.own.runs]
        yield (
            f"| {r.part.model} | {min(seeds)}–{max(seeds)} | {r.part.commit} | "
            f"{bounds(r.own.interval())} | {counted(r.own)} | {min(values):.0f}, {max(values):.0f} | "
            f"{bounds(excess_loss(r.own, r.sham), 2)} | {verdict(r.own, r.scratch)} | {strict(r.own)} |"
        )
    yield ""
