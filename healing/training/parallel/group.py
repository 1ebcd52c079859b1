"""The processes that share a run: started by rank 0, or by torchrun; what each is told to do.

Rank 0 decides everything: it tells the others each thing to do, does it itself, and what they
exchange meanwhile is torch's affair (gloo on the CPU, NCCL between GPUs). The others know no store,
no files and no signals; they end when rank 0 says so, and at once when it is gone.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import pathlib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import torch
from torch import distributed

from healing.config.heal import HealConfig, check_batch, launched
from healing.errors import ConfigError, ParallelError
from healing.models.loading import resolve_device
from healing.models.sharing import Share

PATIENCE = datetime.timedelta(days=1)
"""For others in an exchange: rank 0 may write files for hours. Who is gone is noticed otherwise."""
SECONDS_TO_START = 300.0
"""For a started process until it answers: it imports libraries, on a busy machine slowly."""
SECONDS_TO_END = 10.0
FOLLOWER = "healing.training.parallel.follow"
BEGIN, END = "begin", "end"
"""What the others are told before a run, with what they make their part of its model of, and when
there is nothing more to do.
"""
READY = "ready"
"""Beginning of the names under which started processes say that they are there."""
HEAD = "127.0.0.1"
INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
"""Variables of what exchanges between ranks, which by itself does so at the address of the
machine's name, and the interface that is this machine's alone."""


@dataclass(frozen=True)
class Place:
    """Where a rank computes.

    Attributes:
        share: Its number, and how many there are.
        device: Its own.
    """

    share: Share
    device: torch.device

    def use(self) -> None:
        """Make the device the one that unnamed work goes to."""
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)


def ranks_of(config: HealConfig) -> int:
    """Number of processes that a configuration asks for.

    Raises:
        ConfigError: None is named and there is no other way to know, more than there are GPUs or
            windows, or a batch that cannot be divided.
    """
    flag = f"--parallel {config.parallel}"
    ranks = config.ranks
    if launched():
        world = int(os.environ["WORLD_SIZE"])
        if ranks not in (0, world):
            raise ConfigError(
                f"--ranks {ranks}, but {world} processes were launched: leave --ranks out"
            )
        ranks = world
    elif resolve_device(config.device).type == "cuda":
        there = torch.cuda.device_count()
        ranks = ranks or there
        if ranks > there:
            raise ConfigError(
                f"--ranks {ranks}, but this machine has {there} GPU(s): lower it, or launch one "
                "process per GPU with torchrun"
            )
    elif not ranks:
        raise ConfigError(f"{flag} on the CPU needs --ranks: say how many processes")
    if config.batch_size != "auto":
        check_batch(int(config.batch_size), ranks)
    if config.probe_tokens != "auto":
        windows = int(config.probe_tokens) // config.sequence_length
        if windows < ranks:
            raise ConfigError(
                f"{windows} probe windows are fewer than {ranks} ranks: use fewer --ranks, or "
                "more --probe-tokens"
            )
    return ranks


def parallel_tags(config: HealConfig) -> dict[str, str]:
    """Tags that say how a run's model is spread; none of one process."""
    if not config.is_parallel:
        return {}
    return {"parallel": f"{config.parallel}, {ranks_of(config)} ranks"}


def _backend(kind: str) -> str:
    return "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"


def join(rank: int, ranks: int, kind: str, port: int) -> Place:
    """Enter the process group; all ranks do at once.

    Args:
        rank: Of this process.
        ranks: Of the run.
        kind: ``cpu`` or ``cuda``.
        port: Where rank 0 of this machine listens; 0 = as the launcher's variables say.
    """
    local = int(os.environ.get("LOCAL_RANK", rank)) if not port else rank
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    place = Place(Share(rank, ranks), device)
    place.use()
    meeting: dict[str, Any] = {"init_method": "env://"}
    if port:
        wait = datetime.timedelta(seconds=SECONDS_TO_START)
        meeting = {"store": distributed.TCPStore(HEAD, port, is_master=False, timeout=wait)}
    distributed.init_process_group(
        _backend(kind), rank=rank, world_size=ranks, timeout=PATIENCE, **meeting
    )
    return place


def heard() -> tuple[str, tuple[Any, ...]]:
    """What rank 0 tells next, on the others."""
    told: list[Any] = [None]
    distributed.broadcast_object_list(told, 0, device=torch.device("cpu"))
    name, given = told[0]
    return name, given


