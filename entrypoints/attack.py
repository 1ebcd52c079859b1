"""Attack a healthy model and store the collapsed checkpoint."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.attack import AttackConfig


@click.command()
@options_of(AttackConfig)
def main(**values: Any) -> None:
    """Attack a healthy model, follow rank and perplexity, and store the collapsed checkpoint."""
    from healing.stages.attack import attack

    run_stage(attack, AttackConfig, values)


if __name__ == "__main__":
    main()
