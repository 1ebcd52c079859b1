"""Pool stored healing runs into recovery statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.summarize import SummarizeConfig


@click.command()
@options_of(SummarizeConfig)
def main(**values: Any) -> None:
    """Pool stored healing runs by model and arm: recovery with intervals, verdicts, figures."""
    stage: Callable[[SummarizeConfig], Any]
    if values["legacy"]:
        from healing.predecessor.summarize_stage import summarize_imported as stage
    else:
        from healing.stages.summarize import summarize as stage
    run_stage(stage, SummarizeConfig, values)


if __name__ == "__main__":
    main()
