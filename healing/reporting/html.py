"""A summary as one HTML file that opens offline: styles and figures inside, nothing fetched."""

from __future__ import annotations

import base64
import functools
import math
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jinja2

from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, Verdict
from healing.reporting.cautions import caution_table
from healing.reporting.contrasts import TITLE, comparison_gaps, lead_sentences, sections
from healing.reporting.damage_regression import TITLE as DAMAGE_TITLE
from healing.reporting.damage_regression import damage_sentences
from healing.reporting.markdown import REPEATS_NOTE, RUNNING_NOTE
from healing.reporting.phrases import count_text, headline_groups, interval_text, shown_label
from healing.reporting.tables import (
    Table,
    asymptote_table,
    bootstrap_table,
    budget_table,
    damage_table,
    half_table,
    main_table,
    panel_table,
    plan_table,
    sham_table,
    variance_table,
)
from healing.reporting.verdict_context import (
    context_sentences,
    healer_note,
    lead_sentence,
    multiplicity_sentence,
    unjudged_note,
)
from healing.reporting.verdict_sentences import (
    OUTCOMES,
    budget_text,
    verdict_heading,
    verdict_reason,
)
from healing.statistics.budgets import MAX_LAST_GAIN, MIN_BUDGETS
from healing.statistics.group import GroupSummary
from healing.statistics.heal_runs import HealRun
from healing.statistics.intervals import Interval
from healing.statistics.summary import Summary

