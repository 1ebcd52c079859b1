"""Times of a dry run: counts against the plan, sums by hand; what is timed takes what it takes."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from entrypoints.heal import main as heal_command
from healing.attacks.loop import diagnosed
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.resolve import resolve_from_presets
from healing.models.loading import load_model
from healing.stages.dry_run import stage, timing
from healing.stages.dry_run.plan import attack_measurements
from healing.stages.dry_run.timing import Cost, attack_costs, duration, healing_costs, in_words


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (9.4, "9.4 s"), (9.6, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
     (200, "3 min 20 s"), (3599.6, "1 h 0 min"), (18_610, "5 h 10 min")],
)  # fmt: skip
def test_durations_are_said_as_people_say_them(seconds, text):
    assert duration(seconds) == text


def test_a_sum_names_its_parts():
    costs = [Cost("loading", 1, 6.5), Cost("steps", 1_000, 0.25), Cost("none of these", 0, 3.0)]
    assert in_words("heal", costs) == (
        "heal: about 4 min 16 s here\n  loading 6.5 s, 1,000 steps 4 min 10 s (0.25 s each)"
    )


@pytest.fixture
def two_seconds_each(monkeypatch):
    """Everything is really done, and is said to take two seconds."""
    done = []

    def two_seconds(work, device):
        work()
        done.append(work)
        return 2.0

    monkeypatch.setattr(timing, "seconds_of", two_seconds)
    return done


SMALL = {"model": "nano", "probe_tokens": 640, "sequence_length": 64, "batch_size": 2}
NO_CURVE = {"trajectory_interval": 0}


def as_table(costs: list[Cost]) -> dict[str, tuple[int, float]]:
    return {cost.what: (cost.count, cost.seconds) for cost in costs}


@pytest.mark.parametrize("arm", ["haep", "haep_oracle", "spectral", "gaussian_noise", "none",
                                 "reinitialised"])  # fmt: skip
def test_an_attacks_costs_are_those_of_its_plan(arm, two_seconds_each):
    config = AttackConfig(**SMALL, **NO_CURVE, arm=arm, attack_steps=25, search_steps=5,
        search_candidates=4, baseline_draws=10, rayleigh_draws=3, curvature_tokens=128)  # fmt: skip
    costs = as_table(attack_costs(resolve_from_presets(config), load_model("nano")))
    steps = {"none": 0, "reinitialised": 1}.get(arm, 25)
    # Every 10 steps and at the last one; both ends have standard errors.
    records = {0: 0, 1: 1, 25: 3}[steps]
    expected = {"steps": (steps, 2.0 if steps else 0.0), "measurements": (records, 2.0),
                "with standard errors": (2, 2.0)}  # fmt: skip
    # Diagnosed at the start too, and compared with baselines at both ends.
    expected["diagnostics"] = (1, 2.0 * (records + 1) + 2.0 * min(records + 1, 2))
    if arm.startswith("haep"):
        # Nano's blocks hold matrices of four shapes: each is timed once and counts four times.
        expected["bases"] = (1, 4 * 4 * 2.0)
        # Five rounds, the start, and ten random sequences, as dear as 2.5 times four candidates.
        expected["rounds of the search"] = (5 + 1 + 2, 2.0)
        expected["curvature ranks"] = (1, pytest.approx(2.0 * (3.5 + 3 * 2.2)))
    assert costs == expected


def test_noise_whose_alignment_is_asked_for_pays_for_the_bases(two_seconds_each):
    config = AttackConfig(**SMALL, **NO_CURVE, arm="gaussian_noise", alignment="always",
                          attack_steps=40, baseline_interval=2)  # fmt: skip
    costs = as_table(attack_costs(resolve_from_presets(config), load_model("nano")))
    assert costs["bases"] == (1, 4 * 4 * 2.0)
    # Records 0 to 4 and their baselines at 0, 2 and 4.
    assert costs["diagnostics"] == (1, 2.0 * 5 + 2.0 * 3)


@pytest.mark.parametrize("steps", [0, 1, 6, 25, 30])
@pytest.mark.parametrize(("deciding", "shown"), [(10, 0), (10, 1), (10, 2), (4, 6), (5, 5), (3, 7)])
def test_measurements_of_a_curve_are_counted_as_the_loop_takes_them(steps, deciding, shown):
    config = AttackConfig(model="nano", measurement_interval=deciding, trajectory_interval=shown)
    taken = {n for n in range(1, steps + 1) if n % deciding == 0 or n == steps}
    taken |= {n for n in range(1, steps + 1) if shown and n % shown == 0}
    assert attack_measurements(steps, config) == 2 + len(taken)


def test_the_points_of_a_curve_are_paid_for(two_seconds_each):
    """25 steps: every second and the last, of which 10 and 20 decide with it; baselines are taken
    at the ends and at every second of those four that decide (0, 10, 20, 25).
    """
    config = AttackConfig(**SMALL, arm="random_tokens", attack_steps=25, trajectory_interval=2,
                          baseline_interval=2)  # fmt: skip
    costs = as_table(attack_costs(resolve_from_presets(config), load_model("nano")))
    assert costs["measurements"] == (13, 2.0)
    assert costs["diagnostics"] == (1, 2.0 * 14 + 2.0 * 3)


@pytest.mark.parametrize(
    ("records", "interval", "times"), [(1, 0, 1), (2, 0, 2), (5, 0, 2), (5, 3, 3), (5, 1, 5)]
)
def test_baselines_are_counted_as_the_loop_takes_them(records, interval, times):
    class Counting:
        def diagnostics(self):
            return {}

        def baselines_now(self):
            return {"taken": 1.0}

    config = AttackConfig(model="nano", baseline_interval=interval)
    taken = [
        diagnosed(Counting(), config, number, last=number == records - 1)
        for number in range(records)
    ]
    assert sum(map(bool, taken)) == times
    assert timing._comparisons(records, interval) == times


def test_warm_up_batches_are_counted(two_seconds_each):
    config = AttackConfig(**SMALL, arm="random_tokens", attack_steps=3, warmup_steps=7)
    costs = as_table(attack_costs(resolve_from_presets(config), load_model("nano")))
    assert costs["warm-up batches"] == (7, 2.0)


@pytest.mark.parametrize(("sham", "arm", "runs"), [(False, "haep", 3), (True, "haep", 6),
                                                   (True, "none", 3)])  # fmt: skip
def test_healings_costs_count_every_run_and_sham(two_seconds_each, sham, arm, runs):
    config = HealConfig(**SMALL, healing_steps=30, num_runs=3, sham=sham, arm=arm)
    costs = as_table(healing_costs(resolve_from_presets(config), load_model("nano")))
    assert costs == {"steps": (30 * runs, 2.0), "measurements": (3 * runs, 2.0),
                     "with standard errors": (2 * runs, 2.0)}  # fmt: skip


def test_a_measurement_is_a_line_through_two_short_ones(monkeypatch):
    """512 tokens in 3 s and 1,024 in 5 s: 2 s of every 512, and 1 s whatever their number; the
    error took the shorter one 7 s more.
    """
    answers = iter([3.0, 5.0, 10.0])
    monkeypatch.setattr(timing, "seconds_of", lambda work, device: next(answers))
    config = resolve_from_presets(HealConfig(model="nano", probe_tokens=8192, sequence_length=64))
    plain, with_error = timing._measurements(config, load_model("nano"), 5, 3)
    assert (plain.count, plain.seconds) == (15, pytest.approx(1.0 + 16 * 2.0))
    assert (with_error.count, with_error.seconds) == (6, pytest.approx(33.0 + 7.0))


@pytest.mark.parametrize(
    ("wanted", "model", "here", "why"),
    [
        ("auto", "70m", True, "--time-steps true loads the model"),
        ("false", "nano", True, "--time-steps true loads the model"),
        ("true", "70m", False, "would have to be downloaded first"),
        ("auto", "nano", True, ""),
        ("true", "70m", True, ""),
    ],
)
def test_why_no_time_is_estimated(monkeypatch, wanted, model, here, why):
    monkeypatch.setattr(stage, "weights_are_here", lambda *_: here)
    config = resolve_from_presets(AttackConfig(model=model, time_steps=wanted))
    found = stage._no_estimate(config, config)
    assert why in found
    assert bool(found) is bool(why)


@pytest.mark.slow
def test_the_command_prints_both_stages_times(store):
    done = CliRunner().invoke(
        heal_command, "--model nano --dry-run true --num-runs 2 --probe-tokens 512".split()
    )
    assert done.exit_code == 0, done.output
    attack, heal = (line for line in done.output.splitlines() if line.endswith(" here"))
    assert attack.startswith("attack: about ")
    assert heal.startswith("heal: about ")
    assert "1,000 steps" in done.output
    assert "no time is estimated" not in done.output
