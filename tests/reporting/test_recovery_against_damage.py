"""What is said and drawn of recovery against damage."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from healing.reporting.damage_regression import LIMITS, damage_sentence, damage_sentences
from healing.reporting.markdown import markdown
from healing.reporting.plain_data import as_json
from healing.reporting.plots.damage import recovery_against_damage
from healing.reporting.plots.style import arm_style
from tests.statistics.test_damage_regression import fitted, runs_of
from tests.summaries import degenerate, eventful, nasty, pool


def test_the_sentence_says_what_remains_at_equal_damage() -> None:
    found = fitted(runs_of(np.random.default_rng(0), effect=7.0, apart=0.2, noise=0.0, shared=0.0))
    said = damage_sentence("nano", found)
    assert said.startswith(
        "nano, 20 checkpoints of 2 arms, 10 attack seeds: Within arms rank recovery changes by "
        "-12.0 [-12.0, -12.0] points per doubling of the distance and by 5.0 [5.0, 5.0] points "
        "per doubling of the loss. “random tokens” minus “HAEP”: "
    )
    assert said.endswith(" points as it is, 7.0 [7.0, 7.0] at equal distance and loss.")


def test_arms_apart_say_that_nothing_can_be_said() -> None:
    said = damage_sentence("nano", fitted(runs_of(np.random.default_rng(1), apart=4.0)))
    assert "they do not overlap in distance: nothing can be said at equal damage" in said
    assert "The arms do not overlap in distance or loss: nothing can be said of arms" in said
    few = damage_sentence("nano", fitted(runs_of(np.random.default_rng(1), seeds=4)))
    assert few == (
        "nano, 8 checkpoints of 2 arms, 4 attack seeds: Nothing can be said of arms at equal "
        "damage: 4 attack seeds, at least 5 needed."
    )


def test_where_distance_and_loss_do_not_vary_there_is_only_the_plain_difference() -> None:
    found = fitted(
        [replace(r, weight_change=0.5, start_loss=5.0) for r in runs_of(np.random.default_rng(3))]
    )
    assert (found.covariates, found.adjusted) == ((), {})
    said = damage_sentence("nano", found)
    assert said.count("points as it is") == 1
    assert "distance does not vary within arms" in said
    assert "Nothing can be said of arms at equal damage." in said


def test_everything_is_in_the_outputs() -> None:
    summary = pool(runs_of_summary())
    said = damage_sentences(summary)
    assert (len(said), said[-1]) == (2, LIMITS)
    text = markdown(summary)
    assert "## Is it the attack, or how far it went?" in text
    record = json.loads(json.dumps(as_json(summary)))["recovery_against_damage"]["nano"]
    slope = summary.damage["nano"].slopes["weight_change"]
    assert record["slopes"]["weight_change"]["point"] == slope.point
    assert len(record["points"]) == 20
    empty = degenerate()["one checkpoint"]
    assert damage_sentences(empty) == []
    assert "how far it went" not in markdown(empty)


def runs_of_summary():
    path = {"rank_recovery_pct": (0.0, 50.0), "loss_recovery_pct": (0.0, 50.0)}
    return [
        replace(r, trajectory=path, final={**r.final, "loss_recovery_pct": 50.0})
        for r in runs_of(np.random.default_rng(2))
    ]


def test_the_figure_shows_every_checkpoint_in_its_arms_style(tmp_path, kept) -> None:
    regression = fitted(runs_of(np.random.default_rng(3)))
    recovery_against_damage(tmp_path / "f", {"nano": regression, "micro": regression})
    (fig,) = kept
    assert len(fig.axes) == 4
    for ax, name in zip(fig.axes, ["weight_change", "start_loss"] * 2, strict=True):
        assert ax.get_xscale() == "log"
        drawn = {
            (line.get_color(), line.get_marker()): (list(line.get_xdata()), list(line.get_ydata()))
            for line in ax.lines if line.get_linestyle() == "None"
        }  # fmt: skip
        for arm in ("haep", "random_tokens"):
            own = [p for p in regression.points if p.arm == arm]
            wanted = [getattr(p, name) for p in own], [p.recovery for p in own]
            assert drawn[arm_style(arm)] == wanted
    assert {t.get_text() for t in fig.axes[1].texts} == {"HAEP", "random tokens"}
    assert fig.axes[1].get_title(loc="left") == "dotted: healthy; grey: 20–70 %, in part"
    assert "log scale" in fig.axes[2].get_xlabel()
    assert "log scale" in fig.axes[3].get_xlabel()


@pytest.mark.slow
@pytest.mark.parametrize("made", [nasty, eventful])
def test_the_figure_is_legible_and_the_same_every_time(tmp_path, kept, made) -> None:
    found = made().damage
    for name in "ab":
        recovery_against_damage(tmp_path / name, found)
    for suffix in (".png", ".pdf"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    fig = kept[0]
    fig.canvas.draw()
    width, height = fig.canvas.get_width_height()
    for ax in fig.axes:
        for text in [ax.xaxis.label, ax.yaxis.label, *ax.texts]:
            if text.get_text():
                box = text.get_window_extent(fig.canvas.get_renderer())
                assert -1 <= box.x0 <= box.x1 <= width + 1
                assert -1 <= box.y0 <= box.y1 <= height + 1
