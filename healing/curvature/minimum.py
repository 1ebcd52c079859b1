"""Is a state a minimum of the loss? The statement, as a pure function of its evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from healing.curvature.escape import Escape
from healing.curvature.gradient_noise import GradientStatistics

STANDARD_ERRORS = 3.0
"""A squared gradient norm beyond so many of its standard errors is not zero."""

SMALL_GAIN = 0.01
"""Nats per token: what the gradient may still be able to gain, by its upper bound, in a minimum."""

YES, NO, UNDETERMINED = "yes", "no", "undetermined"


@dataclass(frozen=True)
class Curvature:
    """Extreme eigenvalues of the Hessian at a state.

    Attributes:
        largest: Algebraically largest, descending, nats per token per squared unit of weight.
        smallest: Algebraically smallest, ascending.
        largest_residuals: ‖Hq - λq‖ of each of `largest`.
        smallest_residuals: The same of `smallest`.
        status: How the iteration ended.
        products: Hessian products spent.
    """

    largest: tuple[float, ...]
    smallest: tuple[float, ...]
    largest_residuals: tuple[float, ...]
    smallest_residuals: tuple[float, ...]
    status: str
    products: int

    @property
    def scale(self) -> float:
        """The largest |eigenvalue|."""
        return max(abs(self.largest[0]), abs(self.smallest[0]))

    @property
    def finite(self) -> bool:
        """Whether the Hessian could be multiplied with."""
        return math.isfinite(self.scale)


@dataclass(frozen=True)
class Evidence:
    """What is known about one state.

    Attributes:
        gradient: Over batches.
        curvature: On the fixed batch.
        escape: After perturbations, on the same batch.
        tolerance: Share of the largest |eigenvalue| that counts as zero.
    """

    gradient: GradientStatistics
    curvature: Curvature
    escape: Escape
    tolerance: float

    @property
    def gain_bound(self) -> float:
        """(‖G‖² + 3 standard errors)/(2·λ_max): most that one step of 1/λ_max along the gradient
        gains to second order, nats. Not rejecting a zero gradient does not show that it is zero.
        """
        if not self.curvature.largest[0] > 0:
            return math.inf
        g = self.gradient
        bound = max(0.0, g.squared_norm) + STANDARD_ERRORS * g.standard_error
        return bound / (2.0 * self.curvature.largest[0])

    @property
    def gradient_is_nonzero(self) -> bool:
        """Whether the unbiased ‖G‖² exceeds three of its standard errors."""
        return self.gradient.squared_norm > STANDARD_ERRORS * self.gradient.standard_error

    @property
    def curvature_is_negative(self) -> bool:
        """Whether a direction of negative curvature is at hand.

        The lowest Ritz value is a Rayleigh quotient, and no Rayleigh quotient lies below the
        lowest eigenvalue: negative beyond rounding (the tolerance) it is proof, whatever its
        residual.
        """
        return self.curvature.smallest[0] < -self.tolerance * self.curvature.scale

    @property
    def lowest_converged(self) -> bool:
        """Whether the lowest Ritz value is an eigenvalue, within the tolerance."""
        return self.curvature.smallest_residuals[0] <= self.tolerance * self.curvature.scale


@dataclass(frozen=True)
class Statement:
    """An answer with its evidence.

    Attributes:
        answer: ``yes``, ``no`` or ``undetermined``.
        because: What decided it, in words.
        evidence: Everything looked at, with numbers, in one sentence.
    """

    answer: str
    because: str
    evidence: str


def is_minimum(evidence: Evidence) -> Statement:
    """Whether a state is a local minimum, as far as the evidence goes.

    ``no``: the gradient is significantly not zero, or negative curvature is proven; either
    suffices. ``yes``: neither, the lowest eigenvalue converged, and no perturbation escaped.
    Otherwise ``undetermined``, with what is missing.
    """
    against = []
    if evidence.gradient_is_nonzero:
        against.append("the gradient is not zero")
    if evidence.curvature_is_negative:
        against.append("a direction of negative curvature exists")
    missing = [] if against else _missing(evidence)
    if against:
        answer, because = NO, " and ".join(against)
    elif missing:
        answer, because = UNDETERMINED, " and ".join(missing)
    else:
        answer = YES
        because = (
            "the gradient cannot be told from zero, no curvature is negative beyond the "
            "tolerance, and no perturbation escaped"
        )
    return Statement(answer, because, sentence(evidence))


def _missing(evidence: Evidence) -> list[str]:
    if not evidence.gradient.finite:
        return ["the gradient is not finite"]
    if not evidence.curvature.finite:
        return ["the curvature is not finite"]
    missing = []
    if not evidence.gain_bound < SMALL_GAIN:
        missing.append(
            f"the gradient is not known well enough (a step along it could gain "
            f"{evidence.gain_bound:.2g} nats)"
        )
    if not evidence.lowest_converged:
        missing.append("the lowest eigenvalue did not converge")
    if evidence.escape.reason:
        missing.append(evidence.escape.reason)
    elif not evidence.escape.finite:
        missing.append("the loss is not finite after a perturbation")
    elif evidence.escape.escaped:
        missing.append("perturbations led away although nothing says why")
    return missing


def sentence(evidence: Evidence) -> str:
    """All evidence with its numbers."""
    g, c, e = evidence.gradient, evidence.curvature, evidence.escape
    tried = (
        f"{e.escaped} of {len(e.perturbed)} perturbations escaped (distance x "
        f"{e.distance_ratio:.3g}, mean loss drop {e.loss_drop:.3g} nats on the batch descended, "
        f"{e.heldout_loss_drop:.3g} on the probe; unperturbed "
        f"{e.loss - e.unperturbed.final_loss:.3g} and "
        f"{e.heldout_loss - e.unperturbed.final_heldout_loss:.3g})"
        if e.perturbed and e.unperturbed
        else f"escape not tried ({e.reason})"
    )
    return (
        f"unbiased squared gradient norm {g.squared_norm:.3g} with standard error "
        f"{g.standard_error:.2g} over {g.batches} batches (signal to noise {g.snr:.3g}); "
        f"eigenvalues from {c.smallest[0]:.4g} (residual {c.smallest_residuals[0]:.1g}) to "
        f"{c.largest[0]:.4g} (residual {c.largest_residuals[0]:.1g}), {c.status}; {tried}"
    )
