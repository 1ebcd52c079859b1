"""Sweeps whose cells compute nothing: what is left is planning, tracking and summarizing."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

from healing.config.arm_tags import arm_tags
from healing.config.attack import AttackConfig
from healing.config.fingerprint import fingerprint
from healing.config.sweep import SweepConfig
from healing.stages.attack import CHECKPOINT_NAME
from healing.stages.cells.events import Begin, Events, Record
from healing.stages.cells.heal_outcome import HealCell
from healing.stages.launching import chain_run
from healing.stages.stage import Report, StageDefaults, Tools, settled
from healing.tracking.queries import CELL_KEY

STEPS = (0, 10, 20)
ARMS = ("none", "haep", "random_tokens", "spectral")


class TrivialAttack(StageDefaults):
    """Leaves a checkpoint of a few bytes."""

    name = "attack"

    def title(self, config: AttackConfig) -> str:
        """As of the real stage."""
        return f"attack {config.label} {config.arm} seed {config.seed}"

    def tags(self, config: AttackConfig) -> Mapping[str, Any]:
        """What runs are grouped by."""
        return {"arm": config.arm, "model": config.label, **arm_tags(config.arm)}

    def prepare(self, config: AttackConfig, tools: Tools) -> AttackConfig:
        """There is nothing to load."""
        return config

    def cell(self, config: AttackConfig) -> Events[str]:
        """One record."""
        title = self.title(config)
        yield Begin(fingerprint("trivial", title), title.replace(" ", "_"), {}, 1)
        yield Record(0, {"loss": 5.0})
        return title

    def store(
        self, outcome: str, records: Sequence[Record], folder: pathlib.Path, run_id: str
    ) -> Report:
        """The file that healings ask for."""
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / CHECKPOINT_NAME).write_text(outcome)
        return Report([], {"status": "ok"}, outcome, outcome, detail=True)


class TrivialHeal(StageDefaults):
    """Leaves the numbers that a summary reads."""

    name = "heal"

    def title(self, config: HealCell) -> str:
        """As of the real stage."""
        own = config.config
        return f"heal {own.label} {own.arm} seed {own.seed}"

    def tags(self, config: HealCell) -> Mapping[str, Any]:
        """What runs are grouped by."""
        own = config.config
        return {"arm": own.arm, "model": own.label, **arm_tags(own.arm), CELL_KEY: config.key}

    def params(self, config: HealCell) -> Mapping[str, Any]:
        """The configuration's fields."""
        return settled(config.config)

    def output_dir(self, config: HealCell) -> str:
        """As configured."""
        return config.config.output_dir

    def prepare(self, config: HealCell, tools: Tools) -> HealCell:
        """There is nothing to load."""
        return config

    def cell(self, config: HealCell) -> Events[HealCell]:
        """Three records of a recovery that differs from seed to seed."""
        title = self.title(config)
        counts = {"n_params": 300_000}
        begin = fingerprint("trivial", title)
        yield Begin(begin, title.replace(" ", "_"), {}, STEPS[-1], counts=counts)
        for step in STEPS:
            recovered = (30.0 + config.config.seed % 7) * step / STEPS[-1]
            yield Record(
                step,
                {
                    "nonfinite_tokens": 0.0,
                    "rank_recovery_pct": recovered,
                    "loss_recovery_pct": 2 * recovered,
                    "ppl_improvement_pct": 3 * recovered,
                },
            )
        return config

    def store(
        self, outcome: HealCell, records: Sequence[Record], folder: pathlib.Path, run_id: str
    ) -> Report:
        """Tags and numbers of a summary."""
        own, title = outcome.config, self.title(outcome)
        tags = {
            "settings": "s",
            "status": "ok",
            "checkpoint_id": f"{own.label}-{own.arm}-{own.seed}",
            "attack_seed": own.seed,
            "spectral_state": "collapsed",
            "verdict": "partial",
        }
        return Report([(0, {"summary/steps": STEPS[-1]})], tags, title, title, detail=True)


@contextlib.contextmanager
def trivial_cells() -> Iterator[None]:
    """Chains in the block have these cells in place of the real ones."""
    with (
        mock.patch.object(chain_run, "ATTACK", TrivialAttack()),
        mock.patch.object(chain_run, "HEAL", TrivialHeal()),
    ):
        yield


def settings(cells: int, output: pathlib.Path, **changes: Any) -> SweepConfig:
    """A sweep of so many cells: four arms, as many seeds as it takes, those included that selected
    the model's healer.
    """
    seeds = -(-cells // len(ARMS))
    values = {"models": "nano", "arms": ",".join(ARMS), "seeds": f"0-{seeds - 1}", "workers": 1,
              "sham": False, "healer": "none", "verbosity": "quiet",
              "output_dir": str(output)}  # fmt: skip
    return SweepConfig(**(values | changes))
