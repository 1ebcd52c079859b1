r"""What a paper reads of a summary: table, macros, and the subsection that answers the reviewer.

Needs nothing beyond ``booktabs`` and ``graphicx``. ``docs/report.md`` says how to ``\input`` it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from healing.latex import Macros, bounds, escape, number, spelled
from healing.pooling import GroupSummary, Summary
from healing.report import comparison_sentence
from healing.stats import Interval
from healing.wording import (
    LOSS,
    RANK,
    VERDICT_NAMES,
    budget,
    context_sentences,
    count_text,
    group_name,
    headline_groups,
    shown_label,
    verdict_reason,
    verdict_text,
)

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
        "Verdict": VERDICT_NAMES.get(group.verdict, group.verdict),
        "VerdictLoss": VERDICT_NAMES.get(group.verdict_loss, group.verdict_loss),
        "Sentence": escape(verdict_text(group, summary.groups)),
        "Checkpoints": str(group.n_checkpoints),
        "Runs": str(group.n_runs),
        "Undefined": str(group.n_undefined),
        "Lockouts": str(group.n_lockout),
        "Steps": "undefined" if steps is None else str(steps),
    }
    for endpoint, interval in group.intervals.items():
        values |= _estimate(_endpoint(endpoint), interval)
    for endpoint, interval in group.half_recovery.items():
        name = f"Half{_endpoint(endpoint)}Steps"
        values |= {name: number(interval.point), f"{name}Interval": bounds(interval)}
    for endpoint, found in group.approaches.items():
        name = _endpoint(endpoint)
        fits = {"Asymptote": found.asymptote, "HalfLife": found.half_life}
        for key, interval in fits.items():
            missing = found.n_checkpoints > 0 and not found.converged
            values[f"{name}{key}"] = "not converged" if missing else number(interval.point)
            values[f"{name}{key}Interval"] = "not converged" if missing else bounds(interval)
    for endpoint, plan in group.plans.items():
        needed = "out of reach" if plan.n_checkpoints is None else str(plan.n_checkpoints)
        values[f"{_endpoint(endpoint)}CheckpointsNeeded"] = needed
    return values


def _endpoint(name: str) -> str:
    """``rank_recovery_pct`` → ``Rank``, ``ppl_improvement_pct`` → ``PplImprovement``."""
    return spelled(name.removesuffix("_pct").replace("_recovery", ""))


def group_stem(group: GroupSummary, groups: Sequence[GroupSummary]) -> str:
    """Model and arm in letters, with the settings' hash where an arm has several settings."""
    label = shown_label(group, groups)
    settings = label.rpartition(" #")[2] if " #" in label else ""
    return spelled(group.model) + spelled(group.arm) + spelled(settings)


def macros(summary: Summary) -> Macros:
    """Every number, interval and verdict sentence of a summary."""
    found = Macros()
    common = {
        "Confidence": rf"{100 * summary.confidence:g}\,\%",
        "FailedRuns": str(len(summary.failed)),
        "UndefinedRuns": str(len(summary.undefined)),
    }
    found.add("", common)
    for group in summary.groups:
        found.add(group_stem(group, summary.groups), _group_values(group, summary))
    for key, comparison in summary.comparisons.items():
        values = {
            "Statement": comparison.statement,
            "Sentence": escape(comparison_sentence(key, summary)),
        }
        for endpoint in comparison.endpoints:
            values |= _estimate(_endpoint(endpoint.endpoint), endpoint.superiority.interval)
        found.add(f"{spelled(key)}HaepMinusNoise", values)
    for arm, slope in summary.slopes.items():
        found.add(f"Scaling{spelled(arm)}", _estimate("Slope", slope.slope))
    return found


def macros_file(summary: Summary) -> str:
    """``recovery_macros.tex``; reading it twice is harmless."""
    lines = [
        rf"\newcommand{{\{name}}}{{{value}}}" for name, value in macros(summary).values.items()
    ]
    guard = "\\ifdefined\\RecoveryMacrosRead\\endinput\\fi\n\\newcommand{\\RecoveryMacrosRead}{}\n"
    return NOTICE + guard + "\n".join(lines) + "\n"


def _row(group: GroupSummary, summary: Summary) -> str:
    cells = [
        escape(group.model),
        escape(shown_label(group, summary.groups)),
        f"{group.n_checkpoints} ({group.n_runs})",
        *(_table_estimate(group.intervals[endpoint]) for endpoint in (RANK, LOSS)),
        VERDICT_NAMES.get(group.verdict, group.verdict).lower(),
    ]
    return " & ".join(cells) + r" \\"


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
    body = "\n".join(rows) or r"\multicolumn{6}{c}{no finished runs} \\"
    level = rf"{100 * summary.confidence:g}\,\%"
    return NOTICE + _TABLE.format(level=level, failed=failed_sentence(summary), body=body)


_TABLE = r"""\begin{{table*}}[t]
\centering
\caption{{Recovery of collapsed models under clean fine-tuning: mean over checkpoints with its
{level} Student $t$ interval. $n$ counts checkpoints: collapsed states, whose replicates are
averaged first. The verdict is read from the interval of rank recovery.{failed}}}
\label{{tab:recovery}}
\footnotesize
\setlength{{\tabcolsep}}{{3pt}}
\begin{{tabular}}{{@{{}}llclll@{{}}}}
\toprule
Model & Arm & $n$ (runs) & Rank (\%) & Loss (\%) & Verdict \\
\midrule
{body}
\bottomrule
\end{{tabular}}
\end{{table*}}
"""


