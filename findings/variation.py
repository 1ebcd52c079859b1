"""How much recovery varies with what the protocol holds fixed, and the section that says so.

The unit is a checkpoint: one attack on one pretrained model. Standard deviations are in points of
rank recovery.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from findings.estimates import bounds, read_rows
from findings.estimates import write as write_rows
from healing.measurements.recovery import REVERSIBLE_ABOVE, recovery_pct
from healing.statistics.intervals import Interval, t_interval
from healing.statistics.variance_components import VarianceComponents, variance_components

COLUMNS = (
    "pretraining_seed", "attack_seed", "healing_text", "probe", "healthy_rank", "collapsed_rank",
    "healed_rank", "healthy_loss", "collapsed_loss", "healed_loss",
)  # fmt: skip
ORDER = ("healing_text", "pretraining_seed", "attack_seed", "probe")
OWN_TEXT, OTHER_TEXT = "own", "other"
"""What a model is healed on: the text that it was trained on, or English articles (WikiText-2)."""
PIECES = tuple(f"held-out {i}" for i in range(1, 6))
"""Probes of equal size from the same text; the first is the protocol's."""
PRIMARY = PIECES[0]
OTHER_PROBE = "other text"

Checkpoint = tuple[int, int]
"""Pretraining seed and attack seed."""


@dataclass(frozen=True)
class Variation:
    """A table of :mod:`findings.variation_runs`.

    Attributes:
        recovered: Text that was healed on → probe → checkpoint → percent of rank recovered.
        loss: The same for the healed loss above the healthy one, nats per token.
    """

    recovered: Mapping[str, Mapping[str, Mapping[Checkpoint, float]]]
    loss: Mapping[str, Mapping[str, Mapping[Checkpoint, float]]]

    def of(self, probe: str = PRIMARY, text: str = OWN_TEXT) -> Mapping[Checkpoint, float]:
        """Recoveries by checkpoint."""
        return self.recovered[text][probe]

    @property
    def probes(self) -> list[str]:
        """In the table's order, the protocol's first."""
        found = list(self.recovered[OWN_TEXT])
        return sorted(found, key=lambda p: (PIECES.index(p) if p in PIECES else len(PIECES), p))

    def pretraining(self) -> VarianceComponents:
        """Between pretraining seeds, and between attacks on one model."""
        own = self.of()
        return variance_components(list(own.values()), [model for model, _ in own])

    def probe_error(self) -> float:
        """Standard deviation of what a piece of held-out text adds to the recovery of *every*
        checkpoint: an error that more checkpoints do not average out.

        From the two-way table without replicates: of recovery on piece p of checkpoint c, the mean
        square between pieces less that of the remainder, over the number of checkpoints; 0 where
        the difference is negative.
        """
        table = np.array([list(self.of(piece).values()) for piece in PIECES])
        pieces, checkpoints = table.shape
        by_piece, by_checkpoint = table.mean(1, keepdims=True), table.mean(0, keepdims=True)
        rest = table - by_piece - by_checkpoint + table.mean()
        between = checkpoints * float(by_piece.var(ddof=1))
        within = float((rest**2).sum()) / ((pieces - 1) * (checkpoints - 1))
        return math.sqrt(max(0.0, (between - within) / checkpoints))

    def difference(self, probe: str, text: str = OWN_TEXT) -> Interval:
        """Recovery on another probe, or after another text, minus the protocol's: paired."""
        other, own = self.of(probe, text), self.of()
        return t_interval([value - own[checkpoint] for checkpoint, value in other.items()])


def read(path: pathlib.Path) -> Variation:
    """A table.

    Raises:
        ValueError: It is none of these.
    """
    recovered: dict[str, dict[str, dict[Checkpoint, float]]] = {}
    loss: dict[str, dict[str, dict[Checkpoint, float]]] = {}
    for row in read_rows(path, COLUMNS):
        checkpoint = (int(row["pretraining_seed"]), int(row["attack_seed"]))
        ranks = (float(row[f"{s}_rank"]) for s in ("healed", "collapsed", "healthy"))
        for table, value in (
            (recovered, recovery_pct(*ranks)),
            (loss, float(row["healed_loss"]) - float(row["healthy_loss"])),
        ):
            by_probe = table.setdefault(row["healing_text"], {})
            by_probe.setdefault(row["probe"], {})[checkpoint] = value
    return Variation(recovered, loss)


