"""LaTeX: escaping, macro names, and a real compiler over every kind of summary."""

from __future__ import annotations

import math
import pathlib
import re
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from healing.reporting.latex import Macros, bounds, escape, number, spell_out
from healing.reporting.paper import macros, macros_file, subsection_file, table_file
from healing.stages.summarize import write_summary
from healing.statistics.intervals import Interval
from tests.summaries import (
    NASTY,
    degenerate,
    eventful,
    nasty,
    pool,
    realistic,
    simulated_run,
)

PDFLATEX, PDFTOTEXT = shutil.which("pdflatex"), shutil.which("pdftotext")


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("50 % of a_b & c#1", r"50\,\% of a\_b \& c\#1"),
        ("$x^2$ {a} ~ \\n", r"\$x\textasciicircum{}2\$ \{a\} \textasciitilde{} \textbackslash{}n"),
        ("[1.3, -5.0]", r"{[}1.3, \ensuremath{-}5.0{]}"),
        ("a--b ''c''", "a-{}-b '{}'c'{}'"),
        ("“ça naïf”, Łódź", '``\\c{c}a na\\"{\\i{}}f\'\', {[}U+0141{]}\\\'{o}d\\\'{z}'),
        ("模 – ∞ ± −1", r"{[}U+6A21{]} -- \ensuremath{\infty} \ensuremath{\pm} \ensuremath{-}1"),
        ("two\n lines", "two lines"),
    ],
)  # fmt: skip
def test_escaping(text, source) -> None:
    assert escape(text) == source


@given(st.text())
def test_whatever_the_text_the_source_is_ascii_with_balanced_braces(text) -> None:
    source = escape(text)
    assert source.isascii()
    assert "\n" not in source
    bare = re.sub(r"\\[{}]", "", source.replace("\\\\", ""))
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0
    assert not re.search(r"(?<!\\)[%$&#_]", source)


def test_numbers() -> None:
    assert (number(18.46), number(-6.06), number(-0.04)) == ("18.5", r"\ensuremath{-}6.1", "0.0")
    assert number(math.nan) == "undefined"
    assert number(-math.inf) == r"\ensuremath{-}\ensuremath{\infty}"
    assert bounds(Interval(1.26, 18.5, 35.8, 3, "t")) == "[1.3, 35.8]"
    assert bounds(Interval(math.nan, 18.5, math.nan, 2, "t")) == "[no interval]"
    assert bounds(Interval(math.nan, math.nan, math.nan, 0, "t")) == "undefined"


@pytest.mark.parametrize(
    ("name", "letters"),
    [
        ("nano", "Nano"), ("410m", "FourOneZeroM"), ("1.4b", "OnePointFourB"), ("14b", "OneFourB"),
        ("gaussian_noise", "GaussianNoise"), ("a-b", "AB"), ("é", "UENine"), ("", ""),
        ("haep #a1f", "HaepAOneF"),
    ],
)  # fmt: skip
def test_spelled_names(name, letters) -> None:
    assert spell_out(name).lower() == letters.lower()


@given(st.text())
def test_macro_names_are_letters(name) -> None:
    assert re.fullmatch("[A-Za-z]*", spell_out(name))


def test_blocks_of_macros_never_meet() -> None:
    found = Macros()
    assert found.add("AB", {"Rank": "1", "RankInterval": "2"}) == "RecoveryAB"
    assert found.add("AB", {"Rank": "3", "RankInterval": "4"}) == "RecoveryABTwo"
    # "ABRank" + "Interval" is the name that "AB" + "RankInterval" has.
    assert found.add("ABRank", {"Interval": "5"}) == "RecoveryABRankTwo"
    assert found.add("AB", {"Rank": "6"}) == "RecoveryABThree"
    assert sorted(found.values.values()) == ["1", "2", "3", "4", "5", "6"]


