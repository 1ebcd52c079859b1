"""The loss landscape around the three states of a healing run."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.basin import BasinConfig


@click.command()
@options_of(BasinConfig)
def main(**values: Any) -> None:
    """Say whether the collapsed state of a healing run is a minimum, with the evidence.

    Gradient, curvature and escape in the healthy, collapsed and healed state, loss barriers
    between them. Give --heal-run-id, or both checkpoints.
    """
    from healing.stages.basin import basin

    run_stage(basin, BasinConfig, values)


if __name__ == "__main__":
    main()
