"""Arms whose weights are a function of one strength s, with the healthy model at s = 0."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from healing.attacks.alignment import AlignmentBaselines
from healing.attacks.base import AttackRecord, StepOutcome
from healing.attacks.damage_matching import matched
from healing.attacks.loop import LoopArm
from healing.attacks.weight_change import WeightChange
from healing.config.attack import AttackConfig
from healing.measurements.probe import Measurement, Probe
from healing.models.loading import LoadedModel
from healing.progress import Safe


class StrengthArm(LoopArm):
    """Goes to its full strength in equal parts over the budget, or is matched to a reference.

    Args:
        model: The model under attack.
        baselines: What ρ of the weight change is compared with; ``None`` = it is not measured.
        change: Snapshot of the healthy weights.
        full: Strength after the last step, where nothing is matched.
    """

    # Stopping early would leave the damage smaller than what it is matched to.
    stops_early = False
    resumable = True

    def __init__(
        self,
        model: PreTrainedModel,
        baselines: AlignmentBaselines | None,
        change: WeightChange,
        full: float = 1.0,
    ) -> None:
        self.model, self.baselines, self.change, self.full = model, baselines, change, full

    @abstractmethod
    def weight(self, name: str, healthy: torch.Tensor, strength: float) -> torch.Tensor:
        """A parameter at a strength above 0, from its healthy value (on the CPU), same shape."""

    @torch.no_grad()
    def place(self, strength: float) -> None:
        """Put all weights at a strength; at 0 they are the healthy ones to the last bit."""
        for name, parameter in self.model.named_parameters():
            healthy = self.change.healthy[name]
            parameter.copy_(self.weight(name, healthy, strength) if strength else healthy)

    def run(
        self,
        loaded: LoadedModel,
        config: AttackConfig,
        probe: Probe,
        healthy: Measurement,
        change: WeightChange,
        warmup: Iterable[torch.Tensor] = (),
        kept: Mapping[str, Any] | None = None,
    ) -> Iterator[AttackRecord | Safe]:
        """The common loop, or the search of the strength with another ``match`` than ``norm``.

        Raises:
            MatchError: The reference's damage cannot be reached.
        """
        if not config.reference_checkpoint or config.match == "norm":
            return super().run(loaded, config, probe, healthy, change, warmup, kept)
        return matched(loaded, self, config, probe, healthy, change, kept)

    def advance(
        self, optimizer: torch.optim.Optimizer, step: int, total: int, *, watched: bool
    ) -> StepOutcome:
        """Move every parameter to its place at this step."""
        self.place(self.full * (step / total))
        return StepOutcome()

    def give_gradients(self) -> None:
        """There are none."""

    def diagnostics(self) -> dict[str, float]:
        """ρ of the weight change; there is no objective gradient."""
        if self.baselines is None:
            return {}
        return self.baselines.of_change(self.change.delta(self.model))

    def baselines_now(self) -> dict[str, float]:
        """ρ of other gradients."""
        return {} if self.baselines is None else self.baselines.metrics(self.model)


class NoiseArm(StrengthArm):
    """Adds a fixed perturbation: W₀ + s·E.

    Args:
        model: The model under attack.
        noise: E by parameter name; parameters without stay as they are.
        baselines: What ρ of the weight change is compared with; ``None`` = it is not measured.
        change: Snapshot of the healthy weights.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        noise: Mapping[str, torch.Tensor],
        baselines: AlignmentBaselines | None,
        change: WeightChange,
    ) -> None:
        super().__init__(model, baselines, change)
        self.noise = noise

    def weight(self, name: str, healthy: torch.Tensor, strength: float) -> torch.Tensor:
        """W₀ + s·E."""
        noise = self.noise.get(name)
        return healthy if noise is None else healthy + strength * noise
