"""Attack, heal and summarize against the servers that people run, compared with plain SQLite.

A server is real: its process, its database, its artifact store, its users.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlflow
import pytest
from click.testing import CliRunner, Result
from mlflow.store.artifact import s3_artifact_repo
from mlflow.tracking import MlflowClient

from entrypoints.attack import main as attack_command
from entrypoints.summarize import main as summarize_command
from entrypoints.sync import main as sync_command
from healing.config.attack import AttackConfig
from healing.config.heal import HealConfig
from healing.config.summarize import SummarizeConfig
from healing.errors import OutageError, TrackingError
from healing.stages.attack import attack
from healing.stages.heal import heal
from healing.stages.summarize import summarize
from healing.stages.summarize_inputs import from_artifact, from_history
from healing.tracking import queries
from healing.tracking.sending.outbox import PLACE
from healing.tracking.store import MlflowStore
from tests.conftest import ROOT
from tests.outages.servers import Server, beside_sqlite, free_port
from tests.outages.test_outages import at_records, histories
from tests.servers import backends
from tests.shell_words import words_of

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "mlflow.md"

SMALL = {"model": "nano", "sequence_length": 64, "probe_tokens": 512, "batch_size": 2,
         "measurement_interval": 1, "verbosity": "quiet"}  # fmt: skip
ARGUMENTS = [
    word for name, value in SMALL.items() for word in (f"--{name.replace('_', '-')}", str(value))
]
STAGES = ("attack", "heal", "summarize")


@pytest.fixture(autouse=True)
def quick_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")  # nobody asks a network who we are
    for name in (*backends.S3_LOGIN, *backends.LOGIN, "MLFLOW_S3_ENDPOINT_URL"):
        monkeypatch.delenv(name, raising=False)


def attacked(output: pathlib.Path) -> str:
    config = AttackConfig(
        **SMALL, arm="random_tokens", attack_steps=2, output_dir=str(output / "attack")
    )
    return attack(config)[0]


def healed(attack_run_id: str, output: pathlib.Path) -> None:
    heal(HealConfig(**SMALL, attack_run_id=attack_run_id, healing_steps=4, healing_lr=3e-3,
                    output_dir=str(output / "heal")))  # fmt: skip


def all_stages(output: pathlib.Path) -> None:
    """The attack's files are out of reach when it is healed, and so on."""
    run_id = attacked(output)
    (output / "attack").rename(output / "attack.away")
    healed(run_id, output)
    (output / "heal").rename(output / "heal.away")
    summarize(SummarizeConfig(verbosity="quiet", output_dir=str(output / "summarize")))
    for stage in ("attack", "heal"):
        (output / f"{stage}.away").rename(output / stage)


@dataclass(frozen=True)
class Whole:
    """What the stages leave beside a SQLite file."""

    histories: dict[str, Any]
    summary: str


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, empty_database: pathlib.Path) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    with beside_sqlite(folder, empty_database) as uri:
        all_stages(folder / "output")
    found = {stage: histories(uri, stage) for stage in STAGES}
    assert [len(found[stage]) for stage in STAGES] == [1, 1, 1]
    assert len(found["heal"][0]["effective_rank"]) == 5
    return Whole(found, the_summary(folder / "output"))


def the_summary(output: pathlib.Path) -> str:
    (table,) = output.glob("summarize/summaries/*/summary.csv")
    return table.read_text()


@dataclass
class Place:
    """A server, and what its users have in their environment."""

    uri: str
    client: dict[str, str] = field(default_factory=dict)


@contextlib.contextmanager
def served(
    folder: pathlib.Path,
    options: list[str],
    environment: dict[str, str] | None = None,
    client: dict[str, str] | None = None,
) -> Iterator[Place]:
    folder.mkdir(exist_ok=True)
    here = {"s3://BUCKET": f"s3://{backends.BUCKET}", "./": f"{folder}/"}
    for there, place in {**here, "sqlite:///": f"sqlite:///{folder}/"}.items():
        options = [option.replace(there, place) for option in options]
    server = Server(folder, options, environment)
    try:
        server.start()
        yield Place(server.uri, client or {})
    finally:
        server.stop()