CSS_PIXELS_PER_INCH = 96
MAX_WIDTH = 900
"""CSS pixels; figures as wide as the page are shown up to this."""
ZONES = (
    f"Grey: {IRREVERSIBLE_BELOW:g} to {REVERSIBLE_ABOVE:g} %, the zone of partial recovery; "
    "dotted: the healthy value. "
)
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
        "Share of checkpoints in which half of the damage is repaired (one minus the "
        "Kaplan–Meier curve). A vertical tick is a checkpoint whose run ended there before half "
        "was repaired. Lines that coincide are drawn dashed over solid."
    ),
    "contrasts": (
        "Treatment minus control, paired by seed, primary contrasts first: one point per pair, "
        "below them their mean with its unadjusted interval; rank left, loss right. Grey: "
        "differences that count as none. At the right: whether the treatment recovers "
        "more, less or alike."
    ),
    "recovery_against_damage": (
        "Rank recovery after the last step, one point per checkpoint, against how far the attack "
        "went: its distance in weights (left) and the loss at the start of healing (right), by "
        "model. Names stand at the mean of their arm. " + ZONES
    ),
    "recovery_against_parameters": (
        "Mean rank recovery after the last step against the number of parameters, with its "
        "interval; arms are set side by side. A line joins the sizes of an arm only where each "
        "has a single group of settings, since with several it is unknown which belong together. "
        + ZONES
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
    "checkpoints on, with the error of measurement where it is known; n counts the checkpoints "
    "that an interval rests on, those whose recovery is undefined are stated beside it. A finished "
    "run that repeats another (equal fingerprint: configuration, weights, texts, code) is no "
    "replicate and counts once. No outlier is removed; failed, unfinished, repeated and undefined "
    "runs are listed below.",
    "Contrasts are planned and paired by seed. Primary: the treatment against the same fine-tuning "
    "without its idea, and against what its theory alone does; secondary: against harm by other "
    "means. “More”, “less” and “alike within ±10 points” each take Student’s t over the pairs and "
    "their count (Gaffke’s p, which for values of two kinds is Clopper–Pearson: what further pairs "
    "that differ by 100 points the other way would make of the mean), Holm-adjusted over all "
    "models, arms and endpoints, primary and secondary contrasts apart. Half-recovery times are "
    "right-censored at the last measured step and compared by a log-rank test over checkpoints, "
    "positive where the treatment’s damage heals sooner. It is secondary: not paired, "
    "not adjusted, and exact (all splits of the checkpoints) where there are at most 200,000 "
    "splits, so that three and three checkpoints cannot give a p under 0.1.",
    "A verdict on the rank takes its interval and its count of checkpoints: in as many of further "
    "checkpoints as the count leaves open (one-sided Clopper–Pearson bound) the opposite may "
    "happen, and the mean must still lie on the same side. Runs that were damaged and have no "
    "recovery count as not healed against healing, as healed against the contrary. "
    f"“{OUTCOMES[Verdict.IRREVERSIBLE].capitalize()}” (stored as {Verdict.IRREVERSIBLE}) means: "
    "not within this budget, by this healer and this measure; it does not show that the collapsed "
    "state is a stable minimum. “Irreversible” is said only after at least "
    f"{MIN_BUDGETS} times the default tokens, by the strongest of several healers, by every "
    f"measure, and where the last doubling of the budget gained under {MAX_LAST_GAIN:g} points. "
    "“Healed” takes rank and loss, both against the healthy model after the same training where "
    "there is one, and a loss under that of learning from scratch for equal tokens where that was "
    "run: an untrained model has a high rank and knows nothing.",
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
    rank, loss = (_recovered(group.intervals[e]) for e in (_RANK, _LOSS))
    checkpoints = count_text(group.n_checkpoints, "checkpoint")
    return {
        "kind": group.verdict.replace(" ", "-"),
        "heading": verdict_heading(group, groups),
        "asked": f"does {group.model} recover from {shown_label(group, groups)} within "
        f"{budget_text(group)}?",
        "found": f"rank recovery {rank}, loss recovery {loss}",
        "rests_on": f"{checkpoints}, {count_text(group.n_runs, 'healing run')}"
        + (f", {group.healer}" if group.healer else ""),
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


def _recovered(interval: Interval) -> str:
    text = interval_text(interval)
    return text if math.isnan(interval.point) else f"{text} %"


_RANK, _LOSS = "rank_recovery_pct", "loss_recovery_pct"


def _run_rows(runs: Iterable[tuple[HealRun, str]]) -> list[tuple[str, str, str]]:
    return [(run.name, run.run_id, why) for run, why in runs]


def _subtitle(summary: Summary) -> str:
    runs = sum(g.n_runs for g in summary.groups)
    models = count_text(len({g.model for g in summary.groups}), "model")
    left_out = {
        "failed": len(summary.failed),
        "still running": len(summary.running),
        "repeated": len(summary.repeats),
    }
    counts = [f"{n} {what}" for what, n in left_out.items() if n or what == "failed"]
    said = ", ".join([f"{count_text(runs, 'finished healing run')} of {models}", *counts])
    return f"{said}. Intervals: {100 * summary.confidence:g} %."


def _slope_lines(summary: Summary) -> list[str]:
    return [
        f"{summary.label(arm)}: {interval_text(slope.slope)} points per tenfold parameters, "
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
    return _with_contents(
        _environment()
        .get_template("report.html")
        .render(
            title="Recovery report",
            subtitle=_subtitle(summary),
            verdicts=[_verdict(g, groups) for g in headline_groups(summary)],
            contrast_title=TITLE,
            contrast_lead=lead_sentences(summary),
            contrast_sections=sections(summary),
            gaps=comparison_gaps(summary),
            lead=lead_sentence(summary),
            multiplicity=multiplicity_sentence(summary),
            unjudged=unjudged_note(summary),
            groups=_plain(main_table(summary)),
            damage=damage_table(summary),
            damage_title=DAMAGE_TITLE,
            damage_sentences=damage_sentences(summary),
            budgets=budget_table(summary),
            panel=_plain(panel_table(summary)),
            sham=sham_table(summary),
            half=half_table(summary),
            bootstrap=bootstrap_table(summary),
            variance=variance_table(summary),
            prospects=asymptote_table(summary),
            plans=plan_table(summary),
            figures={
                key: embed(path, CAPTIONS[key], _alt(key, summary)) for key, path in figures.items()
            },
            slopes=_slope_lines(summary),
            healer_note=healer_note(summary),
            methods=METHODS,
            failed=_run_rows((r, r.failure) for r in summary.failed),
            running=_run_rows((r, r.heard) for r in summary.running),
            running_note=RUNNING_NOTE,
            repeats=_run_rows((r.run, r.why) for r in summary.repeats),
            repeats_note=REPEATS_NOTE,
            undefined=_run_rows((r, r.undefined_reason) for r in summary.undefined),
            cautions=caution_table(summary),
            contents=CONTENTS,
        )
    )


CONTENTS = "<!-- contents -->"
_SECTION = re.compile(r'<section id="([^"]+)"><h2>(.*?)</h2>')


def _with_contents(page: str) -> str:
    """The page with a list of links to its sections, as it says their titles."""
    items = "".join(f'<li><a href="#{i}">{title}</a></li>' for i, title in _SECTION.findall(page))
    inside = f'<nav aria-label="Contents"><ul>{items}</ul></nav>'
    return page.replace(CONTENTS, inside, 1)


def _plain(table: Table) -> Table:
    """Without Markdown's emphasis in our own note."""
    return replace(table, note=table.note.replace("*", ""))
