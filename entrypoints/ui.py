"""Serve MLflow's UI over the tracking store, and print or open the page that shows the runs."""

from __future__ import annotations

import signal
import webbrowser

import click

from entrypoints._cli import fail
from healing.errors import HealingError
from healing.stages.terminal.lines import write_line

HELP = "Serve MLflow's UI over the tracking store, on this machine alone, and say what to open."


@click.command(name="ui", help=HELP)
@click.option(
    "--experiment",
    default="",
    help="Name or id of the experiment to open; empty = the one new runs go to.",
)
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default=True,
    help="Port of this machine; 0 = 5000 where it is free, else any.",
)
def main(experiment: str, opened: bool, port: int) -> None:
    """Serve until Ctrl-C."""
    from healing.tracking.queries import find_experiment
    from healing.tracking.ui import links
    from healing.tracking.ui.experiment_page import page as page_of
    from healing.tracking.ui.server import serving

    signal.signal(signal.SIGTERM, lambda *_: _stop())
    try:
        page = page_of(find_experiment(experiment))
        with serving(port) as address:
            write_line("MLflow's UI; Ctrl-C ends it. The runs are at:")
            write_line(f"{address}/{page}")
            if opened:
                webbrowser.open(f"{address}/{page}")
            if not links.is_served():
                signal.pause()
    except HealingError as error:
        fail(str(error))
    except KeyboardInterrupt:
        write_line("")


def _stop() -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
