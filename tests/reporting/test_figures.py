"""Figures of a summary: print size, same bytes, units, legible and distinguishable."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib import colors
from matplotlib.text import Text

from healing.config.summarize import FIGURE_STYLES
from healing.registry import ARMS
from healing.reporting.plots import groups as figures
from healing.reporting.plots import runs, style
from healing.reporting.plots.contrasts import contrasts
from healing.reporting.plots.style import COLUMN, PAGE, arm_style, safe_text, spread, text_colour
from tests.summaries import eventful, nasty, pool, realistic, simulated_run

DRAW = {
    "mean_recovery": (figures.mean_recovery, PAGE),
    "final_recovery": (figures.final_recovery, PAGE),
    "recovery_against_parameters": (figures.recovery_against_parameters, COLUMN),
    "half_recovery": (figures.half_recovery, PAGE),
}


@pytest.fixture(scope="module")
def summary():
    return realistic()


@pytest.fixture(params=FIGURE_STYLES)
def figure_style(request):
    with style.figure_style(request.param):
        yield request.param


def draw(name: str, path, summary) -> None:
    if name == "contrasts":
        contrasts(path, summary.contrasts)
    elif name == "column":
        figures.mean_recovery(path, summary.groups, COLUMN)
    else:
        DRAW[name][0](path, summary.groups)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["column", "contrasts", *DRAW])
def test_same_input_same_bytes_and_no_date(tmp_path, summary, name, figure_style):
    for folder in ("a", "b"):
        draw(name, tmp_path / folder / "f", summary)
    for suffix in (".png", ".pdf"):
        first, second = ((tmp_path / x / f"f{suffix}").read_bytes() for x in "ab")
        assert first == second
    assert b"CreationDate" not in first
    assert b"/Type3" not in first
    fonts = set(re.findall(rb"/BaseFont /(?:[A-Z]{6}\+)?([A-Za-z]+)", first))
    assert fonts == {b"STIXGeneral" if figure_style == "serif" else b"DejaVuSans"}


def test_mathematics_of_a_serif_figure_is_serif(tmp_path):
    with style.figure_style("serif"), style.paper_figure(tmp_path / "f", 1, 1, (3, 2)) as (_, axes):
        axes[0].set(
            xscale="log", xlim=(1e3, 1e9), xlabel=safe_text("数 $x$"), title=r"$\lambda x$"
        )  # 10³ … 10⁹
    pdf = (tmp_path / "f.pdf").read_bytes()
    assert b"STIXGeneral" in pdf
    assert b"DejaVu" not in pdf
    with style.paper_figure(tmp_path / "after", 1, 1, (3, 2)) as (_, axes):
        axes[0].set_xlabel("steps")
    assert b"STIX" not in (tmp_path / "after.pdf").read_bytes()


def test_the_paper_figure_is_one_column_wide(tmp_path, summary):
    draw("column", tmp_path / "f", summary)
    png = (tmp_path / "f.png").read_bytes()
    assert int.from_bytes(png[16:20], "big") == 990  # 3.3 inches at 300 dots
    (box,) = re.findall(rb"/MediaBox \[([^]]*)\]", (tmp_path / "f.pdf").read_bytes())
    assert float(box.split()[2]) == pytest.approx(3.3 * 72)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["column", "contrasts", *DRAW])
@pytest.mark.parametrize("which", ["realistic", "three", "nasty", "eventful"])
def test_axes_have_units_and_all_text_is_legible_and_inside(
    tmp_path, kept, name, which, figure_style
):
    made = {"realistic": realistic, "nasty": nasty, "eventful": eventful}
    summary = made[which]() if which in made else realistic(("nano", "micro", "70m"))
    draw(name, tmp_path / "f", summary)
    (fig,) = kept
    columns = {round(ax.get_position().x0, 3) for ax in fig.axes}
    lowest = {min(ax.get_position().y0 for ax in fig.axes)}
    for ax in fig.axes:
        if ax.get_position().y0 in lowest:
            assert re.search(r"steps|%|points|log scale", ax.get_xlabel())
        assert "%" in ax.get_ylabel() or len(ax.get_yticklabels()) > 0
    assert len(columns) <= 2
    fig.canvas.draw()  # the last drawing was the PDF's, at 72 dots per inch
    width, height = fig.canvas.get_width_height()
    renderer = fig.canvas.get_renderer()
    for ax in fig.axes:
        low, high = sorted(ax.get_ylim())
        ticks = [t for t in ax.get_yticklabels() if low <= t.get_position()[1] <= high]
        for text in [ax.xaxis.label, ax.yaxis.label, *ax.texts, *ticks]:
            if text.get_text():
                assert text.get_fontsize() >= 6.5
                box = text.get_window_extent(renderer)
                assert -1 <= box.x0 <= box.x1 <= width + 1
                assert -1 <= box.y0 <= box.y1 <= height + 1


@pytest.mark.parametrize("which", ["realistic", "three"])
def test_direct_labels_do_not_overlap(tmp_path, kept, which, figure_style):
    models = ("nano", "micro", "70m") if which == "three" else ("nano", "micro")
    draw("column", tmp_path / "f", realistic(models))
    (fig,) = kept
    fig.canvas.draw()
    renderer = fig.canvas.get_renderer()
    for ax in fig.axes:
        boxes = sorted((t.get_window_extent(renderer) for t in ax.texts), key=lambda b: b.y0)
        assert all(a.y1 <= b.y0 + 0.5 for a, b in pairwise(boxes))


def test_arms_are_called_as_in_the_tables(tmp_path, kept):
    """Where lines end, in rows and in notes: one spelling, never a shortened one."""
    summary = realistic(("nano",))
    labels = {group.label for group in summary.groups}
    for which in ("mean_recovery", "half_recovery", "recovery_against_parameters"):
        draw(which, tmp_path / which, summary)
        texts = [t.get_text() for t in kept[-1].axes[0].texts if t.get_gid() != "zones"]
        named = {re.sub(r" \(n = \d+\)|: undefined", "", text) for text in texts}
        assert named, which
        assert named <= labels, which


def test_leaders_begin_at_their_own_names(tmp_path, kept):
    """From the middle of a name they would cross its neighbours, where lines end at one height."""
    draw("half_recovery", tmp_path / "f", realistic(("nano",)))
    fig = kept[-1]
    fig.canvas.draw()
    renderer = fig.canvas.get_renderer()
    found = [t for ax in fig.axes for t in ax.texts if getattr(t, "arrow_patch", None)]
    assert len(found) > 3
    for text in found:
        name = Text.get_window_extent(text, renderer)  # an annotation's own holds its leader
        line = text.arrow_patch.get_window_extent(renderer)
        assert line.x1 <= name.x0


def test_curves_show_the_numbers_of_the_summary(tmp_path, kept, summary):
    draw("mean_recovery", tmp_path / "f", summary)
    band = next(g for g in summary.groups if g.arm == "haep").bands["rank_recovery_pct"]
    drawn = [list(line.get_ydata()) for line in kept[0].axes[0].lines]
    assert [i.point for i in band.intervals] in drawn


def test_several_settings_of_a_size_are_not_joined(tmp_path, kept):
    """The rule of the slope, which such an arm has none of."""
    summary = eventful()
    draw("recovery_against_parameters", tmp_path / "f", summary)
    (ax,) = kept[0].axes
    curves = {
        (line.get_color(), line.get_linestyle()) for line in ax.lines if line.get_marker() != "None"
    }
    joined = {arm for arm in ("haep", "gaussian_noise", "random_text")
              if (arm_style(arm)[0], "-") in curves}  # fmt: skip
    assert joined == set(summary.slopes) == {"haep", "gaussian_noise"}
    assert (arm_style("random_text")[0], "None") in curves
    assert "not joined (several settings of a size): clean text" in [t.get_text() for t in ax.texts]


def test_half_recovery_is_one_minus_kaplan_meier(tmp_path, kept, summary):
    draw("half_recovery", tmp_path / "f", summary)
    group = next(g for g in summary.groups if g.arm == "spectral")
    curve = group.half_times["loss_recovery_pct"].curve
    wanted = [100 * (1 - p) for p in curve.probabilities]
    drawn = [list(line.get_ydata()) for line in kept[0].axes[1].lines]
    assert any(ys[1 : 1 + len(wanted)] == pytest.approx(wanted) for ys in drawn if len(ys) > 2)


def test_differences_from_noise_are_drawn_pair_by_pair(tmp_path, kept, summary):
    draw("contrasts", tmp_path / "f", summary)
    loss = summary.contrast("nano", "gaussian_noise").comparison.endpoints[1]
    assert list(loss.differences) in [list(line.get_xdata()) for line in kept[0].axes[1].lines]


def test_arms_have_their_own_colours_and_markers():
    styles = [arm_style(arm) for arm in ARMS.names()]
    assert len({colour for colour, _ in styles}) == len(styles)
    assert len({marker for _, marker in styles}) == len(styles)


@pytest.mark.parametrize("arm", ARMS.names())
def test_small_type_has_the_contrast_that_wcag_asks_for(arm):
    def linear(c: float) -> float:
        return c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4

    red, green, blue = map(linear, colors.to_rgb(text_colour(arm_style(arm)[0])))
    luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
    assert 1.05 / (luminance + 0.05) >= 4.5


def test_names_are_no_mathematics_and_not_endless():
    assert safe_text("a$b$") == r"a\$b\$"
    assert safe_text("模x") == "U+6A21x"
    assert safe_text("a\nb") == "a b"
    assert safe_text("x" * 50) == "x" * 21 + "…"


@settings(max_examples=60)
@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_spread_keeps_order_distance_and_bounds(values):
    places = spread(values, 0.1, 0.0, 1.0)
    ranked = [place for _, place in sorted(zip(values, places, strict=True))]
    assert all(b - a >= 0.1 - 1e-9 for a, b in pairwise(ranked))
    assert min(places) >= -1e-9
    assert max(places) <= 1.0 + 1e-9


def test_spread_moves_only_what_collides():
    assert spread([0.9, 0.1], 0.1, 0.0, 1.0) == pytest.approx([0.9, 0.1])
    assert spread([0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55])
    assert spread([], 0.1, 0.0, 1.0) == []
    assert all(math.isfinite(p) for p in spread([0.0] * 20, 0.1, 0.0, 1.0))


def texts(fig) -> list[str]:
    found = [t.get_text() for ax in fig.axes for t in (*ax.texts, ax.title, *_titles(ax))]
    return [text for text in found if text]


def _titles(ax):
    return [ax._left_title, ax._right_title]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mean_recovery", [style.ZONES]),
        ("recovery_against_parameters", [style.ZONES]),
        ("final_recovery", ["in part", "healthy"]),
    ],
)
def test_the_zone_and_the_line_are_explained_in_the_figure(tmp_path, kept, summary, name, said):
    draw(name, tmp_path / "f", summary)
    assert set(said) <= set(texts(kept[0]))


def test_the_unigram_model_and_the_sham_stand_in_the_loss_panels(tmp_path, kept):
    rng = np.random.default_rng(0)
    made = []
    for seed in range(4):
        run = simulated_run(rng, "nano", "haep", seed, 40.0, 80.0)
        own = run.final["loss_recovery_pct"]
        more = {"unigram_loss_recovery_pct": 76.5, "loss_recovery_sham_pct": own / 0.9,
                "rank_recovery_sham_pct": 41.0}  # fmt: skip
        paths = {name: (value,) * len(run.steps) for name, value in more.items()}
        made.append(replace(run, final=run.final | more, trajectory={**run.trajectory, **paths}))
    draw("mean_recovery", tmp_path / "f", pool(made))
    left, right = kept[0].axes
    levels = [set(np.round(line.get_ydata(), 6)) for line in right.lines]
    assert {76.5} in levels
    sham = [next(iter(x)) for x in levels if len(x) == 1 and 85 < next(iter(x)) < 95]
    assert sham == [pytest.approx(90.0, abs=0.1)]  # 100·own/(own/0.9)
    assert not any({76.5} == set(line.get_ydata()) for line in left.lines)
    assert any("unigram" in text and "sham" in text for text in texts(kept[0]))


def test_sizes_are_ticked_at_the_models_alone(tmp_path, kept):
    draw("recovery_against_parameters", tmp_path / "f", realistic(("nano", "micro", "70m")))
    (ax,) = kept[0].axes
    assert list(ax.get_xticks()) == [309_792, 1_317_632, 70_426_624]
    assert list(ax.get_xticks(minor=True)) == []
    names = [t.get_text().split("\n")[0] for t in ax.get_xticklabels()]
    assert names == ["nano", "micro", "70m"]


def test_large_numbers_in_figures_are_written_as_people_do(tmp_path, kept):
    trajectory = [(0, {"perplexity": 3.318e9}), (10, {"perplexity": 160.0})]
    summary = {"original_perplexity": 20.17, "collapsed_perplexity": 3.318e9, "unigram_loss": 6.2}
    runs.perplexity_recovery(
        tmp_path / "p.png", trajectory, summary, "haep", "nano", {0: 3.0, 10: 3.1}
    )
    said = texts(kept[0])
    assert "collapsed 3.3×10⁹" in said
    assert "unigram model 492.7" in said  # exp(6.2)
    assert any("sham" in text for text in said)
    assert not any("e+" in text for text in said)
