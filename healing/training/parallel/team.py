"""Healing as rank 0 sees it: alone, or with other ranks that do the same beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from healing.config.heal import HealConfig
from healing.errors import ParallelError
from healing.measurements.continuations import continued
from healing.measurements.diagnosis import Failure
from healing.measurements.probe import Measurement, Probe
from healing.models.loading import LoadedModel
from healing.models.token_loss import plain_head
from healing.training.nonfinite import failure_before_training
from healing.training.parallel.group import BEGIN, Group, gather
from healing.training.parallel.sharding import outlined, skeleton
from healing.training.parallel.worker import Worker
from healing.training.trainer import Trainer


class Alone:
    """One process, whose model is the loaded one itself.

    Attributes:
        probe: Measures the model.
        trainer_of: Makes what takes the steps of healing.
    """

    def __init__(self, loaded: LoadedModel, probe: Probe) -> None:
        self._loaded, self.probe = loaded, probe
        self.trainer_of: Any = Trainer

    def refresh(self) -> None:
        """The loaded model was given other weights."""

    def finish(self) -> None:
        """Healing is over: the loaded model has the weights that came out."""

    def continued(self, openings: torch.Tensor, length: int) -> torch.Tensor:
        """What the model goes on with (:func:`healing.measurements.continuations.continued`)."""
        return continued(self._loaded.model, openings, length)

    def first_failure(self, collapsed: Measurement, batch: torch.Tensor) -> Failure | None:
        """What the model cannot compute before any step."""
        model, windows = self._loaded.model, self.probe.windows
        batch, lost = batch.to(self._loaded.device), collapsed.nonfinite_tokens > 0
        return failure_before_training(model, batch, windows, lost=lost)


class Team(Alone):
    """Several ranks, whose model is a twin of the loaded one: its weights are spread over them.

    The loaded model stays on rank 0, whole and on the CPU: weights come from it and go back to it.
    """

    def __init__(self, group: Group, config: HealConfig, loaded: LoadedModel, probe: Probe) -> None:
        super().__init__(loaded, probe)
        self._group, self._config = group, config
        plain = plain_head(loaded.model) is not None
        threads = int(config.threads) or max(1, torch.get_num_threads() // group.ranks)
        given = (config, skeleton(loaded.model), plain, probe, threads)
        group.tell(BEGIN, given)
        self.worker = Worker(group.place, *given)
        self.probe = _TeamProbe(probe.windows, extra=probe.extra, team=self)
        self.trainer_of = lambda model, _config: _TeamTrainer(self, model)
        self.refresh()

    def all_do(self, name: str, *given: Any, here: tuple[Any, ...] = ()) -> Any:
        """Have every rank do something, and say what came out on this one.

        Args:
            name: Method of :class:`healing.training.parallel.worker.Worker`.
            *given: Its arguments.
            here: More of them, on this rank alone.

        Raises:
            ParallelError: Another rank has ended.
        """
        whole, self._group.broken = self._group.broken, True  # until it is over on this rank
        if whole:
            raise ParallelError("the ranks of this run lost touch with one another")
        try:
            self._group.tell(name, given)
            found = self.worker.do(name, *given, *here)
        except RuntimeError as error:
            if ended := self._group.death():
                raise ParallelError(
                    f"{ended}, and the run with it (the same command goes on from the last state "
                    "that was kept)"
                ) from error
            raise
        self._group.broken = False
        return found

    def refresh(self) -> None:
        """Give the ranks the weights of the loaded model."""
        self.all_do("take", here=(self._loaded.model.state_dict(),))

    def finish(self) -> None:
        """Give the loaded model the weights of the ranks."""
        self._loaded.model.load_state_dict(self.all_do("weights"))

    def continued(self, openings: torch.Tensor, length: int) -> torch.Tensor:
        """By all ranks alike."""
        found: torch.Tensor = self.all_do("continued", openings, length)
        return found

    def first_failure(self, collapsed: Measurement, batch: torch.Tensor) -> Failure | None:
        """Each rank tries its share."""
        found: Failure | None = self.all_do("first_failure", batch, collapsed.nonfinite_tokens > 0)
        return found


@dataclass(frozen=True)
class _TeamProbe(Probe):
    """A probe that measures the ranks' model, whichever it is given: theirs is its twin."""

    team: Team = field(repr=False, kw_only=True)

    def remembering(self, state: str, model: nn.Module) -> Probe:
        self.team.all_do("remember", state)
        return self

    def measure(
        self, model: nn.Module, error_generator: torch.Generator | None = None
    ) -> Measurement:
        drawn = None if error_generator is None else error_generator.get_state()
        found: Measurement = self.team.all_do("measure", drawn)
        return found


class _TeamTrainer:
    """A trainer whose every step is taken by all ranks together; its counts are those of rank 0,
    which are everybody's.
    """

    def __init__(self, team: Team, model: PreTrainedModel) -> None:
        self._team = team
        team.all_do("take", here=(model.state_dict(),))
        team.all_do("train")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._team.worker.trainer, name)

    def step(self, batch: torch.Tensor) -> tuple[float, float]:
        found: tuple[float, float] = self._team.all_do("step", batch)
        return found

    def forward_failure(self, windows: torch.Tensor) -> str:
        found: str = self._team.all_do("forward_failure", windows)
        return found

    def state_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = self._team.all_do("state")
        return found

    def load_state_dict(self, state: dict[str, Any]) -> None:
        rest = {n: v for n, v in state.items() if n not in ("weights", "optimizer")}
        self._team.all_do("load", rest, outlined(state["optimizer"]), here=(state,))


@contextlib.contextmanager
def ranks_for(config: HealConfig, loaded: LoadedModel, probe: Probe) -> Iterator[Alone]:
    """Who heals: this process, or the ranks that a configuration asks for, which are there inside.

    Raises:
        ConfigError: There cannot be such ranks.
        ParallelError: They cannot be started, or one has ended.
    """
    if not config.is_parallel:
        yield Alone(loaded, probe)
        return
    group = gather(config)
    try:
        yield Team(group, config, loaded, probe)
    except BaseException:
        group.broken = group.broken or bool(group.others)
        raise
    finally:
        group.close()
