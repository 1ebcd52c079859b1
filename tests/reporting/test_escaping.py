"""Hostile names: an independent CommonMark parser must find in them nothing but text."""

from __future__ import annotations

import csv
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from healing.predecessor.summary import LegacyResult, summarize_legacy
from healing.predecessor.summary import markdown as legacy_markdown
from healing.reporting.escaping import csv_cell, markdown, one_line
from healing.reporting.markdown import markdown as summary_markdown
from healing.reporting.plain_data import group_rows
from healing.stages.summarize import write_csv
from tests.summaries import NASTY, eventful, nasty

PARSER = MarkdownIt("commonmark").enable(["table", "strikethrough"])
HOSTILE = (
    *NASTY, "[a]: http://x.invalid", "- x", "1. x", "2) x", "> x", "```", "~~~", "    code",
    "<http://x.invalid>", "&copy;", "a|b", "--- |", "===", "+ x", "\\`x`", "a\x1b[31mb",
    "\u202egnp.exe", "[1, 2](javascript:x)", "x [1, 2](javascript:x)", "x [1, 2][y]", "__a__",
    "***", "![x](y)", "[ ] x", "www.x.invalid a@b.invalid", "[1, 2]: http://x.invalid", "$$x$$",
)  # fmt: skip
PLAIN = {"paragraph_open", "paragraph_close", "inline"}
CELLS = {f"{part}_{end}" for part in ("table", "thead", "tbody", "tr", "th", "td")
         for end in ("open", "close")}  # fmt: skip


def shown(source: str) -> tuple[set[str], str]:
    """Types of all tokens of a document, blocks and inline, and the text that a reader sees."""
    blocks = PARSER.parse(source)
    inline = [child for block in blocks for child in block.children or []]
    return {t.type for t in (*blocks, *inline)}, "".join(t.content for t in inline)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_shown_as_it_is(name) -> None:
    kinds, text = shown(markdown(name))
    assert kinds <= PLAIN | {"text", "text_special"}
    assert text == one_line(name)
    kinds, text = shown(f"| a |\n|---|\n| {markdown(name)} |")
    assert kinds <= CELLS | {"inline", "text", "text_special"}
    assert text == "a" + one_line(name)
    kinds, _ = shown(f"- {markdown(name)}: why\n\nend [1, 2]")
    assert not kinds & {"link_open", "heading_open", "code_inline", "html_inline", "html_block"}
    assert not re.search(r"://|www\.|@", markdown(name), re.IGNORECASE)  # GitHub links these bare


@given(st.text(alphabet=st.sampled_from("ab1 .,-+#=[]()<>!*_`~|\\:&;$\n\t'\"{}/%∞é"), max_size=25))
@example("1.")
def test_whatever_the_text_nothing_is_markup(text) -> None:
    kinds, read = shown(markdown(text))
    assert kinds <= PLAIN | {"text", "text_special"}
    assert read == one_line(text)


def test_intervals_stay_readable_in_the_source() -> None:
    for text in ("18.5 [1.3, -35.8]", "rank % [95 %]", "2.0 [no interval]", "12,800 [8,192, ∞]",
                 "gaussian_noise", "-5.8 [-6, 1]", "69.5 is", "nano-2", "a - b"):  # fmt: skip
        assert markdown(text) == text


def test_control_characters_do_not_reach_a_terminal() -> None:
    assert one_line("a\x1b[31m\u202eb\n c") == "a\ufffd[31m\ufffdb c"


def test_a_summary_of_hostile_names_holds_tables_lists_and_headings_only() -> None:
    kinds, text = shown(summary_markdown(nasty()))
    lists = {f"{part}_{end}" for part in ("heading", "bullet_list", "list_item", "em")
             for end in ("open", "close")}  # fmt: skip
    assert kinds <= PLAIN | CELLS | lists | {"text", "text_special", "softbreak"}
    for name in NASTY:
        assert one_line(name) in text


def test_imported_names_are_escaped_too() -> None:
    runs = [
        LegacyResult("i", name, kind, name, "a", "o", "p", f"{n}{kind}", 2.0, 1.0, -50.0)
        for n, name in enumerate(NASTY)
        for kind in ("attack", "heal")
    ]
    kinds, text = shown(legacy_markdown(summarize_legacy(runs, 0.95)))
    assert not kinds & {"link_open", "code_inline", "html_inline", "html_block", "image", "s_open"}
    assert "table_open" in kinds
    assert all(one_line(name) in text for name in NASTY)


def test_cells_that_a_spreadsheet_would_compute(tmp_path) -> None:
    assert csv_cell("=1+1") == "'=1+1"
    assert [csv_cell(v) for v in ("+x", "-x", "@x", "\tx", "x", -1.5, "")] == [
        "'+x", "'-x", "'@x", "'\tx", "x", -1.5, "",
    ]  # fmt: skip
    path = tmp_path / "summary.csv"
    rows = [dict(row, model="=cmd()") for row in group_rows(eventful())]
    write_csv(path, rows)
    with path.open(newline="", encoding="utf-8") as stream:
        read = list(csv.DictReader(stream))
    assert {row["model"] for row in read} == {"'=cmd()"}
    # Groups differ in their columns: only nano's have ten checkpoints.
    assert [bool(row["loss_recovery_bca_low_pct"]) for row in read] == [True] * 3 + [False] * 7
