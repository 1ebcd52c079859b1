"""The tracking store goes away: training goes on, and all points arrive in order, once.

Every history is compared with that of the same healing beside a store that was always there.
"""

from __future__ import annotations

import pathlib
import random
import re
import shutil
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner
from mlflow.tracking import MlflowClient

from entrypoints.sync import main as sync
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.sweep import SweepConfig
from healing.errors import OutageError
from healing.stages.attack import attack
from healing.stages.driver import Driver
from healing.stages.heal import heal
from healing.stages.sweep import sweep
from healing.stages.terminal.console import Console
from healing.tracking.page_text import plain_tags
from healing.tracking.run_files import JsonLines, read_jsonl
from healing.tracking.sending import sender
from healing.tracking.sending.outbox import PLACE
from tests.outages.servers import Proxy, Server, beside_sqlite, reply

pytestmark = pytest.mark.slow

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "measurement_interval": 2, "verbosity": "quiet"}  # fmt: skip
STEPS = 12


@pytest.fixture(autouse=True)
def quick_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow gives up early, and the end of a process waits a little for its store."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(sender, "LONGEST_PAUSE", 1.0)
    monkeypatch.setattr("healing.tracking.run_logger.FLUSH_SECONDS", 0.0)


@pytest.fixture(scope="module")
def beside_a_store(
    tmp_path_factory: pytest.TempPathFactory, empty_database: pathlib.Path
) -> tuple[pathlib.Path, Any]:
    """A collapsed checkpoint, and what a store that was always there holds of its healing."""
    folder = tmp_path_factory.mktemp("whole")
    with beside_sqlite(folder, empty_database) as uri:
        checkpoint = attack(AttackConfig(**SMALL, attack_steps=2, arm="random_tokens"))[1]
        healed(checkpoint, folder / "output")
    found = histories(uri), artifacts(uri)
    assert [len(points) for points in found[0][0].values()].count(STEPS // 2 + 1) > 10
    return checkpoint.resolve(), found


@pytest.fixture
def collapsed(store: pathlib.Path, beside_a_store: tuple[pathlib.Path, Any]) -> pathlib.Path:
    return beside_a_store[0]


def healed(checkpoint: pathlib.Path, output: pathlib.Path) -> None:
    heal(HealConfig(**SMALL, collapsed_checkpoint=str(checkpoint), healing_steps=STEPS,
                    healing_lr=3e-3, output_dir=str(output)))  # fmt: skip


def histories(uri: str, stage: str = "heal") -> list[dict[str, list[tuple[int, str]]]]:
    """Of the finished runs of a stage: metric → points in the order stored, no seconds."""
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    wanted = f"tags.stage = '{stage}' and attributes.status = 'FINISHED'"
    return [
        {
            name: [(m.step, repr(m.value)) for m in client.get_metric_history(r.info.run_id, name)]
            for name in r.data.metrics
            if not name.startswith(("seconds", "tokens_per"))
        }
        for r in client.search_runs(experiments, wanted)
    ]


def artifacts(uri: str) -> list[list[str]]:
    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.stage = 'heal'")

    def below(run_id: str, path: str = "") -> list[str]:
        found = client.list_artifacts(run_id, path)
        return [p for f in found for p in (below(run_id, f.path) if f.is_dir else [f.path])]

    # Names of pictures hold a time and a random number.
    drawn = re.compile(r"\+timestamp\+\d+\+[0-9a-f-]{36}")
    return [sorted({drawn.sub("", path) for path in below(r.info.run_id)}) for r in runs]


@pytest.fixture
def expected(beside_a_store: tuple[pathlib.Path, Any]) -> Any:
    """What a store that was always there holds."""
    return beside_a_store[1]


@pytest.fixture
def server(store: pathlib.Path, empty_database: pathlib.Path) -> Iterator[Server]:
    folder = store / "server"
    folder.mkdir()
    shutil.copy(empty_database, folder / "mlflow.db")
    found = Server(folder)
    yield found
    found.stop()


def at_records(monkeypatch: pytest.MonkeyPatch, events: dict[int, Callable[[], object]]) -> None:
    """Do something when the record of a step is on disk."""
    append = JsonLines.append

    def appended(self: JsonLines, record: Any) -> None:
        append(self, record)
        if self.path.name == "metrics.jsonl" and record["step"] in events:
            events[record["step"]]()

    monkeypatch.setattr(JsonLines, "append", appended)


@pytest.mark.parametrize("when", ["middle", "middle to end", "start", "always"])
def test_a_server_that_goes_and_comes_back(
    store, collapsed, expected, server, monkeypatch, when
) -> None:
    events: dict[int, Callable[[], object]] = {}
    comes_back: threading.Thread | None = None
    if when == "middle":
        events = {4: server.stop, 8: server.start}
    if when == "middle to end":
        events = {4: server.stop}
    if when == "start":
        comes_back = threading.Thread(target=server.start)
        events = {4: comes_back.start}
    if when.startswith("middle"):
        server.start()
    if when in ("middle", "start"):
        monkeypatch.setattr(sender, "PATIENCE", 60.0)
    mlflow.set_tracking_uri(server.uri)
    at_records(monkeypatch, events)
    output = store / "output"
    began = time.monotonic()
    if when in ("middle", "start"):
        healed(collapsed, output)
    else:
        with pytest.raises(OutageError, match=r"wait in .*entrypoints.sync"):
            healed(collapsed, output)
        assert time.monotonic() - began < 60
        (lines,) = output.glob("priority5_healing/raw_data/*/metrics.jsonl")
        assert [r["step"] for r in read_jsonl(lines)] == list(range(0, STEPS + 1, 2))
        # Copied to another machine, and what was written here is gone.
        other = store / "other"
        output.rename(other)
        done = CliRunner().invoke(sync, [str(other)])
        assert (done.exit_code, "not sent" in done.output + done.stderr) == (75, True)
        server.start()
        done = CliRunner().invoke(sync, [str(other)])
        assert done.exit_code == 0, done.output + done.stderr
        again = CliRunner().invoke(sync, [str(other)])
        assert (again.exit_code, again.output) == (0, "nothing waits to be sent\n")
        output = other
    if comes_back:
        comes_back.join()
    assert not (output / PLACE).exists()
    assert (histories(server.uri), artifacts(server.uri)) == expected


def lost(handler: Any, number: int) -> bool:
    """Every third request or so is carried out, and its answer cut off."""
    if random.Random(number).random() > 0.3:
        return False
    status, content = handler.forwarded()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content) + 10))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True
    return True


