"""What goes to a worker of a Ray cluster, and what comes back where it can run nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from healing.stages.launching.chain import Chain
from healing.tracking.open_runs import Above


@dataclass(frozen=True)
class Task:
    """One chain, and what a worker on another machine needs to run it.

    Attributes:
        number: Of the chain in its sweep.
        chain: Everything that decides its runs.
        above: Run of the command.
        store: As of :func:`healing.tracking.sending.workers.settings_of_store`.
        folder: Of the command: paths are relative to it, where the machine has it.
        code: Of the command, as of :func:`healing.stages.launching.ray_worker.code_here`.
        memory: Bytes that were asked for it; 0 = none.
        only_on: Name of the machine whose file the store is; empty = others reach it too.
        proof: A file in the folder that files of runs go to, where they go to one: who does not
            see it has another folder of that name. Empty = they go to a server.
    """

    number: int
    chain: Chain
    above: Above
    store: Mapping[str, str] = field(repr=False)
    folder: str
    code: str
    memory: int = 0
    only_on: str = ""
    proof: str = ""


class Unfit(NamedTuple):
    """A machine that can run no chain of this sweep: nothing was begun there.

    Attributes:
        node: Ray's id of it.
        machine: Its name.
        why: In words.
    """

    node: str
    machine: str
    why: str
