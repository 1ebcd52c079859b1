"""A summary as Markdown for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from healing.reporting.cautions import caution_table
from healing.reporting.contrasts import TITLE, comparison_gaps, lead_sentences, sections
from healing.reporting.damage_regression import TITLE as DAMAGE_TITLE
from healing.reporting.damage_regression import damage_sentences
from healing.reporting.escaping import markdown as escape
from healing.reporting.phrases import RANK, count_text, group_name, headline_groups, interval_text
from healing.reporting.tables import Table, main_table, secondary_tables
from healing.reporting.verdict_context import (
    context_sentences,
    healer_note,
    lead_sentence,
    multiplicity_sentence,
    unjudged_note,
)
from healing.reporting.verdict_sentences import verdict_claim, verdict_heading, verdict_reason
from healing.statistics.heal_runs import HealRun
from healing.statistics.summary import Summary

RUNNING_NOTE = (
    "The store does not say that these have ended: they are still running, or were killed so hard "
    "that nothing could be stored any more (MLflow keeps such a run RUNNING until a sweep ends it, "
    "minutes after it was last heard of). They are not counted."
)
MOST_IN_OPENING = 3
"""Lines that a folded description shows, with the head of the figure."""
REPEATS_NOTE = (
    "Equal fingerprint: equal configuration, weights, texts and code. The newest finished run of "
    "each counts, the others are no replicates."
)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(map(escape, cells))} |"


def _section(table: Table) -> list[str]:
    divider = f"|{'---|' * len(table.header)}"
    rows = [_row(row) for row in table.rows]
    return [f"## {table.title}", "", _row(table.header), divider, *rows, "", table.note, ""]


def _bullets(sentences: Iterable[str]) -> list[str]:
    return [f"- {escape(sentence)}" for sentence in sentences]


def _listing(title: str, runs: Sequence[tuple[HealRun, str]], note: str = "") -> list[str]:
    if not runs:
        return []
    lines = _bullets(f"{r.name} ({r.run_id}){': ' if why else ''}{why}" for r, why in runs)
    return [f"## {title} ({len(runs)})", "", *([note, ""] if note else []), *lines, ""]


def opening(summary: Summary) -> str:
    """What came out of the first groups that the question is about, a line each: what a run's page
    begins with.
    """
    groups = headline_groups(summary)
    lines = [
        f"**{escape(group_name(g, summary.groups))}**: {escape(verdict_claim(g))}; rank recovery "
        f"{escape(interval_text(g.intervals[RANK]))} %."
        for g in groups[:MOST_IN_OPENING]
    ]
    if more := len(groups) - len(lines):
        lines.append(f"{count_text(more, 'more group')} below.")
    return "\n\n".join(lines)


def markdown(summary: Summary) -> str:
    """The summary for people (``summary.md``)."""
    lines = ["# Recovery summary", ""]
    if lead := lead_sentence(summary):
        lines += [escape(lead), ""]
    for g in headline_groups(summary):
        lines += _bullets([f"{verdict_heading(g, summary.groups)}: {verdict_reason(g)}."])
        lines += [f"  {line}" for line in _bullets(context_sentences(g))]
    if not summary.groups:
        lines += ["No finished runs: nothing can be said."]
    beside = multiplicity_sentence(summary), escape(unjudged_note(summary)), healer_note(summary)
    for note in filter(None, beside):
        lines += ["", note]
    lines += ["", *_section(main_table(summary))[2:]]
    lines += [
        "Intervals are Student t over checkpoint means (replicates averaged first), with the error "
        "of measurement where it is known; none is given under three checkpoints. *n* counts the "
        "checkpoints that an interval rests on; those whose recovery is undefined are stated "
        "beside it. Recovery is unclamped: below 0 % the model moved away from the healthy value, "
        "above 100 % it went past it.",
        "",
    ]
    lines += _contrasts(summary)
    if said := damage_sentences(summary):
        lines += [f"## {DAMAGE_TITLE}", "", *_bullets(said), ""]
    if summary.slopes:
        slopes = _bullets(
            f"{arm}: {interval_text(slope.slope)} points per tenfold parameters"
            for arm, slope in summary.slopes.items()
        )
        lines += ["## Scaling with size", "", *slopes, ""]
    for table in secondary_tables(summary):
        lines += _section(table)
    lines += _listing("Failed runs", [(r, r.failure) for r in summary.failed])
    lines += _listing("Still running", [(r, r.heard) for r in summary.running], RUNNING_NOTE)
    lines += _listing("Repeated runs", [(r.run, r.why) for r in summary.repeats], REPEATS_NOTE)
    undefined = [(r, r.undefined_reason) for r in summary.undefined]
    lines += _listing("Runs without a defined rank recovery", undefined)
    cautions = caution_table(summary)
    if cautions.rows:
        lines += _section(cautions)
    return "\n".join(lines)


def _contrasts(summary: Summary) -> list[str]:
    """The planned contrasts, the answer to the primary question first."""
    lead, gaps = lead_sentences(summary), comparison_gaps(summary)
    if not lead and not gaps:
        return []
    lines = [f"## {TITLE}", ""]
    for sentence in lead:
        lines += [escape(sentence), ""]
    for heading, sentences in sections(summary):
        lines += [f"### {escape(heading)}", "", *_bullets(sentences), ""]
    return [*lines, *_bullets(gaps), ""] if gaps else lines