def unanswered() -> Callable[[Any, int], bool]:
    """Every other POST to an address is carried out, and not a byte of its answer arrives."""
    seen = Counter[str]()

    def fault(handler: Any, number: int) -> bool:
        seen[handler.path] += handler.command == "POST"
        if handler.command != "POST" or seen[handler.path] % 2 == 0:
            return False
        handler.forwarded()
        handler.close_connection = True
        return True

    return fault


def dropped(handler: Any, number: int) -> bool:
    """Every third request or so is not answered at all."""
    if random.Random(number).random() > 0.3:
        return False
    handler.close_connection = True
    return True


def refused(status: int) -> Callable[[Any, int], bool]:
    """Requests 8 to 14 get an error's status."""

    def fault(handler: Any, number: int) -> bool:
        if not 8 <= number <= 14:
            return False
        reply(handler, status, b"not now")
        return True

    return fault


def slow(handler: Any, number: int) -> bool:
    """Every answer takes its time, and one takes longer than anybody waits."""
    time.sleep(7.0 if number == 9 else 0.6)
    return False


FAULTS = {
    "answers cut off": lost,
    "answers lost": unanswered(),
    "requests dropped": dropped,
    "429": refused(429),
    "500": refused(500),
    "503": refused(503),
    "401 after it let in": refused(401),
    "delays": slow,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_connection_that_misbehaves(
    store, collapsed, expected, server, monkeypatch, fault
) -> None:
    server.start()
    proxy = Proxy(server.uri, FAULTS[fault])
    monkeypatch.setattr(sender, "PATIENCE", 90.0)
    mlflow.set_tracking_uri(proxy.uri)
    try:
        healed(collapsed, store / "output")
    finally:
        proxy.close()
    assert proxy.seen > 20, "it went through the proxy"
    assert (histories(server.uri), artifacts(server.uri)) == expected
    assert not (store / "output" / PLACE).exists()


def test_a_server_that_never_answers_holds_training_up_for_five_seconds_at_most(
    store, collapsed, server, monkeypatch
) -> None:
    server.start()
    hang = threading.Event()
    proxy = Proxy(server.uri, lambda handler, number: number > 8 and (hang.wait(60) or True))
    mlflow.set_tracking_uri(proxy.uri)
    seconds = {}
    at_records(monkeypatch, {
        step: lambda step=step: seconds.setdefault(step, time.monotonic())
        for step in range(0, STEPS + 1, 2)
    })  # fmt: skip
    try:
        with pytest.raises(OutageError, match=r"entrypoints\.sync"):
            healed(collapsed, store / "output")
    finally:
        hang.set()
        proxy.close()
    assert seconds[STEPS] - seconds[0] < sender.BLOCKING_SECONDS + 5.0  # of its own


def test_a_database_that_another_program_has_locked(
    store, collapsed, expected, empty_database, monkeypatch
) -> None:
    path = store / "locked.db"
    shutil.copy(empty_database, path)
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    monkeypatch.setattr(sender, "PATIENCE", 60.0)
    mlflow.set_tracking_uri(f"sqlite:///{path}")
    at_records(
        monkeypatch,
        {
            4: lambda: other.execute("BEGIN EXCLUSIVE"),
            STEPS: lambda: threading.Timer(6.0, other.execute, ["COMMIT"]).start(),
        },
    )
    healed(collapsed, store / "output")
    found = histories(f"sqlite:///{path}"), artifacts(f"sqlite:///{path}")
    assert found == expected
    other.close()


def test_a_sweep_whose_server_goes_is_whole_on_disk_and_after_sync(
    store, server, monkeypatch
) -> None:
    """Cells that need an earlier one's checkpoint take it from the disk; the summary too."""

    def swept(output: pathlib.Path) -> Any:
        config = SweepConfig(
            models="nano", arms="random_tokens,none", seeds="0,1", attack_steps=2, healing_steps=4,
            batch_size=2, sequence_length=64, measurement_interval=2, verbosity="quiet",
            output_dir=str(output), workers=1,
        )  # fmt: skip
        return sweep(config, Driver(Console("quiet")))

    whole = swept(store / "whole")
    here = mlflow.get_tracking_uri()
    server.start()
    gone = []

    def goes() -> None:
        if not gone:
            gone.append(True)
            server.stop()

    at_records(monkeypatch, {4: goes})  # while the first cell is healed
    mlflow.set_tracking_uri(server.uri)
    with pytest.raises(OutageError):
        swept(store / "output")
    (summary,) = (store / "output").glob("summaries/*/summary.csv")
    (other,) = (store / "whole").glob("summaries/*/summary.csv")
    assert summary.read_text() == other.read_text()
    assert len(whole.groups) == 2
    server.start()
    done = CliRunner().invoke(sync, [str(store / "output")])
    assert done.exit_code == 0, done.output + done.stderr
    for stage in ("heal", "attack", "summarize", "main"):
        found, wanted = histories(server.uri, stage), histories(here, stage)
        assert sorted(map(repr, found)) == sorted(map(repr, wanted)), stage
    client = MlflowClient(server.uri)
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    ids = {r.info.run_id for r in runs}
    parents = {r.data.tags.get("mlflow.parentRunId") for r in runs}
    assert len(parents - {None}) == 1
    assert parents - {None} <= ids, "the children are below the run as the store calls it"
    made = {r.data.tags["attack_run_id"] for r in runs if r.data.tags.get("attack_run_id")}
    assert made <= ids | {plain_tags(r.data.tags)["local_run_id"] for r in runs}
