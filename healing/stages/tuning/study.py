"""A search as Optuna keeps it: in a file, gone on with where it was left, the same twice.

A trial that a killed process left is marked failed, and its settings are proposed again: what is
proposed depends on the seed and the finished trials alone. (Optuna's samplers draw from one stream
per process, which a process that goes on would draw from its beginning again; its grid sampler
would leave the point of the lost trial out.)
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import pathlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
)
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from healing.config.fingerprint import fingerprint
from healing.config.tune import GRID, HALVING, MEDIAN, TuneConfig
from healing.errors import ConfigError
from healing.randomness import named_generator
from healing.stages.tuning.space import Axis, axes_of, default_values, grid_points
from healing.statistics.healer_trials import COMPLETE, DIVERGED, PRUNED, Trial

LEAST_FOR_IMPORTANCE = 8
"""Finished trials below which a random forest says nothing."""


@dataclass
class Proposal:
    """A healer to try next."""

    trial: optuna.Trial

    @property
    def number(self) -> int:
        """In the study."""
        return self.trial.number

    @property
    def values(self) -> dict[str, Any]:
        """Axis → value."""
        return dict(self.trial.params)

    def judge(self, rung: int, loss: float) -> bool:
        """Whether a healer with this loss at this rung is to be ended; the first of a study never
        is, as there is nothing to hold it against.
        """
        self.trial.report(loss if math.isfinite(loss) else math.inf, rung)
        return self.trial.should_prune()


def _distribution(axis: Axis) -> BaseDistribution:
    if axis.choices:
        return CategoricalDistribution(axis.choices)
    return FloatDistribution(axis.low, axis.high, log=True)


def _pruner(config: TuneConfig) -> optuna.pruners.BasePruner:
    if config.pruner == MEDIAN:
        return optuna.pruners.MedianPruner(n_startup_trials=config.startup_trials)
    if config.pruner == HALVING:
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    return optuna.pruners.NopPruner()


@contextlib.contextmanager
def _alone(path: pathlib.Path) -> Iterator[None]:
    """One process per study: another would take the running trial for a lost one.

    Raises:
        ConfigError: Another process is at it.
    """
    with path.open("ab") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # gone with the process
        except OSError as error:
            raise ConfigError(
                f"another process is at study {path}: wait for it, or name another --study"
            ) from error
        yield


class _HeldAlready(JournalFileSymlinkLock):
    """No lock beside that of :func:`_alone`, which ends with its process. Optuna's is a link beside
    the journal: one that a killed process left holds the next up for half a minute, and for ever
    where the folder was moved, since it leads nowhere then.
    """

    def acquire(self) -> bool:
        """At once."""
        return True

    def release(self) -> None:
        """Nothing was taken."""


def _cut_torn_line(path: pathlib.Path) -> None:
    """Drop what a killed process began to write: Optuna would write on in the same line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with path.open("r+b") as stream:
            stream.truncate(whole)


class Study:
    """The trials of one search."""

    def __init__(self, path: pathlib.Path, config: TuneConfig, identity: Mapping[str, Any]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # its lines would break the bar
        self._config, self.identity = config, dict(identity)
        self._distributions = {axis.name: _distribution(axis) for axis in axes_of(config)}
        self._grid = grid_points(config) if config.sampler == GRID else []
        _cut_torn_line(path)
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(path), _HeldAlready(str(path)))),
            pruner=_pruner(config),
            study_name="healer",
            direction="minimize",
            load_if_exists=True,
        )
        self._check_identity(path)
        for left in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(left.number, state=TrialState.FAIL)

    @classmethod
    @contextlib.contextmanager
    def opened(
        cls, path: pathlib.Path, config: TuneConfig, identity: Mapping[str, Any]
    ) -> Iterator[Study]:
        """The study of a file, made where there is none.

        Args:
            path: Of the journal.
            config: Says what is searched, and how.
            identity: What must be the same for trials to be compared.

        Raises:
            ConfigError: The file holds a study of something else, or another process is at it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            for link in path.parent.glob(f"{path.name}.lock*"):  # of versions that had Optuna's
                link.unlink()
            yield cls(path, config, identity)

    def _check_identity(self, path: pathlib.Path) -> None:
        known = self._study.user_attrs.get("identity")
        if known is None:
            self._study.set_user_attr("identity", self.identity)
        elif known != self.identity:
            differing = [k for k in self.identity if known.get(k) != self.identity[k]]
            raise ConfigError(
                f"study {path} was begun with other settings ({', '.join(differing)}): name "
                "another --study, or leave it out"
            )

    def trials(self) -> list[Trial]:
        """The finished ones, in their order."""
        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return [self._view(trial) for trial in self._study.get_trials(states=states)]

    @staticmethod
    def _view(trial: FrozenTrial) -> Trial:
        loss = math.inf if trial.value is None else float(trial.value)
        state = PRUNED if trial.state == TrialState.PRUNED else COMPLETE
        state = DIVERGED if math.isinf(loss) else state
        return Trial(trial.number, trial.params, state, loss, trial.user_attrs.get("facts", {}))

    def propose(self) -> Proposal | None:
        """The next healer, the default one first; ``None`` where the grid is used up."""
        done = len(self.trials())
        if done == 0:
            plain = default_values(self._config)
            self._queue({name: plain[name] for name in self._distributions})
        elif self._config.sampler == GRID:
            if done > len(self._grid):
                return None
            self._queue(self._grid[done - 1])
        self._study.sampler = optuna.samplers.TPESampler(
            n_startup_trials=self._config.startup_trials,
            seed=named_generator(self._config.seed, "trial", done).initial_seed() % 2**32,
        )
        return Proposal(self._study.ask(self._distributions))

    def _queue(self, values: Mapping[str, Any]) -> None:
        if not self._study.get_trials(states=(TrialState.WAITING,)):
            self._study.enqueue_trial(dict(values))

    def finish(self, proposal: Proposal, loss: float, facts: Mapping[str, Any]) -> None:
        """The healer went through its whole budget, or diverged (infinite loss)."""
        proposal.trial.set_user_attr("facts", dict(facts))
        self._study.tell(proposal.trial, loss)

    def prune(self, proposal: Proposal, facts: Mapping[str, Any]) -> None:
        """The healer was ended early; what was judged last is its value."""
        proposal.trial.set_user_attr("facts", dict(facts))
        self._study.tell(proposal.trial, state=TrialState.PRUNED)

    def importances(self) -> dict[str, float]:
        """Axis → share of the variance of the final loss (fANOVA, Hutter et al. 2014), from the
        trials that went through; empty where these are too few or all alike.
        """
        losses = [t.loss for t in self.trials() if t.state == COMPLETE]
        if len(losses) < LEAST_FOR_IMPORTANCE or len(set(losses)) == 1:
            return {}
        evaluator = FanovaImportanceEvaluator(seed=self._config.seed)
        found = get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    @property
    def digest(self) -> str:
        """Hash of what was searched, and of every finished trial."""
        rows = [(dict(t.values), t.state, repr(t.loss)) for t in self.trials()]
        return fingerprint(self.identity, rows)