def documented(mark: str) -> list[str]:
    """The options of the command ``mlflow server`` of docs/mlflow.md in whose block a text is."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    (block,) = (b for b in blocks if mark in b and "mlflow server" in b)
    line = re.search(r"^mlflow server ((?:.*\\\n)*.*)", block, re.MULTILINE)
    return words_of(line[1])


def one_server(folder: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """SQLite and a folder; the server hands the files on."""
    return served(folder, documented("sqlite:///"))


def with_postgresql(folder: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    if reason := backends.no_postgresql():
        pytest.skip(reason)
    return served(folder, ["--backend-store-uri", stack.enter_context(backends.postgresql())])


def with_users(folder: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    if reason := backends.missing("flask_wtf"):
        pytest.skip(reason)
    folder.mkdir()
    login = dict(zip(backends.LOGIN, backends.ADMIN, strict=True))
    return served(folder, *backends.basic_auth(folder), login)


def with_s3(folder: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """The users' own processes write to S3."""
    if reason := backends.missing("moto", "boto3"):
        pytest.skip(reason)
    reach = stack.enter_context(backends.s3())
    options = ["--no-serve-artifacts", "--default-artifact-root", f"s3://{backends.BUCKET}/a"]
    return served(folder, options, client=reach)


def of_a_team(folder: pathlib.Path, stack: contextlib.ExitStack) -> Any:
    """As docs/mlflow.md recommends: PostgreSQL, S3 behind the server, users."""
    reason = backends.no_postgresql() or backends.missing("moto", "boto3", "flask_wtf")
    if reason:
        pytest.skip(reason)
    folder.mkdir()
    _, environment = backends.basic_auth(folder)
    database = stack.enter_context(backends.postgresql())
    (users,) = re.findall(r"```ini\n(.*?)```", PAGE.read_text(), re.DOTALL)
    address = re.compile(r"postgresql\+psycopg2://\S+")
    (folder / "basic_auth.ini").write_text(address.sub(database.replace("%", "%%"), users))
    environment |= {"MLFLOW_BACKEND_STORE_URI": database, **stack.enter_context(backends.s3())}
    login = dict(zip(backends.LOGIN, backends.ADMIN, strict=True))
    return served(folder, [*documented("basic-auth"), "--allowed-hosts", "127.0.0.1:*"],
                  environment, login)  # fmt: skip


SERVERS = {
    "one": one_server, "PostgreSQL": with_postgresql, "users": with_users, "S3": with_s3,
    "team": of_a_team,
}  # fmt: skip


@contextlib.contextmanager
def running(name: str, folder: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A server, and this process as one of its users."""
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(SERVERS[name](folder, stack))
        for variable, value in place.client.items():
            monkeypatch.setenv(variable, value)
        mlflow.set_tracking_uri(place.uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", place.uri)
        yield place


def runs(uri: str) -> list[Any]:
    client = MlflowClient(uri)
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


def files_below(folder: pathlib.Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def same_bytes(run: Any, output: pathlib.Path, fetched: pathlib.Path) -> dict[str, bytes]:
    """Every file in the run's folder is in the store, byte for byte; returns them."""
    stage = run.data.tags["stage"]
    mark = "summary.json" if stage == "summarize" else "config.json"
    (found,) = (output / stage).rglob(mark)
    # Hidden files say whose the folder is, here.
    local = {n: content for n, content in files_below(found.parent).items() if n[0] != "."}
    place = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(fetched))
    stored = files_below(pathlib.Path(place))
    wanted = {
        name: content
        for name, content in stored.items()
        if not name.startswith("images/") and name != "text.json"
    }
    if stage == "summarize":
        local = {name: local[name] for name in local.keys() & wanted.keys()}
        assert {"summary.csv", "report.html"} <= local.keys()
    else:
        assert set(local) <= set(wanted)
    assert all(wanted[name] == content for name, content in local.items())
    return local


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_holds_what_sqlite_holds(store, whole, monkeypatch, name) -> None:
    output = store / "output"
    with running(name, store / "server", monkeypatch) as place:
        all_stages(output)
        found = {stage: histories(place.uri, stage) for stage in STAGES}
        assert found == whole.histories
        assert the_summary(output) == whole.summary
        stored = runs(place.uri)
        assert {r.data.tags["stage"]: r.info.status for r in stored} == dict.fromkeys(
            STAGES, "FINISHED"
        )
        assert not (output / PLACE).exists()
        by_stage = {r.data.tags["stage"]: r for r in stored}
        kept = {
            stage: same_bytes(by_stage[stage], output, store / f"fetched {stage}")
            for stage in STAGES
        }
        assert "checkpoints/checkpoint_post_treatment.pt" in kept["attack"]
        assert by_stage["heal"].data.params["used.attack_run_id"] == by_stage["attack"].info.run_id
        # Trajectories come in bulk, and from the run's own file where they do not.
        view = queries.get_run(by_stage["heal"].info.run_id)
        assert set(from_history([view])) == {view.run_id}
        assert from_artifact(view, MlflowStore()).steps == (0, 1, 2, 3, 4)
        if name == "S3":
            assert by_stage["heal"].info.artifact_uri.startswith(f"s3://{backends.BUCKET}/a/")
        elif name == "team":
            assert by_stage["heal"].info.artifact_uri.startswith("mlflow-artifacts:/")


