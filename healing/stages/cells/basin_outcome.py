"""What a landscape is and what it leaves."""

from __future__ import annotations

import math
import pathlib
from dataclasses import dataclass, field
from typing import Any

from healing.config.basin import BasinConfig
from healing.curvature.escape import Descent
from healing.curvature.loss_landscape import Displacement, LossPath
from healing.curvature.minimum import Evidence, Statement
from healing.curvature.stochastic_lanczos import SpectralDensity
from healing.models.checkpoints import read_checkpoint


@dataclass(frozen=True)
class BasinCell:
    """One landscape: everything that decides its numbers, picklable.

    Attributes:
        config: Resolved configuration (:func:`resolve_from_checkpoint`).
        collapsed: Path of the collapsed checkpoint; empty = the healthy state (a sham).
        healed: Path of the healed checkpoint.
        key: As of :class:`healing.stages.cells.heal_outcome.HealCell`.

    Where nothing is resolved yet, both are empty and the configuration says what is meant.
    """

    config: BasinConfig
    collapsed: str = ""
    healed: str = ""
    key: str = field(default="", compare=False)

    @property
    def arm(self) -> str:
        """The arm whose damage was healed."""
        return str(read_checkpoint(pathlib.Path(self.healed)).config.get("arm", "unknown"))


@dataclass(frozen=True)
class StateReport:
    """What one state shows.

    Attributes:
        evidence: Gradient, curvature, escape.
        statement: Whether it is a minimum.
        density: Quadrature of the Hessian's spectral density.
    """

    evidence: Evidence
    statement: Statement
    density: SpectralDensity

    @property
    def trace(self) -> tuple[float, float]:
        """Of the Hessian, with its standard error over probes (NaN for one)."""
        mean, error = self.density.moment(1)
        return mean * self.density.dimension, error * self.density.dimension

    def metrics(self) -> dict[str, float]:
        """Numbers by name, without the state."""
        g, c, e = self.evidence.gradient, self.evidence.curvature, self.evidence.escape
        further = {f"lambda_max_{i}": v for i, v in enumerate(c.largest[1:], start=2)}
        further |= {f"lambda_min_{i}": v for i, v in enumerate(c.smallest[1:], start=2)}
        return {
            "loss": e.heldout_loss,
            "curvature_batch_loss": e.loss,
            "gradient_norm": g.norm,
            "gradient_squared_norm": g.squared_norm,
            "gradient_squared_norm_error": g.standard_error,
            "gradient_snr": g.snr,
            "least_gain": self.evidence.least_gain,
            "most_gain": self.evidence.most_gain,
            "lambda_max": c.largest[0],
            "lambda_max_residual": c.largest_residuals[0],
            "lambda_min": c.smallest[0],
            "lambda_min_residual": c.smallest_residuals[0],
            **further,
            "trace": self.trace[0],
            "trace_error": self.trace[1],
            "escaped": float(e.escaped) if e.finite else math.nan,
            "escape_loss_drop": e.loss_drop,
            "escape_probe_loss_drop": e.heldout_loss_drop,
            "escape_distance_ratio": e.distance_ratio,
            **_descent("descent", e.unperturbed),
            **_descent("best", e.best),
            **{
                name: value
                for side, descent in zip(("up", "down"), e.along or (None, None), strict=True)
                for name, value in _descent(f"lowest_curvature_{side}", descent).items()
            },
        }


def _descent(name: str, found: Descent | None) -> dict[str, float]:
    """Numbers of one descent; NaN where it was not tried."""
    nan = math.nan
    return {
        f"{name}_loss_drop": found.loss_drop if found else nan,
        f"{name}_probe_loss_drop": found.heldout_drop if found else nan,
        f"{name}_probe_loss_drop_error": found.heldout_error if found else nan,
        f"{name}_distance": found.final_distance if found else nan,
    }


@dataclass(frozen=True)
class BasinOutcome:
    """What a basin cell leaves.

    Attributes:
        cell: What was run.
        fingerprint: Hash of what determined the result.
        made: Configuration stored with the healed checkpoint: arm, lineage.
        n_params: Size of the model.
        digests: Corpus digests by split.
        states: By name, in the order of :data:`STATES`.
        paths: By name, in the order of :data:`PATHS`.
        displacement: Distances and return angle.
    """

    cell: BasinCell
    fingerprint: str
    made: dict[str, Any]
    n_params: int
    digests: dict[str, str]
    states: dict[str, StateReport]
    paths: dict[str, LossPath]
    displacement: Displacement

    def metrics(self) -> dict[str, float]:
        """All final numbers under their MLflow names."""
        d = self.displacement
        found = {
            f"basin/{state}/{name}": value
            for state, report in self.states.items()
            for name, value in report.metrics().items()
        }
        for name, path in self.paths.items():
            found[f"basin/barrier/{name}"] = path.barrier
            found[f"basin/barrier_position/{name}"] = 100 * path.barrier_position
            found[f"basin/climb/{name}"] = path.climb
        return found | {
            "basin/healthy_norm": d.healthy_norm,
            "basin/attack_norm": d.attack_norm,
            "basin/healing_norm": d.healing_norm,
            "basin/remaining_norm": d.remaining_norm,
            "basin/relative_attack_norm": d.attack_norm / d.healthy_norm,
            "basin/relative_healing_norm": d.healing_norm / d.healthy_norm,
            "basin/relative_remaining_norm": d.remaining_norm / d.healthy_norm,
            "basin/return_cosine": d.return_cosine,
            "basin/return_share": d.return_share,
        }

    def statements(self) -> dict[str, str]:
        """``collapsed_is_minimum`` and so on: yes, no, flat within 0.01 nats or undetermined."""
        return {f"{state}_is_minimum": r.statement.answer for state, r in self.states.items()}