def test_macros_hold_the_numbers_of_the_summary() -> None:
    summary = realistic(seeds=8)
    values = macros(summary).values
    group = next(g for g in summary.groups if (g.model, g.arm) == ("nano", "haep"))
    rank = group.intervals["rank_recovery_pct"]
    assert values["RecoveryNanoHaepRank"] == f"{rank.point:.1f}"
    assert values["RecoveryNanoHaepRankInterval"] == f"[{rank.low:.1f}, {rank.high:.1f}]"
    assert values["RecoveryNanoHaepVerdict"] == "rank recovered in part within 60 steps"
    assert values["RecoveryNanoHaepEndpoint"] == "partial"
    assert values["RecoveryNanoHaepSteps"] == "60"
    assert values["RecoveryMicroGaussianNoiseRank"] == "undefined"
    assert values["RecoveryNanoSpectralRankAsymptote"] == "not determined by this budget"
    loss = summary.contrast("nano", "gaussian_noise").comparison.endpoints[1].superiority.interval
    assert values["RecoveryNanoHaepMinusNoiseLoss"] == f"{loss.point:.1f}"
    assert values["RecoveryConfidence"] == r"95\,\%"
    assert values["RecoveryFailedRuns"] == "1"
    three = macros(realistic(("nano", "micro", "70m"))).values
    assert "RecoveryScalingHaepSlopeInterval" in three


def test_n_in_the_paper_is_what_the_interval_rests_on() -> None:
    summary = eventful()
    group = next(g for g in summary.groups if (g.model, g.arm) == ("nano", "haep"))
    values = {k.removeprefix("RecoveryNanoHaep"): v for k, v in macros(summary).values.items()}
    assert group.intervals["rank_recovery_pct"].n == 9
    assert (values["RankN"], values["RankUndefinedCheckpoints"]) == ("9", "1")
    assert (values["LossN"], values["LossUndefinedCheckpoints"]) == ("10", "0")
    assert (values["Checkpoints"], values["Runs"], values["UndefinedRuns"]) == ("10", "20", "3")
    row = next(line for line in table_file(summary).splitlines() if line.startswith("nano & HAEP"))
    assert re.search(r"& 20 & 54\.7 \[51\.9, 57\.5\] & 9 \(1\) & 87\.2 \[.*\] & 10 &", row)
    assert "n = 9, 1 checkpoint undefined" in values["Sentence"].replace("~", " ")
    assert "in brackets those whose" in table_file(summary)


def test_pace_variance_bootstrap_and_tokens_have_macros() -> None:
    summary = eventful()
    values = macros(summary).values
    group = next(g for g in summary.groups if (g.model, g.arm) == ("nano", "haep"))
    test = summary.contrast("nano", "gaussian_noise").half_recovery_test["loss_recovery_pct"]
    half = group.half_recovery["rank_recovery_pct"].point
    assert values["RecoveryNanoHaepMinusNoiseLossLogRankP"] == f"{test.p_value:.3f}"
    assert values["RecoveryNanoHaepMinusNoiseLossLogRankZ"].endswith(f"{abs(test.statistic):.2f}")
    assert values["RecoveryMicroHaepMinusNoiseRankLogRankP"] == "undefined"
    assert values["RecoveryNanoHaepLossIcc"] == f"{group.variance['loss_recovery_pct'].icc:.2f}"
    assert values["RecoveryNanoHaepHalfRankTokens"] == f"{1024 * half:.0f}"
    bca = group.bootstrap["loss_recovery_pct"]
    assert values["RecoveryNanoHaepLossBca"] == f"[{bca.low:.1f}, {bca.high:.1f}]"
    assert "RecoveryNanoHaepRankBca" not in values  # nine defined checkpoints
    assert "log-rank test" in subsection_file(summary)
    assert (values["RecoveryRunningRuns"], values["RecoveryRepeatedRuns"]) == ("1", "1")
    for text in (table_file(summary), subsection_file(summary)):
        assert "1 run has not ended (or was killed) and is not included." in text
        assert "1 run repeats another with the same fingerprint and is not counted." in text


def test_planned_checkpoints_have_a_macro() -> None:
    rng = np.random.default_rng(4)
    summary = pool([simulated_run(rng, "nano", "haep", s, 0.0, 80.0) for s in range(5)])
    plan = summary.groups[0].plans["rank_recovery_pct"]
    assert macros(summary).values["RecoveryNanoHaepRankCheckpointsNeeded"] == str(
        plan.n_checkpoints
    )


def test_every_group_has_its_own_macros() -> None:
    summary = nasty()
    names = re.findall(r"\\newcommand\{\\([^}]*)\}", macros_file(summary))
    assert len(names) == len(set(names))
    assert all(name.isalpha() and name.isascii() for name in names)
    assert sum(name.endswith("EndpointLoss") for name in names) == len(summary.groups)


