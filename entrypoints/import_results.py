"""Read the predecessor's recorded results into MLflow."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.import_results import ImportConfig


@click.command()
@options_of(ImportConfig)
def main(**values: Any) -> None:
    """Read the predecessor's result folders into MLflow as runs of their own, marked as legacy.

    A recorded run that was imported before is not imported again. Summarize the imported runs
    with: summarize --legacy true
    """
    from healing.predecessor.import_stage import import_results

    run_stage(import_results, ImportConfig, values)


if __name__ == "__main__":
    main()
