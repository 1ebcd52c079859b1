r"""What a paper reads of a summary: table, macros, and the subsection that answers the reviewer.

Needs nothing beyond ``booktabs`` and ``graphicx``. ``docs/report.md`` says how to ``\input`` it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from healing.measurements.recovery import IRREVERSIBLE_BELOW, REVERSIBLE_ABOVE, Verdict
from healing.registry import DAMAGE_CONTROL
from healing.reporting.contrasts import (
    catalyst_sentence,
    comparison_gaps,
    comparison_sentence,
    half_recovery_sentence,
    lead_sentences,
    sections,
    unfinished_sentences,
)
from healing.reporting.latex import Macros, bounds, escape, number, spell_out
from healing.reporting.phrases import (
    LOSS,
    RANK,
    budget,
    count_text,
    group_estimate,
    group_name,
    headline_groups,
    shown_label,
)
from healing.reporting.verdict_context import (
    context_sentences,
    lead_sentence,
    multiplicity_sentence,
    verdict_text,
)
from healing.reporting.verdict_sentences import (
    verdict_cell,
    verdict_claim,
    verdict_reason,
)
from healing.statistics.budgets import MAX_LAST_GAIN, MIN_BUDGETS
from healing.statistics.contrasts.plan import Contrast
from healing.statistics.fits.asymptotes import NOT_DETERMINED
from healing.statistics.group import GroupSummary
from healing.statistics.intervals import Interval
from healing.statistics.summary import Summary

NOTICE = "% Made by the summarize entry point; edits are lost. Packages: booktabs, graphicx.\n"
PATH = r"""% Where these files lie, if not beside the document; before the \input:
%   \newcommand{\RecoveryPath}{recovery/}
\providecommand{\RecoveryPath}{}
"""


def _estimate(prefix: str, interval: Interval) -> dict[str, str]:
    return {prefix: number(interval.point), f"{prefix}Interval": bounds(interval)}


def _group_values(group: GroupSummary, summary: Summary) -> dict[str, str]:
    steps = budget(group)
    values = {
        "Verdict": escape(verdict_claim(group)),
        "Endpoint": str(group.verdict),
        "EndpointLoss": str(group.verdict_loss),
        "Sentence": escape(verdict_text(group, summary.groups)),
        "Checkpoints": str(group.n_checkpoints),
        "Runs": str(group.n_runs),
        "UndefinedRuns": str(group.n_undefined),
        "Lockouts": str(group.n_lockout),
        "Steps": "undefined" if steps is None else str(steps),
        "TokensPerStep": str(group.tokens_per_step or "unknown"),
    }
    for endpoint, interval in group.intervals.items():
        name = _endpoint(endpoint)
        values |= _estimate(name, interval) | {f"{name}N": str(interval.n)}
        values[f"{name}UndefinedCheckpoints"] = str(group.undefined_checkpoints(endpoint))
        bca = group.bootstrap.get(endpoint)
        if bca is not None and bca.defined:
            values[f"{name}Bca"] = bounds(bca)
    for endpoint, interval in group.half_recovery.items():
        values |= _half_values(_endpoint(endpoint), "Steps", interval)
        tokens = group.half_recovery_tokens.get(endpoint)
        if tokens:
            values |= _half_values(_endpoint(endpoint), "Tokens", tokens)
    return values | _fit_values(group)


def _half_values(endpoint: str, unit: str, interval: Interval) -> dict[str, str]:
    digits = 1 if unit == "Steps" else 0
    name = f"Half{endpoint}{unit}"
    return {name: number(interval.point, digits), f"{name}Interval": bounds(interval, digits)}


def _fit_values(group: GroupSummary) -> dict[str, str]:
    """Variance components, fitted limits and what would decide."""
    values = {}
    for endpoint, variance in group.variance.items():
        name = _endpoint(endpoint)
        values[f"{name}VarianceBetween"] = number(variance.between)
        values[f"{name}VarianceWithin"] = number(variance.within)
        values[f"{name}Icc"] = number(variance.icc, 2)
    for endpoint, found in group.asymptotes.items():
        name = _endpoint(endpoint)
        fits = {"Asymptote": found.asymptote, "HalfLife": found.half_life}
        for key, interval in fits.items():
            missing = found.n_checkpoints > 0 and not found.converged
            values[f"{name}{key}"] = NOT_DETERMINED if missing else number(interval.point)
            values[f"{name}{key}Interval"] = NOT_DETERMINED if missing else bounds(interval)
    for endpoint, plan in group.plans.items():
        needed = "out of reach" if plan.n_checkpoints is None else str(plan.n_checkpoints)
        values[f"{_endpoint(endpoint)}CheckpointsNeeded"] = needed
    return values


def _contrast_values(found: Contrast) -> dict[str, str]:
    values = {
        "Kind": found.pair.kind.rank,
        "Statement": found.comparison.statement,
        "Sentence": escape(comparison_sentence(found)),
        "PaceSentence": escape(half_recovery_sentence(found)),
    }
    for endpoint in found.comparison.endpoints:
        name, interval = _endpoint(endpoint.endpoint), endpoint.superiority.interval
        values |= _estimate(name, interval)
        values |= {f"{name}Pairs": str(interval.n), f"{name}P": number(endpoint.p_adjusted, 3)}
        values |= {
            f"{name}AlikeP": number(endpoint.p_alike_adjusted, 3),
            f"{name}PairsLess": str(endpoint.n_less),
            f"{name}PairsMore": str(endpoint.n_more),
            f"{name}PairsNeeded": _count(found.needed[endpoint.endpoint].alike),
        }
    for key, test in found.half_recovery_test.items():
        name = f"{_endpoint(key)}LogRank"
        values |= {f"{name}Z": number(test.statistic, 2), f"{name}P": number(test.p_value, 3)}
    return values


def _count(n: int | None) -> str:
    return "undefined" if n is None else str(n)


def _control_name(found: Contrast) -> str:
    """A control in a macro's name: secondary ones by their shortest name, others by their arm."""
    pair = found.pair
    return spell_out(pair.short if pair.kind.role == DAMAGE_CONTROL else pair.control.arm)


