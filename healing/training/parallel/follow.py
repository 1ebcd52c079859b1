"""What another rank than 0 does: as it is told, until it is told to end.

Started by rank 0 as ``python -m healing.training.parallel.follow RANK RANKS KIND PORT``, it ends at
once when its standard input does, which rank 0 holds open as long as it lives, however it dies.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import sys
import threading

import torch
from torch import distributed

from healing.errors import ParallelError
from healing.models.loading import resolve_device
from healing.training.parallel.group import (
    BEGIN,
    END,
    HEAD,
    READY,
    SECONDS_TO_START,
    Place,
    heard,
    join,
)
from healing.training.parallel.worker import Worker


def serve(place: Place) -> None:
    """Do what rank 0 says."""
    worker: Worker | None = None
    while True:
        name, given = heard()
        if name == END:
            break
        if name == BEGIN:
            worker = None  # the model of a run before
            worker = Worker(place, *given)
        else:
            assert worker is not None, "a run has begun"
            worker.do(name, *given)
    worker = None
    distributed.destroy_process_group()


def unmoved_by_signals() -> None:
    """Rank 0 decides what a signal means, also one to the whole group of processes."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def follow_launched(device: str) -> None:
    """The rest of a process that a launcher has started beside rank 0.

    Args:
        device: As configured.

    Raises:
        ParallelError: Rank 0, or another, is gone.
    """
    unmoved_by_signals()
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    try:
        serve(join(rank, ranks, resolve_device(device).type, 0))
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise ParallelError(f"rank {rank} of {ranks} lost the others: {reason}") from error


def _end_with(stream: int) -> None:
    with contextlib.suppress(OSError):
        while os.read(stream, 1):
            pass
    os._exit(1)


def main() -> None:
    """A process that rank 0 has started."""
    unmoved_by_signals()
    threading.Thread(target=_end_with, args=(sys.stdin.fileno(),), daemon=True).start()
    rank, ranks, kind, port = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    torch.set_num_threads(1)  # until it is told how many
    wait = datetime.timedelta(seconds=SECONDS_TO_START)
    distributed.TCPStore(HEAD, port, is_master=False, timeout=wait).set(f"{READY}/{rank}", "")
    serve(join(rank, ranks, kind, port))


if __name__ == "__main__":
    main()
