"""What every rank does with its part of one model: the same calls, in the same order, on all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from healing.config.heal import HealConfig
from healing.measurements.continuations import continued
from healing.measurements.diagnosis import Failure
from healing.measurements.probe import Measurement, Probe
from healing.models.token_loss import training_loss
from healing.training.nonfinite import failure_before_training
from healing.training.parallel.group import Place
from healing.training.parallel.sharding import (
    own_bytes,
    set_optimizer,
    set_weights,
    spread,
    whole_optimizer,
    whole_weights,
)
from healing.training.trainer import Trainer


class Worker:
    """One rank's part of a model.

    Args:
        place: Of this rank.
        config: Resolved configuration.
        bare: The model without weights; the ranks' model is made of it.
        plain: Whether its logits are its output matrix times its last hidden state.
        probe: Of the whole run.
        threads: CPU threads of this process.

    Attributes:
        model: Its weights are spread over the ranks.
        probe: The same windows; this rank passes its share.
        trainer: Once training began.
    """

    def __init__(
        self,
        place: Place,
        config: HealConfig,
        bare: PreTrainedModel,
        plain: bool,
        probe: Probe,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.place, self.config = place, config
        if config.gradient_checkpointing:
            bare.activation_checkpointing_enable()
        self.model = spread(bare, config.parallel, place.share.ranks, place.device, plain=plain)
        self.probe = Probe(probe.windows, extra=probe.extra, share=place.share)
        self.trainer: Trainer | None = None

    @property
    def _keeps(self) -> bool:
        """Whether it is rank 0, which alone keeps what is whole."""
        return self.place.share.rank == 0

    def do(self, name: str, *given: Any) -> Any:
        """One of the methods below. What it gathered outside of blocks, and no backward pass has
        let go (of a measurement), is let go then: parameters are parts again.
        """
        found = getattr(self, name)(*given)
        self.model.reshard()  # type: ignore[operator]
        return found

    def take(self, given: Mapping[str, torch.Tensor] | None = None) -> None:
        """The weights of rank 0's whole model."""
        set_weights(self.model, given)

    def weights(self) -> dict[str, torch.Tensor]:
        """All weights, on rank 0."""
        return whole_weights(self.model, keep=self._keeps)

    def remember(self, state: str) -> None:
        """The present state, for measurements that compare with it."""
        self.probe = self.probe.remembering(state, self.model)

    def measure(self, drawn: torch.Tensor | None) -> Measurement:
        """The present state on the probe, with a standard error where a generator's state is given
        to draw it with.
        """
        generator = None
        if drawn is not None:
            generator = torch.Generator()
            generator.set_state(drawn)
        return self.probe.measure(self.model, generator)

    def continued(self, openings: torch.Tensor, length: int) -> torch.Tensor:
        """What the model goes on with."""
        return continued(self.model, openings, length)

    def first_failure(self, batch: torch.Tensor, lost: bool) -> Failure | None:
        """What it cannot compute before any step."""
        windows, share = self.probe.windows, self.place.share
        batch = batch.to(self.place.device)
        return failure_before_training(self.model, batch, windows, share, lost=lost)

    def train(self) -> None:
        """A trainer of the present weights."""
        self.trainer = Trainer(self.model, self.config, share=self.place.share)

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None, "training has begun"
        return self.trainer

    def step(self, batch: torch.Tensor) -> tuple[float, float]:
        """One step on a whole batch."""
        return self._trainer.step(batch.to(self.place.device))

    def forward_failure(self, windows: torch.Tensor) -> str:
        """First module whose output is not finite."""
        return self._trainer.forward_failure(windows)

    def state(self) -> dict[str, Any]:
        """What training goes on from, as one process has it; on rank 0."""
        trainer = self._trainer
        moments = whole_optimizer(trainer.optimizer, keep=self._keeps)
        return trainer.state_of(self.weights(), moments)

    def load(
        self,
        rest: Mapping[str, Any],
        outline: Mapping[str, Any],
        given: Mapping[str, Any] | None = None,
    ) -> None:
        """Go on from a state.

        Args:
            rest: The state without its tensors.
            outline: Of the optimiser's.
            given: All of it, on rank 0.
        """
        set_weights(self.model, None if given is None else given["weights"])
        moments = None if given is None else given["optimizer"]
        set_optimizer(self._trainer.optimizer, outline, moments)
        self._trainer.load_counts(rest)

    def bytes_of_ranks(self, batch: torch.Tensor) -> torch.Tensor:
        """Bytes of weights, gradients and moments that each rank has: int64 (ranks, 3). The
        gradients are those of a batch, and are let go again.
        """
        share, parameters = self.place.share, list(self.model.parameters())
        training_loss(self.model, batch[share.rows(len(batch))].to(self.place.device)).backward()  # type: ignore[no-untyped-call]
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = self._trainer.optimizer.state.values()
        moments = [v for s in states for v in s.values() if isinstance(v, torch.Tensor) and v.ndim]
        counts = [[own_bytes(iter(kind)) for kind in (parameters, gradients, moments)]]
        self.model.zero_grad()
        return share.gathered(torch.tensor(counts, device=self.place.device)).cpu()
