"""Send to the tracking store what runs could not send while it was away."""

from __future__ import annotations

import contextlib
import pathlib
import sys

import click

from entrypoints._cli import TRY_LATER  # sets MLflow's defaults before it is imported
from healing.errors import HealingError
from healing.stages.terminal.console import Console
from healing.stages.terminal.lines import write_line
from healing.tracking.output_folder import output_folder

HELP = "Send to the tracking store what runs could not send while it was away."


@click.command(name="sync")
@click.argument("folders", nargs=-1, metavar="[FOLDER]...")
@click.option("--refused", is_flag=True, help="Also send what the store refused earlier.")
def main(folders: tuple[str, ...], refused: bool) -> None:
    """Send to the tracking store what runs could not send while it was away.

    FOLDER is an output folder (--output-dir of the runs), or several; without one it is
    ./experiments/results. It may have been copied from another machine. Everything goes to the
    store of MLFLOW_TRACKING_URI, in order; what arrived before is not stored twice. What the store
    refuses for good stays in the folder with the reason, and is not sent again unless --refused
    asks for it.
    """
    from healing.tracking.sending.left_behind import deliver

    codes, found = [0], 0
    for name in folders or ("./experiments/results",):
        try:
            folder = output_folder(name)
            if not folder.is_dir():
                raise click.UsageError(f"{name} is not a folder: name the output folder of runs")
            with contextlib.closing(Console("normal").progress(f"sync {name}")) as shown:

                def tell(done: int, total: int) -> None:
                    shown.phase("sending", done, total)

                deliveries = list(deliver(folder, tell=tell, refused=refused))
            found += len(deliveries)
            codes += [_told(delivery) for delivery in deliveries]
        except HealingError as error:
            write_line(f"error: {error}", error=True)
            codes.append(1)
    if not found and max(codes) == 0:
        write_line("nothing waits to be sent")
    sys.exit(max(codes))


def _told(delivery: object) -> int:
    """A line on what became of one process' requests; the exit code that it asks for."""
    from healing.tracking.sending.left_behind import Delivery, refusal

    assert isinstance(delivery, Delivery)
    runs = ", ".join(delivery.runs) or "no run"
    place = pathlib.Path(delivery.folder).name
    if not delivery.error and (delivery.requests or not delivery.refused):
        write_line(f"sent {delivery.requests} request(s) of {place}: {runs}")
    if delivery.refused:
        write_line(f"error: {delivery.refused} request(s) {refusal(delivery)}", error=True)
    if not delivery.error:
        return 1 if delivery.refused else 0
    sent = f"{delivery.requests} request(s) sent, then: " if delivery.requests else ""
    write_line(f"error: {place} is not sent: {sent}{delivery.error}", error=True)
    return TRY_LATER if delivery.away else 1


if __name__ == "__main__":
    main()