def write(path: pathlib.Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Rows as a table, sorted: the same rows give the same bytes."""
    write_rows(path, rows, COLUMNS, ORDER)


def _spread(variance: float) -> str:
    """A component of variance as a standard deviation; estimates may be negative."""
    return f"{math.sqrt(variance):.1f}" if variance > 0 else "0 (the estimate is negative)"


def _values(found: Mapping[Checkpoint, float], model: int) -> str:
    return ", ".join(f"{value:.0f}" for (own, _), value in found.items() if own == model)


def _objection(found: Variation, over_models: Interval) -> str:
    """What the protocol says would count against the main table."""
    parts = found.pretraining()
    larger = parts.between > parts.within or found.probe_error() ** 2 > parts.within
    below = not over_models.low > REVERSIBLE_ABOVE
    against = [
        "what the intervals leave out is larger than what they hold" * larger,
        f"over models {REVERSIBLE_ABOVE:.0f} % is not reached with certainty" * below,
    ]
    said = "; ".join(filter(None, against))
    return f"Of what the protocol says would count against the table above: {said or 'nothing'}."


def section(found: Variation) -> Iterator[str]:
    """Lines of docs/findings.md."""
    own = found.of()
    models, parts = list(dict.fromkeys(m for m, _ in own)), found.pretraining()
    seeds, pieces = len(own) // len(models), len(PIECES)
    yield "## What the intervals leave out"
    yield ""
    yield (
        "They speak of attack seeds, on one model, one probe and one text. Measured once on nano, "
        f"HAEP and the strong healer as above: {len(models)} pretraining seeds (the embedded model "
        f"and {len(models) - 1} made by its recipe), {seeds} attacks on each, every state on "
        f"{len(found.probes)} probes."
    )
    yield ""
    yield "| pretraining seed | rank recovery % | mean |"
    yield "|---|---|---|"
    for model in models:
        mean = float(np.mean([v for (m, _), v in own.items() if m == model]))
        name = "embedded" if model == 0 else str(model)
        yield f"| {name} | {_values(own, model)} | {mean:.1f} |"
    yield ""
    by_model = [float(np.mean([v for (m, _), v in own.items() if m == model])) for model in models]
    over_models = t_interval(by_model)
    yield (
        f"Over pretrained models the mean recovery is {bounds(over_models, 1)} % (t "
        f"interval over {len(models)} models). Standard deviations, points: between pretraining "
        f"seeds {_spread(parts.between)}, between attacks on one model {_spread(parts.within)}; "
        f"what a piece of held-out text of 4,096 tokens adds to all checkpoints alike "
        f"{found.probe_error():.1f} ({pieces} pieces). {_objection(found, over_models)}"
    )
    yield ""
    yield "| against the protocol's probe and text | checkpoints | rank recovery, points [95 %] |"
    yield "|---|---|---|"
    for probe in found.probes[1:]:
        there = found.difference(probe)
        yield f"| measured on: {probe} | {len(found.of(probe))} | {bounds(there, 1)} |"
    if OTHER_TEXT in found.recovered:
        healed = found.recovered[OTHER_TEXT]
        for probe, what in ((PRIMARY, ""), (OTHER_PROBE, ", measured on it too")):
            if probe in healed:
                there = found.difference(probe, OTHER_TEXT)
                count = len(healed[probe])
                yield f"| healed on other text{what} | {count} | {bounds(there, 1)} |"
        loss = float(np.mean(list(found.loss[OTHER_TEXT][PRIMARY].values())))
        yield ""
        yield (
            "Other text is English (WikiText-2), which nano has never seen; healed on it, the loss "
            f"on its own text stays {loss:.2f} nats above the healthy one."
        )
    yield ""


def section_of(tables: pathlib.Path) -> Sequence[str]:
    """The section, where its table is there."""
    path = tables / "variation" / "nano.csv"
    return list(section(read(path))) if path.exists() else []
