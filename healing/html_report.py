"""A summary as one HTML file that opens offline: styles and figures inside, nothing fetched."""

from __future__ import annotations

import base64
import functools
import pathlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from healing.plots.style import arm_label
from healing.pooling import GroupSummary, HealRun, Summary
from healing.report import (
    SHAM_NOTE,
    VERDICT_MEANING,
    comparison_gaps,
    comparison_sentence,
    sham_table,
    table,
)
from healing.wording import (
    PLAN_NOTE,
    PROSPECTS_NOTE,
    context_sentences,
    count_text,
    group_label,
    headline_groups,
    interval_text,
    plan_rows,
    prospect_rows,
    shown_label,
    verdict_heading,
    verdict_reason,
)

CSS_PIXELS_PER_INCH = 96
MAX_WIDTH = 900
"""CSS pixels; figures as wide as the page are shown up to this."""
ZONES = "Grey: 20 to 70 %, the zone of partial recovery; dotted: the healthy value. "
CAPTIONS = {
    "mean_recovery": (
        "Mean recovery over checkpoints with its interval at every step, by model; rank left, "
        "loss right. 0 % is the collapsed state. " + ZONES
    ),
    "final_recovery": (
        "Recovery after the last step: one point per checkpoint, below them their mean with its "
        "interval. " + ZONES
    ),
    "half_recovery": (
        "Share of checkpoints that got back half of what the attack took (one minus the "
        "Kaplan–Meier curve). A vertical tick is a checkpoint that was followed up to there "
        "without getting back half. Lines that lie on one another are drawn dashed over solid."
    ),
    "haep_against_noise": (
        "HAEP minus noise, paired by seed: one point per pair, below them their mean with its "
        "interval. Grey: differences that count as none."
    ),
    "recovery_against_parameters": (
        "Mean rank recovery after the last step against the number of parameters, with its "
        "interval; arms are set side by side. " + ZONES
    ),
}
METHODS = (
    "A model is collapsed by an attack and then fine-tuned on clean text. On a frozen probe of "
    "clean text, disjoint from all training text, effective rank (exponential of the entropy of "
    "the normalised singular values of centred hidden states, mean over blocks) and loss (nats "
    "per token) are measured every few steps. Recovery is 100·(now − collapsed)/(healthy − "
    "collapsed), unclamped: below 0 % the model moved away from the healthy value, above 100 % it "
    "went past it.",
    "The unit is the checkpoint: one collapsed state. Replicates, healing runs from one "
    "checkpoint, are averaged first. Intervals are Student t over checkpoint means, from three "
    "checkpoints on. No outlier is removed; failed and undefined runs are listed below.",
    "HAEP against noise: two one-sided t tests for equivalence within the grey zone, and two-sided "
    "paired t tests for superiority, Holm-adjusted over rank and loss. Half-recovery times are "
    "right-censored at the last measured step.",
    "“Irreversible” means: not within this budget of fine-tuning, by this measure. It does not "
    "show that the collapsed state is a stable minimum.",
)


@dataclass(frozen=True)
class Picture:
    """One embedded figure: data URI, text for those who cannot see it, caption, CSS pixels."""

    data: str
    alt: str
    caption: str
    width: int


def _png_width(content: bytes) -> int:
    """Width in pixels, from the header of a PNG file (RFC 2083, 4.1.1)."""
    return int.from_bytes(content[16:20], "big")


def embed(path: pathlib.Path, caption: str, alt: str, dots_per_inch: int = 300) -> Picture:
    """A PNG file as a data URI, shown a little larger than it would be printed.

    Raises:
        ValueError: Not a PNG file.
    """
    content = path.read_bytes()
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        raise ValueError(f"{path} is not a PNG file; pass one that plots wrote")
    width = round(1.35 * CSS_PIXELS_PER_INCH * _png_width(content) / dots_per_inch)
    data = "data:image/png;base64," + base64.b64encode(content).decode("ascii")
    return Picture(data, alt, caption, min(width, MAX_WIDTH))


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )


def _verdict(group: GroupSummary, groups: Sequence[GroupSummary]) -> dict[str, Any]:
    reason = verdict_reason(group)
    return {
        "kind": group.verdict.replace(" ", "-"),
        "heading": verdict_heading(group, groups),
        "sentences": [f"{reason[:1].upper()}{reason[1:]}.", *context_sentences(group)],
    }


def _alt(key: str, summary: Summary) -> str:
    """What a figure shows, in words: the final numbers of every group."""
    said = "; ".join(
        f"{g.model} {shown_label(g, summary.groups)}: rank {interval_text(g.intervals[_RANK])}, "
        f"loss {interval_text(g.intervals[_LOSS])}"
        for g in summary.groups
    )
    return f"{CAPTIONS[key]} Final recovery in per cent: {said}."


_RANK, _LOSS = "rank_recovery_pct", "loss_recovery_pct"


def _run_rows(runs: Sequence[HealRun], reason: str) -> list[tuple[str, str, str]]:
    return [(run.name, run.run_id, getattr(run, reason)) for run in runs]


def _slope_lines(summary: Summary) -> list[str]:
    return [
        f"{arm_label(arm)}: {interval_text(slope.slope)} points per tenfold parameters, "
        "from one mean per size."
        for arm, slope in summary.slopes.items()
    ]


def render(summary: Summary, figures: Mapping[str, pathlib.Path]) -> str:
    """The report.

    Args:
        summary: What to report.
        figures: Name in ``CAPTIONS`` → PNG file; those not given are left out.

    Raises:
        ValueError: A figure is not a PNG file.
    """
    groups = summary.groups
    runs = sum(g.n_runs for g in groups)
    level = f"{100 * summary.confidence:g} %"
    counts = f"{count_text(runs, 'finished healing run')} of "
    counts += count_text(len({g.model for g in groups}), "model")
    notes = [(f"{g.model} {group_label(g, groups)}", n) for g in groups for n in g.notes]
    return (
        _environment()
        .get_template("report.html")
        .render(
            title="Recovery report",
            subtitle=f"{counts}, {len(summary.failed)} failed. Intervals: {level}.",
            verdicts=[_verdict(g, groups) for g in headline_groups(summary)],
            comparisons=[
                *(comparison_sentence(m, summary) for m in summary.comparisons),
                *comparison_gaps(summary),
            ],
            groups=table(summary),
            table_note=VERDICT_MEANING.replace("*", ""),
            sham=sham_table(summary),
            sham_note=SHAM_NOTE,
            figures={
                key: embed(path, CAPTIONS[key], _alt(key, summary)) for key, path in figures.items()
            },
            slopes=_slope_lines(summary),
            prospects=prospect_rows(summary),
            prospects_note=PROSPECTS_NOTE,
            plans=plan_rows(summary),
            plan_note=PLAN_NOTE,
            methods=METHODS,
            failed=_run_rows(summary.failed, "failure"),
            undefined=_run_rows(summary.undefined, "undefined_reason"),
            notes=notes,
        )
    )