@pytest.mark.parametrize(
    ("rank", "wording"),
    [
        (0.0, r"\emph{Not recovered within 60 steps by this healer}: mean"),
        (92.0, r"\emph{Healed within 60 steps, rank and knowledge}: mean"),
        (45.0, r"\emph{Rank recovered in part within 60 steps}: mean"),
        (20.0, r"\emph{Undecided after 60 steps}: mean"),
        (math.nan, r"\emph{Rank recovery undefined}: "),
    ],
)
def test_the_subsection_is_worded_by_verdict(rank, wording) -> None:
    rng = np.random.default_rng(4)
    source = subsection_file(
        pool([simulated_run(rng, "nano", "haep", s, rank, 92.0) for s in range(20)])
    )
    assert r"\subsection{Addressing Irreversibility}" in source
    assert source.count(r"\emph{") == 7  # six in the introduction, one claim
    assert wording in source
    assert "within the budget of 60 healing steps" in source
    assert ("20 runs have no defined rank recovery" in source) == math.isnan(rank)


def test_the_subsection_names_noise_controls_and_failures() -> None:
    source = subsection_file(realistic())
    assert r"\paragraph{Secondary: HAEP against harm by other means.}" in source
    assert r"\paragraph{Controls.} nano, Gaussian noise: undefined" in source
    assert "1 run failed and is not included." in source
    assert "1 run failed and is not included." in table_file(realistic())


ARTICLE = r"""\documentclass{article}
\usepackage{booktabs}
\usepackage{graphicx}
%s
\begin{document}
\section{Discussion}
\input{%saddressing_irreversibility}
\input{%srecovery_macros}
Failed: \RecoveryFailedRuns.
\end{document}
"""

needs_latex = pytest.mark.skipif(
    PDFLATEX is None,
    reason="no pdflatex: apt-get install --no-install-recommends texlive-latex-recommended",
)


def compile_article(folder: pathlib.Path, prefix: str = "") -> tuple[str, str]:
    """Log and text of an article that reads all files (text empty without pdftotext)."""
    path = rf"\newcommand{{\RecoveryPath}}{{{prefix}}}" if prefix else ""
    (folder / "main.tex").write_text(ARTICLE % (path, prefix, prefix))
    for _ in range(2):  # references resolve_from_checkpoint in the second pass
        done = subprocess.run(
            [str(PDFLATEX), "-interaction=nonstopmode", "-halt-on-error", "main.tex"],
            cwd=folder, capture_output=True, timeout=120, check=False,
        )  # fmt: skip
        log = (folder / "main.log").read_text(encoding="latin-1")
        assert done.returncode == 0, log[-3000:]
    if PDFTOTEXT is None:
        return log, ""
    done = subprocess.run([PDFTOTEXT, "main.pdf", "-"], cwd=folder, capture_output=True, check=True)
    return log, done.stdout.decode()


def assert_clean(log: str) -> None:
    for problem in ("Undefined control sequence", "not found", "undefined references",
                    "multiply defined", "Missing character"):  # fmt: skip
        assert problem not in log, log[-3000:]


@needs_latex
def test_a_realistic_summary_compiles_beautifully(tmp_path) -> None:
    write_summary(tmp_path, realistic(("nano", "micro", "70m"), 24))
    log, text = compile_article(tmp_path, "paper/")
    assert_clean(log)
    assert "Overfull" not in log
    assert (tmp_path / "main.pdf").stat().st_size > 20_000
    if text:
        flat = " ".join(text.split())
        for said in ("Addressing Irreversibility", "Not recovered within 60 steps", "Table 1",
                     "Figure 1", "Healed within 60 steps", "Failed: 1."):  # fmt: skip
            assert said in flat


@needs_latex
@pytest.mark.parametrize("name", ["nasty", "eventful", *degenerate()])
def test_every_summary_compiles(tmp_path, name) -> None:
    made = {"nasty": nasty, "eventful": eventful}
    write_summary(tmp_path, made[name]() if name in made else degenerate()[name])
    log, text = compile_article(tmp_path / "paper")
    assert_clean(log)
    if text and name == "nasty":
        assert "[U+6A21]" in text
        assert "</style> | x" in " ".join(text.split())
    assert NASTY  # the names above


@needs_latex
def test_the_compiler_would_notice(tmp_path) -> None:
    write_summary(tmp_path, degenerate()["nothing"])
    table = tmp_path / "paper" / "addressing_irreversibility.tex"
    table.write_text(table.read_text() + r"\RecoveryNoSuchNumber")
    with pytest.raises(AssertionError, match="Undefined control sequence"):
        compile_article(tmp_path / "paper")
