"""Recovery formulas by hand: signs, limits, what is undefined, and the verdicts."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from healing.measurements.recovery import (
    IRREVERSIBLE_BELOW,
    REVERSIBLE_ABOVE,
    Damage,
    State,
    Verdict,
    measurable_recovery_pct,
    panel_metric,
    ppl_improvement_pct,
    recovery_pct,
    verdict_of,
)
from tests.conftest import ROOT

FINITE = st.floats(-1e6, 1e6)


def state(rank: float, loss: float, error: float = 0.0) -> State:
    return State(rank, loss, math.exp(loss), error)


def test_recovery_by_hand():
    assert recovery_pct(now=70, collapsed=40, healthy=100) == 50.0
    assert recovery_pct(now=40, collapsed=40, healthy=100) == 0.0
    assert recovery_pct(now=100, collapsed=40, healthy=100) == 100.0


def test_recovery_is_not_clamped():
    assert recovery_pct(now=10, collapsed=40, healthy=100) == -50.0
    assert recovery_pct(now=130, collapsed=40, healthy=100) == 150.0
    # A rank that rose under the attack: coming down is recovery.
    assert recovery_pct(now=105, collapsed=110, healthy=100) == 50.0


@given(FINITE, FINITE, FINITE)
def test_recovery_of_losses_and_ranks_is_one_formula(now, collapsed, healthy):
    value = recovery_pct(now, collapsed, healthy)
    if healthy == collapsed:
        assert math.isnan(value)
    else:
        assert recovery_pct(-now, -collapsed, -healthy) == value


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nonfinite_states_have_no_recovery(bad):
    assert math.isnan(recovery_pct(bad, 1.0, 2.0))
    assert math.isnan(ppl_improvement_pct(5.0, bad))


def test_perplexity_improvement_by_hand():
    assert ppl_improvement_pct(now=25.0, collapsed=100.0) == 75.0
    assert ppl_improvement_pct(now=150.0, collapsed=100.0) == -50.0


def test_rank_change_under_five_percent_is_undefined():
    damage = Damage(state(100.0, 3.0), state(95.1, 8.0))
    assert "below the detection threshold of 5" in damage.rank_reason
    assert damage.spectral_state == "unchanged"
    assert math.isnan(damage.recovery(state(99.0, 4.0))["rank_recovery_pct"])
    assert damage.recovery(state(99.0, 4.0))["loss_recovery_pct"] == pytest.approx(80.0)


def test_three_combined_standard_errors_can_raise_the_threshold():
    # √(3² + 4²) = 5; three of them are 15.
    damage = Damage(state(100.0, 3.0, 3.0), state(86.0, 8.0, 4.0))
    assert damage.rank_threshold == pytest.approx(15.0)
    assert damage.spectral_state == "unchanged"
    assert Damage(state(100.0, 3.0, 3.0), state(84.9, 8.0, 4.0)).spectral_state == "collapsed"


@pytest.mark.parametrize("now", [20.0, 26.0, 39.0, 44.0])
def test_the_error_of_a_recovery_is_that_of_simulated_measurements(now):
    healthy, collapsed = state(40.0, 3.0, 0.3), state(20.0, 9.0, 0.2)
    rng = np.random.default_rng(0)
    t, c, h = (
        rng.normal(mean, sd, 200_000) for mean, sd in ((now, 0.25), (20.0, 0.2), (40.0, 0.3))
    )
    simulated = float((100 * (t - c) / (h - c)).std())
    damage = Damage(healthy, collapsed)
    assert damage.rank_recovery_error(state(now, 4.0, 0.25)) == pytest.approx(simulated, rel=0.02)
    # A healed state's own error is rarely known: the larger of the others stands for it.
    unknown = damage.rank_recovery_error(State(now, 4.0, 50.0))
    assert unknown == damage.rank_recovery_error(state(now, 4.0, 0.3))
    nobody = Damage(State(40.0, 3.0, 20.0), State(20.0, 9.0, 8e3))
    assert math.isnan(nobody.rank_recovery_error(State(now, 4.0, 50.0)))


def test_a_recovery_that_would_not_be_known_is_undefined():
    # 100/|Δ|·√2·0.3: 12.6 points at Δ = 3.37, 8.6 at 4.94; both beyond three standard errors.
    blurred = Damage(state(42.9, 3.0, 0.3), state(39.53, 8.0, 0.3))
    assert blurred.spectral_state == "collapsed"
    assert "a recovery has a standard error of 12.6 points, more than 10" in blurred.rank_reason
    assert math.isnan(blurred.recovery(state(41.0, 4.0))["rank_recovery_pct"])
    assert math.isfinite(blurred.recovery(state(41.0, 4.0))["loss_recovery_pct"])
    assert Damage(state(42.9, 3.0, 0.3), state(37.96, 8.0, 0.3)).rank_reason == ""


def test_panel_measures_that_hardly_changed_have_no_recovery():
    assert measurable_recovery_pct(9.0, 5.0, 10.0) == pytest.approx(80.0)
    assert math.isnan(measurable_recovery_pct(9.7, 9.6, 10.0))
    assert panel_metric("last_block") == "panel/last_block_recovery_pct"


def test_a_risen_rank_is_inflated_and_has_a_recovery():
    damage = Damage(state(80.0, 3.0), state(95.0, 7.0))
    assert damage.spectral_state == "inflated"
    assert damage.rank_reduction_pct == pytest.approx(-18.75)
    assert damage.recovery(state(89.0, 5.0))["rank_recovery_pct"] == pytest.approx(40.0)


def test_sham_is_undefined_not_zero_or_hundred():
    same = state(80.0, 3.0)
    recovery = Damage(same, same).recovery(state(80.5, 2.9))
    assert math.isnan(recovery["rank_recovery_pct"])
    assert math.isnan(recovery["loss_recovery_pct"])
    assert verdict_of(recovery["rank_recovery_pct"]) == "undefined"
    assert "under 5 %" in Damage(same, same).loss_reason


def test_a_state_that_cannot_compute_is_undefined_with_a_reason():
    damage = Damage(state(80.0, 3.0), State(math.nan, math.nan, math.nan))
    assert damage.rank_reason == "effective rank is not finite"
    assert damage.loss_reason == "loss is not finite"
    assert damage.spectral_state == "undefined"


@pytest.mark.parametrize(
    ("recovery", "verdict"),
    [
        (-20.1, "further collapse"),
        (-20.0, "irreversible pathology"),
        (19.9, "irreversible pathology"),
        (20.0, "partial"),
        (70.0, "partial"),
        (70.1, "acute structural failure"),
        (140.0, "acute structural failure"),
        (math.nan, "undefined"),
    ],
)
def test_verdict_thresholds(recovery, verdict):
    assert verdict_of(recovery) == verdict


def test_sham_recovery_by_hand():
    damage = Damage(State(40.0, 3.0, 20.0), State(20.0, 13.0, 4e5))
    now, sham = State(26.0, 5.0, 150.0), State(35.0, 2.5, 12.0)
    found = damage.sham_recovery(now, sham)
    assert found["rank_recovery_sham_pct"] == pytest.approx(100 * 6 / 15)
    assert found["loss_recovery_sham_pct"] == pytest.approx(100 * 8 / 10.5)
    # Another value for an undamaged rank is what fine-tuning does, not recovery from anything.
    unhurt = Damage(State(42.9, 3.0, 20.0), State(42.8, 13.0, 4e5))
    found = unhurt.sham_recovery(State(41.0, 5.0, 150.0), State(40.0, 2.5, 12.0))
    assert math.isnan(found["rank_recovery_sham_pct"])
    assert found["loss_recovery_sham_pct"] == pytest.approx(100 * 8 / 10.5)
    found = unhurt.sham_recovery(State(44.0, 5.0, 150.0), State(46.0, 2.5, 12.0))
    assert math.isnan(found["rank_recovery_sham_pct"])
    # A sham on the other side of the collapsed state gives no direction to recover in.
    across = Damage(State(40.0, 3.0, 20.0), State(30.0, 13.0, 4e5))
    found = across.sham_recovery(State(33.0, 5.0, 150.0), State(27.0, 2.5, 12.0))
    assert math.isnan(found["rank_recovery_sham_pct"])
    # A sham that itself ends where the collapsed model is leaves nothing to recover.
    assert math.isnan(damage.sham_recovery(now, State(20.5, 13.1, 5e5))["rank_recovery_sham_pct"])
    assert math.isnan(damage.sham_recovery(now, State(20.5, 13.1, 5e5))["loss_recovery_sham_pct"])


def test_stored_names_of_verdicts_and_what_people_read():
    """The stored names are those of the runs of today; the best one sounds worst, so it is
    explained.
    """
    assert [str(v) for v in Verdict] == [
        "irreversible pathology", "acute structural failure", "partial", "further collapse",
        "too few checkpoints", "inconclusive", "undefined",
    ]  # fmt: skip
    assert json.dumps({"verdict": Verdict.PARTIAL}) == '{"verdict": "partial"}'
    assert Verdict("acute structural failure").shown == "acute structural failure (heals)"
    assert Verdict.IRREVERSIBLE.shown == "irreversible pathology"
    assert Verdict.IRREVERSIBLE.meaning == "does not heal within this budget"


def test_the_bounds_of_verdicts_are_spelled_in_one_file():
    """A change of one copy once left the figures wrong."""
    spelled = re.compile(r"\b(20|70)(\.0)?( %|\\,\\%|–70|, 70\b| to 70)|\b70\.0\b")
    users = {
        path.name
        for path in sorted((ROOT / "healing").rglob("*"))
        if path.suffix in (".py", ".html", ".css") and spelled.search(path.read_text())
    }
    assert users == {"recovery.py"}


@pytest.mark.parametrize("name", ["README.md", "docs/report.md"])
def test_documents_name_the_bounds_that_hold(name):
    words = " ".join((ROOT / name).read_text().split())
    assert f"under {IRREVERSIBLE_BELOW:g} %" in words
    assert f"over {REVERSIBLE_ABOVE:g} %" in words