def command(which: Any, *arguments: str) -> Result:
    return CliRunner().invoke(which, list(arguments))


def said(result: Result) -> str:
    """The one line of an error."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, result.stderr
    assert "Traceback" not in result.output + result.stderr
    return lines[0]


def test_who_is_not_let_in_is_told_what_to_set(store, monkeypatch) -> None:
    """No login, a wrong one, a user who may only read; then the right one."""
    attack_words = [*ARGUMENTS, "--arm", "random_tokens", "--attack-steps", "2"]
    with running("users", store / "server", monkeypatch) as place:
        right = dict(place.client)
        for password in ("wrong-password-1", ""):
            if password:
                monkeypatch.setenv(backends.LOGIN[1], password)
            else:
                for variable in backends.LOGIN:
                    monkeypatch.delenv(variable)
            for which, words in ((attack_command, attack_words), (summarize_command, [])):
                result = command(which, *words, "--output-dir", str(store / "no"))
                assert result.exit_code == 1
                line = said(result)
                assert "401" in line
                assert all(variable in line for variable in backends.LOGIN)
                assert "wrong-password-1" not in line
            assert not list((store / "no").rglob("requests.jsonl"))
        for variable, value in right.items():
            monkeypatch.setenv(variable, value)
        assert command(attack_command, *attack_words).exit_code == 0
        reader = ("reader", "only-to-read-1")
        backends.as_admin(place.uri, "create", "POST", username=reader[0], password=reader[1])
        for variable, value in zip(backends.LOGIN, reader, strict=True):
            monkeypatch.setenv(variable, value)
        result = command(attack_command, *attack_words, "--seed", "1")
        assert result.exit_code == 1
        assert "403" in said(result)
        assert backends.LOGIN[0] in said(result)
        assert [r.info.status for r in runs(place.uri)] == ["FINISHED"]


def test_a_password_in_the_address_is_never_shown(store, monkeypatch) -> None:
    with running("users", store / "server", monkeypatch) as place:
        for variable in backends.LOGIN:
            monkeypatch.delenv(variable)
        for password, works in (("not-the-password", False), ("the-users-own-1", True)):
            if works:
                backends.as_admin(
                    place.uri, "create", "POST", username="somebody", password=password
                )
            address = place.uri.replace("//", f"//somebody:{password}@")
            mlflow.set_tracking_uri(address)
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            result = command(
                attack_command, *ARGUMENTS, "--arm", "none", "--attack-steps", "1",
                "--verbosity", "normal",
            )  # fmt: skip
            assert (result.exit_code == 0) is works, result.output + result.stderr
            assert password not in result.output + result.stderr
        assert b"the-users-own-1" not in b"".join(files_below(store / "experiments").values())


def test_a_password_that_is_changed_amid_a_run(store, whole, monkeypatch) -> None:
    """Training goes on; what waits is sent with the new password."""
    output = store / "output"
    with running("users", store / "server", monkeypatch) as place:
        run_id = attacked(output)
        own, new = ("healer", "the-first-one-1"), "the-second-one-2"
        backends.as_admin(place.uri, "create", "POST", username=own[0], password=own[1])
        backends.as_admin(place.uri, "update-admin", "PATCH", username=own[0], is_admin=True)
        for variable, value in zip(backends.LOGIN, own, strict=True):
            monkeypatch.setenv(variable, value)
        monkeypatch.setattr("healing.tracking.run_logger.FLUSH_SECONDS", 0.0)
        changed = {"username": own[0], "password": new}
        event = {2: lambda: backends.as_admin(place.uri, "update-password", "PATCH", **changed)}
        at_records(monkeypatch, event)
        with pytest.raises(OutageError, match=r"401.*MLFLOW_TRACKING_PASSWORD.*entrypoints\.sync"):
            healed(run_id, output)
        waits = str(output / "heal")
        late = command(sync_command, waits)
        assert (late.exit_code, backends.LOGIN[1] in late.stderr) == (75, True)
        monkeypatch.setenv(backends.LOGIN[1], new)
        sent = command(sync_command, waits)
        assert sent.exit_code == 0, sent.output + sent.stderr
        assert histories(place.uri) == whole.histories["heal"]


def forget_s3() -> None:
    """Clients and credentials that this process found before."""
    s3_artifact_repo._cached_get_s3_client.cache_clear()
    sys.modules["boto3"].DEFAULT_SESSION = None


def nobody_there(broken: pytest.MonkeyPatch) -> str:
    broken.setenv("MLFLOW_S3_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    return "Could not connect"


def no_library(broken: pytest.MonkeyPatch) -> str:
    broken.setitem(sys.modules, "boto3", None)
    return "pip install boto3"


def no_credentials(broken: pytest.MonkeyPatch) -> str:
    for variable in backends.S3_LOGIN:
        broken.delenv(variable)
    broken.setenv("HOME", "/nonexistent")
    return "AWS_ACCESS_KEY_ID"


def test_s3_that_takes_nothing_loses_nothing(store, whole, monkeypatch) -> None:
    """The files wait on disk; the line says what is needed; ``sync`` sends them."""
    with running("S3", store / "server", monkeypatch) as place:
        run_id = attacked(store)
        checkpoint = queries.download(f"runs:/{run_id}/checkpoints/checkpoint_post_treatment.pt")
        for number, fault in enumerate((nobody_there, no_library, no_credentials), 1):
            output = store / fault.__name__
            forget_s3()
            with monkeypatch.context() as broken:
                expected = fault(broken)
                with pytest.raises(TrackingError, match=expected):
                    queries.download(f"runs:/{run_id}/metrics.jsonl")
                with pytest.raises(OutageError, match=rf"{expected}.*entrypoints\.sync"):
                    heal(HealConfig(**SMALL, collapsed_checkpoint=str(checkpoint), healing_steps=4,
                                    healing_lr=3e-3, output_dir=str(output / "heal")))  # fmt: skip
            forget_s3()
            sent = command(sync_command, str(output / "heal"))
            assert sent.exit_code == 0, sent.output + sent.stderr
            assert histories(place.uri) == whole.histories["heal"] * number
            run = max(runs(place.uri), key=lambda r: r.info.start_time)
            assert run.info.status == "FINISHED"
            assert same_bytes(run, output, store / f"fetched {number}")


def test_postgresql_without_a_server(store, whole, monkeypatch) -> None:
    """Its address is a tracking URI too; its password stands in no message and no file."""
    if reason := backends.no_postgresql():
        pytest.skip(reason)
    output = store / "output"
    with backends.postgresql() as uri:
        mlflow.set_tracking_uri(uri)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        all_stages(output)
        assert {stage: histories(uri, stage) for stage in STAGES} == whole.histories
        with pytest.raises(
            TrackingError, match=r"no run 'nope' in postgresql\+psycopg2://mlflow:"
        ) as caught:
            queries.get_run("nope")
        assert backends.PASSWORD not in str(caught.value)
        assert backends.PASSWORD.encode() not in b"".join(files_below(output).values())
        monkeypatch.setitem(sys.modules, "psycopg2", None)
        other = uri.replace("127.0.0.1", "localhost")
        mlflow.set_tracking_uri(other)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
        result = command(summarize_command, "--output-dir", str(store / "no"))
        assert result.exit_code == 1
        assert "pip install psycopg2-binary" in said(result)
        assert os.environ["MLFLOW_TRACKING_URI"] == other