def _endpoint(name: str) -> str:
    """``rank_recovery_pct`` → ``Rank``, ``ppl_improvement_pct`` → ``PplImprovement``."""
    return spell_out(name.removesuffix("_pct").replace("_recovery", ""))


def group_stem(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """Model and arm in letters, with the settings' hash where an arm has several settings."""
    label = shown_label(group, groups)
    settings = label.rpartition(" #")[2] if " #" in label else ""
    return spell_out(group.model) + spell_out(group.arm) + spell_out(settings)


def macros(summary: Summary) -> Macros:
    """Every number, interval and verdict sentence of a summary."""
    found = Macros()
    common = {
        "Confidence": rf"{100 * summary.confidence:g}\,\%",
        "FailedRuns": str(len(summary.failed)),
        "RunningRuns": str(len(summary.running)),
        "RepeatedRuns": str(len(summary.repeats)),
        "UndefinedRuns": str(len(summary.undefined)),
    }
    found.add("", common)
    for group in summary.groups:
        found.add(group_stem(group, summary.groups), _group_values(group, summary))
    for own in summary.contrasts:
        stem = f"{spell_out(own.pair.model)}{spell_out(own.pair.treatment.arm)}"
        found.add(f"{stem}Minus{_control_name(own)}", _contrast_values(own))
    for answer in summary.catalyst:
        stem = f"{spell_out(answer.pair.model)}{spell_out(answer.pair.treatment.arm)}Catalyst"
        said = {"Sentence": escape(catalyst_sentence(answer)), "Healing": str(answer.healing)}
        found.add(stem, said)
    for arm, slope in summary.slopes.items():
        found.add(f"Scaling{spell_out(arm)}", _estimate("Slope", slope.slope))
    return found


def macros_file(summary: Summary) -> str:
    """``recovery_macros.tex``; reading it twice is harmless."""
    lines = [
        rf"\newcommand{{\{name}}}{{{value}}}" for name, value in macros(summary).values.items()
    ]
    guard = "\\ifdefined\\RecoveryMacrosRead\\endinput\\fi\n\\newcommand{\\RecoveryMacrosRead}{}\n"
    return NOTICE + guard + "\n".join(lines) + "\n"


def _row(group: GroupSummary, summary: Summary) -> str:
    cells = [escape(group.model), escape(shown_label(group, summary.groups)), str(group.n_runs)]
    for endpoint in (RANK, LOSS):
        interval, undefined = group.intervals[endpoint], group.undefined_checkpoints(endpoint)
        cells += [
            _table_estimate(interval),
            f"{interval.n} ({undefined})" if undefined else f"{interval.n}",
        ]
    cells.append(r"\raggedright " + escape(verdict_cell(group)))
    return " & ".join(cells) + r" \tabularnewline"


def _table_estimate(interval: Interval) -> str:
    if math.isnan(interval.point):
        return "undefined"
    return f"{number(interval.point)} {bounds(interval)}"


def table_file(summary: Summary) -> str:
    """``recovery_table.tex``: a float as wide as the page, with caption and label."""
    rows: list[str] = []
    for number_, group in enumerate(summary.groups):
        if number_ and group.model != summary.groups[number_ - 1].model:
            rows.append(r"\addlinespace")
        rows.append(_row(group, summary))
    body = "\n".join(rows) or r"\multicolumn{8}{c}{no finished runs} \\"
    level = rf"{100 * summary.confidence:g}\,\%"
    return NOTICE + _TABLE.format(level=level, failed=left_out_sentences(summary), body=body)


_TABLE = r"""\begin{{table*}}[t]
\centering
\caption{{Recovery of collapsed models under clean fine-tuning: mean over checkpoints with its
{level} Student $t$ interval. $n$ counts the checkpoints that the interval rests on: collapsed
states with a defined recovery, whose healing runs are averaged first; in brackets those whose
recovery is undefined. The verdict is on the rank, within this budget and by this healer.{failed}}}
\label{{tab:recovery}}
\vspace{{4pt}}
\footnotesize
\setlength{{\tabcolsep}}{{2.5pt}}
\begin{{tabular}}{{@{{}}llclclcp{{7.6em}}@{{}}}}
\toprule
Model & Arm & Runs & Rank (\%) & $n$ & Loss (\%) & $n$ & Verdict \\
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table*}}
"""


def left_out_sentences(summary: Summary) -> str:
    """`` 2 runs failed and are not included.``, and the like; empty where all runs count."""
    return "".join(f" {escape(sentence)}" for sentence in unfinished_sentences(summary))


def _claim(group: GroupSummary, summary: Summary) -> str:
    """A paragraph on one group, worded by its verdict."""
    claim = escape(verdict_claim(group))
    claim = rf"\emph{{{claim[:1].upper()}{claim[1:]}}}"
    rest = escape(" ".join([f"{verdict_reason(group)}.", *context_sentences(group)]))
    return rf"\paragraph{{{escape(group_name(group, summary.groups))}.}} {claim}: {rest}"


def _others(summary: Summary, shown: Sequence[GroupSummary]) -> Iterable[str]:
    """One sentence per group that is not the question's own."""
    for group in summary.groups:
        if group not in shown:
            name = verdict_cell(group)
            why = f"rank {group_estimate(group, RANK)} %"
            if group.verdict == Verdict.UNDEFINED:
                why = verdict_reason(group)
            yield escape(f"{group_name(group, summary.groups)}: {name} ({why}).")


def _limits(summary: Summary) -> str:
    """What the numbers do not say."""
    steps = sorted({s for g in summary.groups if (s := budget(g)) is not None})
    span = "the steps trained here" if not steps else count_text(steps[-1], "healing step")
    if len(steps) > 1:
        span = f"{steps[0]} to {steps[-1]} healing steps"
    text = (
        f"All statements hold within the budget of {span}, by the healer and for the probe text "
        "used; a longer or different fine-tuning may recover more. A rank that does not come back "
        "within this budget does not show that the collapsed state is a stable minimum: that takes "
        "its gradient, curvature and barrier."
    )
    if several := multiplicity_sentence(summary):
        text += f" {several}"
    n = len(summary.undefined)
    if n:
        text += (
            f" {count_text(n, 'run')} {'has' if n == 1 else 'have'} no defined rank recovery, "
            "because the rank was not finite or its change was below the detection threshold."
        )
    return escape(text) + left_out_sentences(summary)


_QUESTION = r"""Does a collapsed model heal if it is fine-tuned on clean text, and does it do so
otherwise than a model hurt by other means? We follow the effective rank of the hidden states and
the loss on held-out text (Figure~\ref{fig:recovery}, Table~\ref{tab:recovery}). A verdict on the
rank takes the \RecoveryConfidence{} interval of its mean recovery over independent checkpoints
\emph{and} their count: \emph{not recovered} under LOWER\,\%, \emph{over UPPER\,\% recovered},
\emph{in part} between, each only if the mean would still lie there if as many further checkpoints
as the count leaves open did the opposite. \emph{Healed} takes rank and loss. \emph{Irreversible} is
said only after MULTIPLE times the default budget, by the strongest of several healers, by every
measure, and where the last doubling of the budget gained under GAIN points.
"""
_FIGURE = r"""\begin{figure}[t]
\centering
\includegraphics{\RecoveryPath fig_recovery}
\caption{Recovery under clean fine-tuning of rank (left) and loss (right): mean over checkpoints
and its \RecoveryConfidence{} interval. 0\,\% is the collapsed state, 100\,\% (dotted) the healthy
model; grey: the zone of partial recovery, LOWER to UPPER\,\%.}
\label{fig:recovery}
\end{figure}
"""


def _with_bounds(text: str) -> str:
    """A text with the verdict's bounds in it."""
    upper = f"{REVERSIBLE_ABOVE:g}"
    text = text.replace("LOWER", f"{IRREVERSIBLE_BELOW:g}").replace("UPPER", upper)
    return text.replace("MULTIPLE", str(MIN_BUDGETS)).replace("GAIN", f"{MAX_LAST_GAIN:g}")


def subsection_file(summary: Summary) -> str:
    """``addressing_irreversibility.tex``: the subsection, with figure and table."""
    lines = [NOTICE + PATH + r"\input{\RecoveryPath recovery_macros}", ""]
    lines += [r"\subsection{Addressing Irreversibility}", r"\label{sec:addressing-irreversibility}"]
    if not summary.groups:
        nothing = "No healing run finished, so that nothing can be said."
        return "\n".join([*lines, nothing + left_out_sentences(summary), ""])
    lines += [
        _with_bounds(_QUESTION),
        _with_bounds(_FIGURE),
        r"\input{\RecoveryPath recovery_table}",
        "",
    ]
    if lead := lead_sentence(summary):
        lines += [escape(lead), ""]
    shown = headline_groups(summary)
    for group in shown:
        lines += [_claim(group, summary), ""]
    others = list(_others(summary, shown))
    if others:
        lines += [r"\paragraph{Controls.} " + " ".join(others), ""]
    for heading, said in [
        ("Is it the treatment, or any damage?", lead_sentences(summary)),
        *sections(summary),
        ("Not compared", comparison_gaps(summary)),
    ]:
        if said:
            stop = "" if heading.endswith("?") else "."
            # Intervals do not part at a line's end: let the spaces between them stretch.
            lines += [
                r"{\emergencystretch=3em",
                rf"\paragraph{{{escape(heading)}{stop}}} " + " ".join(map(escape, said)),
                r"\par}",
                "",
            ]
    lines += [r"\paragraph{Limits.} " + _limits(summary), ""]
    return "\n".join(lines)