def failed_sentence(summary: Summary) -> str:
    """`` 2 runs failed and are not included.``; empty where none did."""
    failed = len(summary.failed)
    verb = "is" if failed == 1 else "are"
    return f" {count_text(failed, 'run')} failed and {verb} not included." if failed else ""


CLAIMS = {
    "irreversible pathology": (
        r"The collapse meets our criterion of an \emph{Irreversible Pathology} within this budget"
    ),
    "acute structural failure": (
        r"The collapse is an \emph{Acute Structural Failure}: it heals, and the claim of an "
        r"irreversible state is not supported"
    ),
    "partial": (
        r"Recovery is \emph{partial}: the collapse is neither irreversible within this budget nor "
        r"does it heal"
    ),
    "inconclusive": (
        r"The data are \emph{inconclusive}: neither irreversibility nor healing is established"
    ),
    "undefined": (
        r"Rank recovery is \emph{undefined}, so that nothing can be said about irreversibility"
    ),
}


def _claim(group: GroupSummary, summary: Summary) -> str:
    """A paragraph on one group, worded by its verdict."""
    claim = CLAIMS.get(group.verdict, CLAIMS["inconclusive"])
    rest = escape(" ".join([f"{verdict_reason(group)}.", *context_sentences(group)]))
    return rf"\paragraph{{{escape(group_name(group, summary.groups))}.}} {claim}: {rest}"


def _others(summary: Summary, shown: Sequence[GroupSummary]) -> Iterable[str]:
    """One sentence per group that is not the question's own."""
    for group in summary.groups:
        if group not in shown:
            name = VERDICT_NAMES.get(group.verdict, group.verdict).lower()
            label = group_name(group, summary.groups)
            yield escape(f"{label}: {name} ({verdict_reason(group)}).")


def _limits(summary: Summary) -> str:
    """What the numbers do not say."""
    steps = sorted({s for g in summary.groups if (s := budget(g)) is not None})
    span = "the steps trained here" if not steps else count_text(steps[-1], "healing step")
    if len(steps) > 1:
        span = f"{steps[0]} to {steps[-1]} healing steps"
    text = (
        f"All statements hold within the budget of {span} and for the probe text used; a longer "
        "or different fine-tuning may recover more. An upper bound under 20 % after this budget "
        "does not show that the collapsed state is a stable minimum: that takes its gradient, "
        "curvature and barrier."
    )
    n = len(summary.undefined)
    if n:
        text += (
            f" {count_text(n, 'run')} {'has' if n == 1 else 'have'} no defined rank recovery, "
            "because the rank was not finite or changed by less than can be told from none."
        )
    return escape(text + failed_sentence(summary))


_QUESTION = r"""Does a collapsed model heal if it is fine-tuned on clean text, and does it do so
otherwise than a model hurt by noise? We follow the effective rank of the hidden states and the loss
on held-out text (Figure~\ref{fig:recovery}, Table~\ref{tab:recovery}) and read a verdict from the
\RecoveryConfidence{} interval of mean rank recovery over independent checkpoints:
\emph{Irreversible Pathology} where its upper bound lies under 20\,\%, \emph{Acute Structural
Failure} where its lower bound lies over 70\,\%, \emph{partial} where the whole interval lies
between, \emph{inconclusive} otherwise.
"""
_FIGURE = r"""\begin{figure}[t]
\centering
\includegraphics{\RecoveryPath fig_recovery}
\caption{Recovery under clean fine-tuning of rank (left) and loss (right): mean over checkpoints
and its \RecoveryConfidence{} interval. 0\,\% is the collapsed state, 100\,\% (dotted) the healthy
model; grey: the zone of partial recovery, 20 to 70\,\%.}
\label{fig:recovery}
\end{figure}
"""


def subsection_file(summary: Summary) -> str:
    """``addressing_irreversibility.tex``: the subsection, with figure and table."""
    lines = [NOTICE + PATH + r"\input{\RecoveryPath recovery_macros}", ""]
    lines += [r"\subsection{Addressing Irreversibility}", r"\label{sec:addressing-irreversibility}"]
    if not summary.groups:
        nothing = "No healing run finished, so that nothing can be said."
        return "\n".join([*lines, nothing + failed_sentence(summary), ""])
    lines += [_QUESTION, _FIGURE, r"\input{\RecoveryPath recovery_table}", ""]
    shown = headline_groups(summary)
    for group in shown:
        lines += [_claim(group, summary), ""]
    others = list(_others(summary, shown))
    if others:
        lines += [r"\paragraph{Controls.} " + " ".join(others), ""]
    if summary.comparisons:
        said = " ".join(escape(comparison_sentence(m, summary)) for m in summary.comparisons)
        # Intervals do not part at a line's end: let the spaces between them stretch.
        lines += [
            r"{\emergencystretch=3em",
            r"\paragraph{HAEP against noise.} " + said,
            r"\par}",
            "",
        ]
    lines += [r"\paragraph{Limits.} " + _limits(summary), ""]
    return "\n".join(lines)
