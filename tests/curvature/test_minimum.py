"""The statement: a truth table, and that each side of every rule matters."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from healing.curvature.escape import Descent, Escape
from healing.curvature.gradient_noise import GradientStatistics
from healing.curvature.minimum import Curvature, Evidence, is_minimum

QUIET = GradientStatistics(0.1, 0.001, 0.01, 0.009, 12)
LOUD = replace(QUIET, squared_norm=0.0301)
BOWL = Curvature((10.0,), (0.5,), (0.001,), (0.001,), "converged", 20)
SADDLE = replace(BOWL, smallest=(-0.0101,))
STAYED = Escape(3.0, 3.0, 0.1, Descent(0, 0, 3, 3, 3), (Descent(1, 0.5, 3.01, 3.0, 3.0),))
LEFT = replace(STAYED, perturbed=(Descent(1, 5.0, 3.01, 2.0, 2.0),))
MINIMUM = Evidence(QUIET, BOWL, STAYED, 1e-3)


def answer(**changes) -> tuple[str, str]:
    found = is_minimum(replace(MINIMUM, **changes))
    return found.answer, found.because


def test_a_minimum():
    assert answer()[0] == "yes"
    # A little negative within the tolerance of 1e-3·10 is zero.
    assert answer(curvature=replace(BOWL, smallest=(-0.0099,)))[0] == "yes"
    assert answer(gradient=replace(QUIET, squared_norm=-0.5))[0] == "yes"


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        ({"gradient": LOUD}, "the gradient is not zero"),
        ({"curvature": SADDLE}, "a direction of negative curvature exists"),
        (
            {"gradient": LOUD, "curvature": SADDLE},
            "the gradient is not zero and a direction of negative curvature exists",
        ),
        # A Rayleigh quotient below zero is proof whatever its residual.
        (
            {"curvature": replace(SADDLE, smallest=(-1.0,), smallest_residuals=(5.0,))},
            "a direction of negative curvature exists",
        ),
        # One side that can be said suffices where the other cannot.
        (
            {"gradient": LOUD, "curvature": replace(BOWL, largest=(math.nan,))},
            "the gradient is not zero",
        ),
    ],
)
def test_not_a_minimum(changes, because):
    assert answer(**changes) == ("no", because)


NAN = math.nan
LOST = Curvature((NAN,), (NAN,), (NAN,), (NAN,), "nonfinite", 1)


@pytest.mark.parametrize(
    ("changes", "because"),
    [
        (
            {"curvature": replace(BOWL, smallest_residuals=(0.011,))},
            "the lowest eigenvalue did not converge",
        ),
        (
            # Not significant, and not known to be small either: 0.025 + 3·0.09 over 2·10.
            {"gradient": replace(QUIET, squared_norm=0.025, standard_error=0.09)},
            "the gradient is not known well enough (a step along it could gain 0.015 nats)",
        ),
        ({"escape": LEFT}, "perturbations led away although nothing says why"),
        ({"curvature": LOST}, "the curvature is not finite"),
        ({"gradient": GradientStatistics(NAN, NAN, NAN, NAN, 12)}, "the gradient is not finite"),
        ({"escape": replace(STAYED, perturbed=(), reason="no step")}, "no step"),
        (
            {"escape": replace(STAYED, perturbed=(Descent(1, 1, 3, NAN, NAN),))},
            "the loss is not finite after a perturbation",
        ),
    ],
)
def test_undetermined(changes, because):
    assert answer(**changes) == ("undetermined", because)


def test_a_state_that_cannot_compute_is_undetermined_and_its_evidence_can_be_written():
    gradient = GradientStatistics(NAN, NAN, NAN, NAN, 12)
    away = Escape(NAN, NAN, NAN, reason="no positive curvature to take the step size from")
    found = is_minimum(Evidence(gradient, LOST, away, 1e-3))
    assert found.answer == "undetermined"
    assert "escape not tried (no positive curvature" in found.evidence


def test_the_evidence_names_every_number():
    text = is_minimum(MINIMUM).evidence
    for part in (
        "0.001 with standard error 0.01 over 12 batches",
        "signal to noise 0.111",
        "from 0.5 (residual 0.001) to 10 (residual 0.001), converged",
        "0 of 1 perturbations escaped (distance x 0.5",
        "mean loss drop 0 nats on the batch descended, 0 on the probe",
        "unperturbed 0 and 0)",
    ):
        assert part in text
