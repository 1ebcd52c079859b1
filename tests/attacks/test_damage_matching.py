"""Damage-matched noise: bracketing and bisection on known curves, and on nano."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from healing.attacks.context import prepare_arm
from healing.attacks.damage_matching import match_damage, measure_state
from healing.attacks.damage_target import TOLERANCE, DamageTarget
from healing.attacks.strength import NoiseArm
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.config.resolve import resolve_from_presets
from healing.errors import MatchError
from healing.models.checkpoints import save_checkpoint
from healing.models.loading import load_model, state_digest
from healing.progress import Safe, without_safe_points


@dataclass(frozen=True)
class Curve:
    """A measurement whose loss and rank are known functions of the noise scale."""

    loss: float
    effective_rank: float
    nonfinite_tokens: int = 0


class FakeArm:
    """Remembers the scale instead of moving weights."""

    scale = 0.0
    change = type("C", (), {"relative": staticmethod(lambda _: 0.0)})

    def place(self, scale: float) -> None:
        self.scale = scale

    def diagnostics(self) -> dict[str, float]:
        return {}

    def baselines_now(self) -> dict[str, float]:
        return {"compared": 1.0}


class FakeProbe:
    def __init__(self, arm: FakeArm, loss, rank=lambda s: 40.0) -> None:
        self.arm, self.loss, self.rank = arm, loss, rank

    def measure(self, _model) -> Curve:
        return Curve(self.loss(self.arm.scale), self.rank(self.arm.scale))


class FakeLoaded:
    model = None


def search(target: float, loss, name: str = "loss", rank=lambda s: 40.0):
    arm = FakeArm()
    probe = FakeProbe(arm, loss, rank)
    healthy = probe.measure(None)
    goal = DamageTarget(name, target, loss(0.0) if name == "loss" else rank(0.0))
    events = list(match_damage(FakeLoaded(), arm, AttackConfig(), probe, healthy, goal))
    records = list(without_safe_points(events))
    assert [e.done for e in events if isinstance(e, Safe)] == [r.step for r in records[1:]]
    return records, arm


# Largest scale is 256 and smallest 1/256, so targets between 3 + 1/256 and 3 + 256.
@pytest.mark.parametrize("target", [3.5, 4.0, 9.7, 60.0, 250.0])
def test_scale_is_the_inverse_of_a_known_curve(target):
    records, arm = search(target, lambda s: 3.0 + s)
    assert arm.scale == pytest.approx(target - 3.0, abs=0.02 * target)
    assert abs(records[-1].diagnostics["match_error_pct"]) <= 2.0
    assert [r.step for r in records] == list(range(len(records)))
    assert records[-1].diagnostics["noise_scale"] == arm.scale
    assert all(abs(r.diagnostics["match_error_pct"]) > 2.0 for r in records[1:-1])
    compared = [r.step for r in records if "compared" in r.diagnostics]
    assert compared == [0, records[-1].step]


def test_a_falling_rank_is_matched_too():
    records, arm = search(20.0, lambda s: 3.0, "rank", lambda s: 40.0 / (1.0 + s))
    assert records[-1].measurement.effective_rank == pytest.approx(20.0, rel=0.02)
    assert arm.scale == pytest.approx(1.0, rel=0.05)


def test_a_rank_that_noise_raises_is_out_of_reach_and_it_says_how_far_it_goes():
    with pytest.raises(MatchError, match=r"noise does not reach the rank 20 .* between 40\.01 "
                       r"and 40\.98 for strengths from 0\.0625 to 256, closest was 40\.01 "
                       r"\(100\.1 % off\) at 0\.0625, in 21 tried \(healthy 40\)"):  # fmt: skip
        search(20.0, lambda s: 3.0, "rank", lambda s: 40.0 + s / (s + 5.25))


def dip(s: float) -> float:
    """Falls from 40 to 15 at s = 2, is back at 40 at s = 8, and falls again beyond 100."""
    if s > 100.0:
        return 10.0
    return 40.0 - 25.0 * math.exp(-4.0 * math.log2(s / 2.0) ** 2) if s else 40.0


def test_the_smallest_strength_of_a_rank_that_falls_rises_and_falls_again():
    records, arm = search(20.0, lambda s: 3.0, "rank", dip)
    # 40 − 25·exp(−4·x²) = 20 at x = −√(ln 1.25)/2: within 2 % of a slope of 47 per doubling.
    assert math.log2(arm.scale / 2.0) == pytest.approx(-math.sqrt(math.log(1.25)) / 2.0, abs=0.01)
    assert abs(records[-1].diagnostics["match_error_pct"]) <= 2.0


def test_a_dip_narrower_than_an_octave_is_found():
    """At powers of two alone (1 and 2) nothing would be seen of it."""

    def narrow(s: float) -> float:
        return 10.0 if 1.2 < s < 1.6 else 40.0 if s < 1.2 else 30.0

    with pytest.raises(MatchError, match=r"stays between 10 and 40 .* in 34 tried"):
        search(20.0, lambda s: 3.0, "rank", narrow)  # a jump: bracketed, and not called a match
    _, arm = search(10.0, lambda s: 3.0, "rank", narrow)
    assert 1.2 < arm.scale < 1.6


def test_a_rank_that_is_gone_at_once_is_looked_for_below():
    _, arm = search(20.0, lambda s: 3.0, "rank", lambda s: 40.0 / (1.0 + 50.0 * s))
    assert arm.scale == pytest.approx(0.02, rel=0.05)
    with pytest.raises(MatchError, match="stays between 1 and 1 "):
        search(20.0, lambda s: 3.0, "rank", lambda s: 40.0 if not s else 1.0)


def test_a_state_that_cannot_be_computed_ends_the_scan_of_a_rank():
    arm = FakeArm()
    probe = FakeProbe(arm, lambda s: 3.0, lambda s: 40.0)
    probe.measure = lambda _: Curve(3.0, 40.0 - arm.scale, 7 * (arm.scale > 1.5))
    goal = DamageTarget("rank", 20.0, 40.0)
    with pytest.raises(MatchError, match=r"between 38\.59 and 39\.94 .* from 0\.0625 to 1\.41, "):
        list(match_damage(FakeLoaded(), arm, AttackConfig(), probe, probe.measure(None), goal))


def test_a_loss_that_overflows_is_past_the_target():
    _, arm = search(20.0, lambda s: 3.0 + s if s < 20 else math.nan)
    assert arm.scale == pytest.approx(17.0, abs=0.4)


def test_a_jump_over_the_target_is_not_called_a_match():
    with pytest.raises(MatchError, match=r"closest was 3 \(100\.0 % off\)"):
        search(10.0, lambda s: 3.0 if s < 5.0 else 100.0)


def test_nothing_finite_is_said_so():
    with pytest.raises(MatchError, match="no strength of the noise gave a finite loss"):
        search(10.0, lambda s: 3.0 if s == 0 else math.nan)


def test_a_reference_that_cannot_compute_is_no_target():
    with pytest.raises(MatchError, match=r"loss of the reference attack is nan.*use --match norm"):
        DamageTarget.of("loss", Curve(math.nan, 1.0), Curve(3.0, 40.0))
    with pytest.raises(MatchError, match=r"with 7 tokens that cannot be computed"):
        DamageTarget.of("loss", Curve(9.0, 1.0, 7), Curve(3.0, 40.0))


def test_a_reference_without_damage_is_no_target():
    with pytest.raises(
        MatchError, match=r"left the loss at 3\.1 \(healthy 3\), which is no damage"
    ):
        DamageTarget.of("loss", Curve(3.1, 40.0), Curve(3.0, 40.0))


def test_two_percent_are_of_the_damage_where_that_is_the_smaller():
    slight = DamageTarget("loss", 3.5, 3.0)
    assert slight.error(Curve(3.45, 40.0)) == pytest.approx(-0.1)  # 1.4 % of the loss itself
    deep = DamageTarget("rank", 10.0, 40.0)
    assert deep.error(Curve(3.0, 10.5)) == pytest.approx(0.05)  # 1.7 % of the damage
    assert math.isnan(slight.error(Curve(3.5, 40.0, 1)))
    assert slight.beyond(Curve(3.1, 40.0, 1))


def test_noise_on_nano_reaches_the_loss_of_a_known_damage(nano, corpus, probe, tmp_path):
    change = WeightChange(nano.model)
    with torch.no_grad():
        for parameter in nano.model.parameters():
            parameter.mul_(1.5)
    path = tmp_path / "reference.pt"
    save_checkpoint(path, nano.model, 0, "reference", {"model": "nano"})
    damaged = {k: v.clone() for k, v in nano.model.state_dict().items()}
    expected = probe.measure(nano.model)
    fresh = load_model("nano")
    healthy, change = probe.measure(fresh.model), WeightChange(fresh.model)
    digest = state_digest(fresh.model.state_dict())
    measured = measure_state(fresh, damaged, change, probe)
    assert measured.loss == expected.loss
    assert state_digest(fresh.model.state_dict()) == digest  # the healthy weights are back
    config = resolve_from_presets(AttackConfig(model="nano", arm="gaussian_noise", match="loss",
                                  reference_checkpoint=str(path), sequence_length=64))  # fmt: skip
    made = prepare_arm(config, fresh, corpus, change)
    assert isinstance(made.arm, NoiseArm)
    target = DamageTarget.of("loss", measured, healthy)
    *_, last = without_safe_points(match_damage(fresh, made.arm, config, probe, healthy, target))
    assert probe.measure(fresh.model).loss == pytest.approx(expected.loss, rel=TOLERANCE)
    # The pattern is one draw: at twice the scale every weight moves twice as far.
    scale = last.diagnostics["noise_scale"]
    for name, delta in change.delta(fresh.model).items():
        torch.testing.assert_close(delta, scale * made.arm.noise[name], rtol=1e-3, atol=1e-5)
