"""Pool stored healing runs into recovery statistics."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.stage_config import SummarizeConfig


@click.command()
@options_of(SummarizeConfig)
def main(**values: Any) -> None:
    """Pool stored healing runs by model and arm: recovery with intervals, verdicts, figures."""
    from healing.experiment.summarize import summarize_stage

    run_stage(summarize_stage, SummarizeConfig, values)


if __name__ == "__main__":
    main()