@dataclass
class Group:
    """The ranks of a run, seen from rank 0.

    Attributes:
        place: Of rank 0.
        others: Processes that this one has started.
        said: What they wrote to standard error.
        broken: Whether an exchange was left in the middle: nothing more can be said then.
        own: Variables of this process' environment while there is the group.
    """

    place: Place
    others: Sequence[subprocess.Popen[bytes]] = ()
    said: Sequence[IO[bytes]] = ()
    broken: bool = False
    own: Mapping[str, str] = field(default_factory=dict)
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def ranks(self) -> int:
        """How many there are."""
        return self.place.share.ranks

    def tell(self, name: str, given: tuple[Any, ...] = ()) -> None:
        """Say what comes next to the others."""
        if self.ranks > 1:
            distributed.broadcast_object_list([(name, given)], 0, device=torch.device("cpu"))

    def death(self) -> str:
        """One line on the first other rank that has ended; empty where none has, as far as this
        process can know.
        """
        end = time.monotonic() + SECONDS_TO_END
        while self.others and time.monotonic() < end:
            for rank, (process, said) in enumerate(zip(self.others, self.said, strict=True), 1):
                if process.poll() is not None:
                    return f"rank {rank} of {self.ranks} {_manner(process.returncode, said)}"
            time.sleep(0.05)
        return ""

    def close(self) -> None:
        """End the ranks that this process has started, at once where they cannot be told."""
        if not self.others and self.ranks > 1:
            return  # of a launcher: there is one group per command, and it ends with it
        self._over.set()
        if not self.broken and all(process.poll() is None for process in self.others):
            with contextlib.suppress(RuntimeError):
                self.tell(END)
        else:
            for process in self.others:
                process.kill()
        for process in self.others:
            assert process.stdin is not None, "it was opened with one"
            process.stdin.close()  # who still listens to it ends by that
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        for stream in self.said:
            stream.close()
        self.forget()
        distributed.destroy_process_group()

    def forget(self) -> None:
        """Leave the environment as it was."""
        for name in self.own:
            os.environ.pop(name, None)

    def watch(self) -> None:
        """Give up exchanges between GPUs once a rank is gone, whose peers would wait for a day;
        gloo notices by itself.
        """
        while not self._over.wait(0.5):
            if any(process.poll() is not None for process in self.others):
                self.broken = True
                world = distributed.group.WORLD
                if world is not None:
                    world.abort()
                return


def _manner(code: int, said: IO[bytes]) -> str:
    """How a process ended, with the last line that it wrote."""
    said.seek(0, os.SEEK_END)
    said.seek(max(0, said.tell() - 4096))
    lines = said.read().decode(errors="replace").strip().splitlines()
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return f"{how}{': ' + lines[-1].strip() if lines else ''}"


_LAUNCHED: list[Group] = []
"""The group of a launcher's processes: one for the whole command."""


def gather(config: HealConfig) -> Group:
    """The ranks of a run, started where no launcher has.

    Raises:
        ConfigError: See :func:`ranks_of`.
        ParallelError: They cannot be started.
    """
    ranks, kind = ranks_of(config), resolve_device(config.device).type
    if launched():
        if not _LAUNCHED:
            _LAUNCHED.append(Group(join(0, ranks, kind, 0)))
            atexit.register(_end_launched)
        if _LAUNCHED[0].broken:
            raise ParallelError(
                "the processes that were launched lost touch with one another in an earlier run: "
                "launch the command again"
            )
        return _LAUNCHED[0]
    return _started(ranks, kind)


def _end_launched() -> None:
    group = _LAUNCHED.pop()
    if not group.broken:
        with contextlib.suppress(RuntimeError):
            group.tell(END)
        distributed.destroy_process_group()


def own_store(wait: datetime.timedelta) -> distributed.TCPStore:
    """Where processes of this machine meet, and no others can: by itself torch's listens on every
    address, and what goes through it is trusted.

    Args:
        wait: For an answer.
    """
    listening = socket.create_server((HEAD, 0))  # a port that is free
    return distributed.TCPStore(
        HEAD,
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        timeout=wait,
        master_listen_fd=listening.detach(),  # which closes it
    )


def _started(ranks: int, kind: str) -> Group:
    """Other ranks as processes of this machine."""
    wait = datetime.timedelta(seconds=SECONDS_TO_START)
    store = own_store(wait)
    # They live as long as the group, which closes them.
    said = [tempfile.TemporaryFile() for _ in range(1, ranks)]  # noqa: SIM115
    others = [
        subprocess.Popen(
            [sys.executable, "-m", FOLLOWER, str(rank), str(ranks), kind, str(store.port)],
            stdin=subprocess.PIPE,
            stdout=stream,
            stderr=stream,
            env=_environment(),
        )
        for rank, stream in enumerate(said, 1)
    ]
    device = torch.device(kind, 0) if kind == "cuda" else torch.device("cpu")
    own = {name: LOOPBACK for name in INTERFACES if name not in os.environ}
    group = Group(Place(Share(0, ranks), device), others, said, own=own)
    os.environ.update(own)  # read again for every mesh
    group.place.use()
    try:
        _await(group, store)
        distributed.init_process_group(
            _backend(kind), store=store, rank=0, world_size=ranks, timeout=PATIENCE
        )
    except BaseException:
        group.broken = True
        group.forget()
        for process in others:
            process.kill()
            process.wait()
        raise
    if kind == "cuda":
        threading.Thread(target=group.watch, name="ranks", daemon=True).start()
    return group


def _await(group: Group, store: distributed.TCPStore) -> None:
    """Until every started process has come as far as to join."""
    end = time.monotonic() + SECONDS_TO_START
    for rank in range(1, group.ranks):
        while not store.check([f"{READY}/{rank}"]):
            if any(process.poll() is not None for process in group.others):
                raise ParallelError(f"{group.death()}, before the run began")
            if time.monotonic() > end:
                raise ParallelError(
                    f"rank {rank} of {group.ranks} did not answer within {SECONDS_TO_START:.0f} s"
                )
            time.sleep(0.02)


def _environment() -> dict[str, str]:
    """Of a started process: this code, found wherever rank 0 found it, and no run of its own."""
    root = str(pathlib.Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH", "")])]
    left_out = ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    own = dict.fromkeys(INTERFACES, LOOPBACK)
    return {**own, **kept, "PYTHONPATH": os.pathsep.join(paths)}
