"""Is a state a minimum of the loss? The statement, as a pure function of its evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from healing.curvature.escape import SMALL_GAIN, STANDARD_ERRORS, Descent, Escape
from healing.curvature.gradient_noise import GradientStatistics

PRODUCT_ROUNDING = 1e-5
"""Share of the largest |eigenvalue| that rounding of a float32 Hessian product can put into a
Rayleigh quotient: six times the most that was seen (1.6e-6, nano, collapsed)."""

LOSS_ROUNDING = 2.0**-23
"""Share of a loss that float32 cannot show."""

YES, NO, UNDETERMINED = "yes", "no", "undetermined"
FLAT = f"flat within {SMALL_GAIN:g} nats"


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

    @property
    def steepness(self) -> float:
        """λ_max, or the largest |eigenvalue| where none is positive: descent by its inverse is
        stable, and to second order gains half of the squared gradient over it at least.
        """
        return self.largest[0] if self.largest[0] > 0 else self.scale

    @property
    def rounding(self) -> float:
        """What in a Rayleigh quotient is rounding."""
        return PRODUCT_ROUNDING * self.scale

    @property
    def lower_bound(self) -> float:
        """The lowest Ritz value less its residual: where the lowest eigenvalue lies at least, if
        it is the one that the search converges to.
        """
        return self.smallest[0] - self.smallest_residuals[0]

    @property
    def is_negative(self) -> bool:
        """Whether a direction of negative curvature is at hand.

        The lowest Ritz value is a Rayleigh quotient, and no Rayleigh quotient lies below the
        lowest eigenvalue: negative beyond rounding it is proof, whatever its residual.
        """
        return self.smallest[0] < -self.rounding


@dataclass(frozen=True)
class Evidence:
    """What is known about one state.

    Attributes:
        gradient: Over batches.
        curvature: On the fixed batch.
        escape: Descents, judged on held-out text.
    """

    gradient: GradientStatistics
    curvature: Curvature
    escape: Escape

    @property
    def least_gain(self) -> float:
        """(‖G‖² - 3 standard errors)/(2·λ_max), nats: what one step of 1/λ_max along the gradient
        gains at least, since no curvature along it exceeds λ_max. Can be negative.
        """
        return self._gain(self.gradient.squared_norm, -1.0) / 2.0

    @property
    def most_gain(self) -> float:
        """(‖G‖² + 3 standard errors)/λ_max·(1 + |λ_min|/(2·λ_max)), nats: what that step gains at
        most, to second order; λ_min by its lower bound, 0 where that is not negative. Not rejecting
        a zero gradient does not show that it is zero.
        """
        squared = max(0.0, self.gradient.squared_norm)
        bend = max(0.0, -self.curvature.lower_bound) / (2.0 * self.curvature.steepness or math.nan)
        return self._gain(squared, 1.0) * (1.0 + bend)

    def _gain(self, squared: float, sign: float) -> float:
        if not self.curvature.steepness > 0:
            return math.nan
        margin = sign * STANDARD_ERRORS * self.gradient.standard_error
        return (squared + margin) / self.curvature.steepness

    @property
    def hidden_gain(self) -> float:
        """-λ·‖W‖²/2 of the lower bound λ of the lowest eigenvalue, 0 where that is not below
        rounding: what a direction that the search did not find could gain at most, to second
        order, at the distance from the state to which descents along the lowest curvature go.
        """
        bound = self.curvature.lower_bound
        if bound >= -self.curvature.rounding:
            return 0.0
        return -bound * self.escape.weight_norm**2 / 2.0

    @property
    def gradient_is_nonzero(self) -> bool:
        """Whether ‖G‖² exceeds three of its standard errors, and a step along it could change the
        loss by more than float32 rounds off.
        """
        significant = self.gradient.squared_norm > STANDARD_ERRORS * self.gradient.standard_error
        return significant and self.most_gain > LOSS_ROUNDING * abs(self.escape.heldout_loss)


@dataclass(frozen=True)
class Statement:
    """An answer with its evidence.

    Attributes:
        answer: ``yes``, ``no``, ``flat within 0.01 nats`` or ``undetermined``.
        because: What decided it, in words.
        evidence: Everything looked at, with numbers, in one sentence.
    """

    answer: str
    because: str
    evidence: str


def is_minimum(evidence: Evidence) -> Statement:
    """Whether a state is a local minimum, as far as the evidence goes.

    ``no``: 0.01 nats or more can be gained from there. Either the gradient says so (the lower
    bound of what a step gains), or descent from the state itself lowers the held-out loss by as
    much, or negative curvature is proven and descent beside the state does. ``flat within 0.01
    nats``: the gradient is not zero or a curvature is negative, but nothing gains that much.
    ``yes``: neither, the lowest eigenvalue is known not to be negative, and nothing gains that
    much. Otherwise ``undetermined``, with what is missing.
    """
    against, missing, slight = _against(evidence), _missing(evidence), _slight(evidence)
    if against:
        answer, because = NO, " and ".join(against)
    elif missing:
        answer, because = UNDETERMINED, " and ".join(missing)
    elif slight:
        answer = FLAT
        because = f"{' and '.join(slight)}, but no step and no descent gains {SMALL_GAIN:g} nats"
    else:
        answer = YES
        because = (
            "the gradient cannot be told from zero, no curvature is negative beyond rounding, "
            f"and no descent gains {SMALL_GAIN:g} nats"
        )
    return Statement(answer, because, sentence(evidence))


def _against(evidence: Evidence) -> list[str]:
    against, tried = [], evidence.escape
    if evidence.least_gain > SMALL_GAIN:
        against.append(f"a step along the gradient gains at least {evidence.least_gain:.2g} nats")
    if tried.unperturbed and tried.unperturbed.escaped:
        against.append(f"descent lowers the held-out loss by {_size(tried.unperturbed)} nats")
    beside = [d for d in (*tried.perturbed, *tried.along) if d.escaped]
    # Where the gradient leads away by itself, descent beside the state is no sign of a saddle.
    if evidence.curvature.is_negative and beside and not against:
        best = max(beside, key=lambda d: d.least_gain)
        against.append(
            "a direction of negative curvature exists, and descent beside the state lowers the "
            f"held-out loss by {_size(best)} nats"
        )
    return against


def _size(descent: Descent) -> str:
    return f"{descent.heldout_drop:.2g} ± {descent.heldout_error:.1g}"


def _slight(evidence: Evidence) -> list[str]:
    slight = []
    if evidence.gradient_is_nonzero:
        slight.append("the gradient is not zero")
    if evidence.curvature.is_negative:
        slight.append("a direction of negative curvature exists")
    return slight


def _missing(evidence: Evidence) -> list[str]:
    curvature, tried = evidence.curvature, evidence.escape
    if not evidence.gradient.finite:
        return ["the gradient is not finite"]
    if not curvature.finite:
        return ["the curvature is not finite"]
    missing = []
    if not evidence.most_gain < SMALL_GAIN and not tried.reason:
        missing.append(
            f"the gradient is not known well enough (a step along it gains "
            f"{evidence.least_gain:.2g} to {evidence.most_gain:.2g} nats: more batches may tell)"
        )
    # Where one is known to be negative, descent along it has shown what it is worth.
    if not curvature.is_negative and not evidence.hidden_gain < SMALL_GAIN:
        missing.append(
            "the lowest eigenvalue is not known well enough (it may be "
            f"{curvature.lower_bound:.2g}, worth {evidence.hidden_gain:.2g} nats at a distance of "
            "‖W‖: more iterations may tell)"
        )
    if tried.reason:
        missing.append(tried.reason)
    elif not tried.finite:
        missing.append("the loss is not finite after a descent")
    elif any(math.isnan(d.heldout_error) for d in tried.descents):
        missing.append("one held-out window gives no error")
    elif any(d.escaped for d in tried.perturbed):
        missing.append("descent beside the state finds a lower held-out loss although neither "
                       "gradient nor curvature says why")  # fmt: skip
    else:
        best = max(tried.descents, key=lambda d: d.most_gain)
        if best.most_gain >= SMALL_GAIN:
            missing.append(
                f"the held-out loss is not known well enough (a descent lowers it by {_size(best)} "
                "nats: a larger probe may tell)"
            )
    return missing


def sentence(evidence: Evidence) -> str:
    """All evidence with its numbers."""
    g, c = evidence.gradient, evidence.curvature
    return (
        f"unbiased squared gradient norm {g.squared_norm:.3g} with standard error "
        f"{g.standard_error:.2g} over {g.batches} batches (signal to noise {g.snr:.3g}), so that a "
        f"step along the gradient gains {evidence.least_gain:.2g} to {evidence.most_gain:.2g} "
        f"nats; eigenvalues from {c.smallest[0]:.4g} (residual {c.smallest_residuals[0]:.1g}) to "
        f"{c.largest[0]:.4g} (residual {c.largest_residuals[0]:.1g}), {c.status}; "
        f"{_descents_text(evidence.escape)}"
    )


def _descents_text(tried: Escape) -> str:
    if tried.reason or not tried.unperturbed:
        return f"descent not tried ({tried.reason})"
    parts = [f"descent lowers the held-out loss by {_size(tried.unperturbed)} nats"]
    if tried.perturbed:
        parts.append(f"from {len(tried.perturbed)} random perturbations by "
                     + ", ".join(map(_size, tried.perturbed)))  # fmt: skip
    if tried.along:
        parts.append("both ways along the lowest curvature by "
                     + ", ".join(map(_size, tried.along)))  # fmt: skip
    return ", ".join(parts)
