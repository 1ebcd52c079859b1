"""Heal collapsed checkpoints on clean text."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.heal import HealConfig


@click.command()
@options_of(HealConfig)
def main(**values: Any) -> None:
    """Fine-tune a collapsed model on clean text and measure how far it recovers.

    Give one checkpoint (--collapsed-checkpoint or --attack-run-id), a folder of checkpoints
    (--checkpoint-dir), or nothing: then a fresh attack (--arm) is made and healed.
    """
    from healing.stages.heal import heal

    run_stage(heal, HealConfig, values)


if __name__ == "__main__":
    main()
