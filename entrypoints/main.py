"""The whole experiment: models x arms x seeds, attacked, healed and summarized."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.sweep import SweepConfig


@click.command()
@options_of(SweepConfig)
def main(**values: Any) -> None:
    """Attack and heal every model x arm x seed, then summarize; finished cells are kept."""
    from healing.stages.sweep import sweep

    run_stage(sweep, SweepConfig, values)


if __name__ == "__main__":
    main()
