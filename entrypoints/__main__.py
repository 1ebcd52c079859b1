"""All commands under one name: ``llm-healing``, or ``python -m entrypoints``."""

from __future__ import annotations

import importlib

import click

from entrypoints._stages import STAGES
from entrypoints.sync import HELP as SYNC_HELP
from entrypoints.ui import HELP as UI_HELP

PROGRAM = "llm-healing"
ABOUT = {**{name: entry.help for name, entry in STAGES.items()}, "ui": UI_HELP, "sync": SYNC_HELP}
"""Command → what it does, its first paragraph being one clause."""


def clause(name: str) -> str:
    """What a command does, in one clause."""
    return ABOUT[name].partition("\n\n")[0]


class Commands(click.Group):
    """The commands of this package, each imported when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, the most used first."""
        return list(ABOUT)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """A command by its name; a hyphen stands for an underscore."""
        name = cmd_name.replace("-", "_")
        if name not in ABOUT:
            return None
        found: click.Command = importlib.import_module(f"entrypoints.{name}").main
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Names with their clauses, without importing any."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, clause(name)) for name in ABOUT])


@click.command(
    cls=Commands,
    invoke_without_command=True,
    epilog=f"{PROGRAM} COMMAND --help lists its options. Begin with: {PROGRAM} heal --model nano",
)
@click.pass_context
def main(ctx: click.Context) -> None:
    """When an attack makes a language model collapse, does it heal?"""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


if __name__ == "__main__":
    main(prog_name="python -m entrypoints")
