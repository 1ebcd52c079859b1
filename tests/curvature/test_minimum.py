"""The statement: a truth table, and that each side of every rule matters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from healing.curvature.escape import Descent, Escape
from healing.curvature.gradient_noise import GradientStatistics
from healing.curvature.minimum import FLAT, Curvature, Evidence, is_minimum

NAN = math.nan
QUIET = GradientStatistics(0.1, 0.001, 0.01, 0.009, 12)
SLIGHT = replace(QUIET, squared_norm=0.04)  # gains 0.0005 to 0.007 nats
LOUD = replace(QUIET, squared_norm=0.25)  # gains 0.011 nats at least
BOWL = Curvature((10.0,), (0.5,), (0.001,), (0.001,), "converged", 20)
SADDLE = replace(BOWL, smallest=(-0.0101,))
NOTHING = Descent(1.0, 0.5, 0.0, -0.001, 0.001)
DOWN = Descent(1.0, 5.0, 0.0, 0.05, 0.01)
STAYED = Escape(3.0, 3.0, 0.1, 20.0, NOTHING, (NOTHING,))
MINIMUM = Evidence(QUIET, BOWL, STAYED)
BESIDE = "descent beside the state"


def answer(**changes) -> tuple[str, str]:
    found = is_minimum(replace(MINIMUM, **changes))
    return found.answer, found.because


def test_a_minimum():
    assert answer()[0] == "yes"
    # Negative within rounding, 1e-5 of 10, is zero; so is what is worth 0.01 nats nowhere.
    assert answer(curvature=replace(BOWL, smallest=(-9e-5,), smallest_residuals=(0.0,)))[0] == "yes"
    small = replace(BOWL, smallest=(1e-6,), smallest_residuals=(4e-5,))
    assert answer(curvature=small)[0] == "yes"
    assert answer(gradient=replace(QUIET, squared_norm=-0.5))[0] == "yes"
    # Significant, but less than float32 can show of a loss of 3 nats.
    assert answer(gradient=GradientStatistics(1e-3, 1e-6, 1e-9, 0.0, 12))[0] == "yes"


def test_bounds_of_the_gain():
    """0.25 ± 3·0.01, λ_max 10, λ_min -0.0111 at least: half over 10, and the whole over 10."""
    evidence = Evidence(LOUD, SADDLE, STAYED)
    assert evidence.least_gain == pytest.approx((0.25 - 0.03) / 20)
    assert evidence.most_gain == pytest.approx((0.25 + 0.03) / 10 * (1 + 0.0111 / 20))
    # A direction of curvature κ gains |g|²·(1 - κ/2λ)/λ by that step: between the bounds.
    for curvature in (10.0, 3.0, 0.0, -0.0111):
        gain = 0.25 / 10 - 0.5 * curvature * 0.25 / 10**2
        assert evidence.least_gain <= gain <= evidence.most_gain


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"gradient": LOUD}, "a step along the gradient gains at least 0.011 nats"),
        (
            {"escape": replace(STAYED, unperturbed=DOWN)},
            "descent lowers the held-out loss by 0.05 ± 0.01 nats",
        ),
        (
            {"curvature": SADDLE, "escape": replace(STAYED, along=(NOTHING, DOWN))},
            f"a direction of negative curvature exists, and {BESIDE} lowers the held-out loss by "
            "0.05 ± 0.01 nats",
        ),
        (
            {"curvature": SADDLE, "escape": replace(STAYED, perturbed=(NOTHING, DOWN))},
            f"a direction of negative curvature exists, and {BESIDE} lowers the held-out loss by "
            "0.05 ± 0.01 nats",
        ),
        # The descent beside it is what the gradient does.
        (
            {"curvature": SADDLE, "escape": Escape(3, 3, 0.1, 20, DOWN, (DOWN,), (DOWN, DOWN))},
            "descent lowers the held-out loss by 0.05 ± 0.01 nats",
        ),
        # One side that can be said suffices where the other cannot.
        (
            {
                "escape": replace(STAYED, unperturbed=DOWN),
                "curvature": replace(BOWL, smallest=(NAN,)),
            },
            "descent lowers the held-out loss by 0.05 ± 0.01 nats",
        ),
    ],
)
def test_not_a_minimum(changes, because):
    assert answer(**changes) == ("no", because)


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"gradient": SLIGHT}, "the gradient is not zero"),
        # A Rayleigh quotient below zero is proof whatever its residual.
        (
            {"curvature": replace(SADDLE, smallest=(-0.01,), smallest_residuals=(5.0,))},
            "a direction of negative curvature exists",
        ),
        (
            {"gradient": SLIGHT, "curvature": SADDLE},
            "the gradient is not zero and a direction of negative curvature exists",
        ),
    ],
)
def test_flat(changes, because):
    expected = f"{because}, but no step and no descent gains 0.01 nats"
    assert answer(**changes) == (FLAT, expected)
    assert FLAT == "flat within 0.01 nats"


LOST = Curvature((NAN,), (NAN,), (NAN,), (NAN,), "nonfinite", 1)


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        (
            {"curvature": replace(BOWL, smallest_residuals=(0.511,))},
            "the lowest eigenvalue is not known well enough (it may be -0.011, worth 2.2 nats at a "
            "distance of ‖W‖: more iterations may tell)",
        ),
        (
            # Not significant, and not known to be small either.
            {"gradient": replace(QUIET, squared_norm=0.025, standard_error=0.09)},
            "the gradient is not known well enough (a step along it gains -0.012 to 0.03 nats: "
            "more batches may tell)",
        ),
        (
            {"escape": replace(STAYED, perturbed=(DOWN,))},
            "descent beside the state finds a lower held-out loss although neither gradient nor "
            "curvature says why",
        ),
        (
            {"escape": replace(STAYED, perturbed=(replace(NOTHING, heldout_error=0.004),))},
            "the held-out loss is not known well enough (a descent lowers it by -0.001 ± 0.004 "
            "nats: a larger probe may tell)",
        ),
        (
            {"escape": replace(STAYED, unperturbed=replace(NOTHING, heldout_error=NAN))},
            "one held-out window gives no error",
        ),
        ({"curvature": LOST}, "the curvature is not finite"),
        ({"gradient": GradientStatistics(NAN, NAN, NAN, NAN, 12)}, "the gradient is not finite"),
        ({"escape": Escape(3.0, 3.0, NAN, 20.0, reason="no step")}, "no step"),
        (
            {"escape": replace(STAYED, perturbed=(Descent(1, 1, NAN, NAN, NAN),))},
            "the loss is not finite after a descent",
        ),
    ],
)
def test_undetermined(changes, because):
    assert answer(**changes) == ("undetermined", because)


def test_no_curvature_at_all_is_undetermined():
    none = Curvature((0.0,), (0.0,), (0.0,), (0.0,), "breakdown", 2)
    away = Escape(3.0, 3.0, NAN, 20.0, reason="no curvature to take the step size from")
    assert answer(curvature=none, escape=away) == ("undetermined", away.reason)


def test_a_state_that_cannot_compute_is_undetermined_and_its_evidence_can_be_written():
    gradient = GradientStatistics(NAN, NAN, NAN, NAN, 12)
    away = Escape(NAN, NAN, NAN, NAN, reason="no curvature to take the step size from")
    found = is_minimum(Evidence(gradient, LOST, away))
    assert found.answer == "undetermined"
    assert "descent not tried (no curvature" in found.evidence


def test_the_evidence_names_every_number():
    text = is_minimum(replace(MINIMUM, escape=replace(STAYED, along=(DOWN, NOTHING)))).evidence
    for part in (
        "0.001 with standard error 0.01 over 12 batches",
        "signal to noise 0.111",
        "a step along the gradient gains -0.0014 to 0.0031 nats",
        "from 0.5 (residual 0.001) to 10 (residual 0.001), converged",
        "descent lowers the held-out loss by -0.001 ± 0.001 nats",
        "from 1 random perturbations by -0.001 ± 0.001",
        "both ways along the lowest curvature by 0.05 ± 0.01, -0.001 ± 0.001",
    ):
        assert part in text
