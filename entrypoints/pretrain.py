"""Train an embedded model (nano, micro) from nothing."""

from __future__ import annotations

from typing import Any

import click

from entrypoints._cli import options_of, run_stage
from healing.config.pretrain import PretrainConfig


@click.command()
@options_of(PretrainConfig)
def main(**values: Any) -> None:
    """Train an embedded model (nano or micro) and its tokenizer from nothing, tracked in MLflow."""
    from healing.stages.pretrain import pretrain

    run_stage(pretrain, PretrainConfig, values)


if __name__ == "__main__":
    main()
