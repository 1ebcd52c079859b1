"""What MLflow's clients raise against other servers: away or refused, what to do, no secrets."""

from __future__ import annotations

import pathlib
import sqlite3

import mlflow
import pytest
import requests
import sqlalchemy.exc
from mlflow.exceptions import MlflowException, RestException
from mlflow.protos.databricks_pb2 import (
    PERMISSION_DENIED,
    TEMPORARILY_UNAVAILABLE,
    UNAUTHENTICATED,
)
from mlflow.store.tracking.file_store import FileStore
from mlflow.tracking import MlflowClient

from entrypoints import _cli
from healing.errors import OutageError, TrackingError
from healing.tracking import open_runs, queries
from healing.tracking.sending.outbox import PLACE, Request
from healing.tracking.sending.sender import Sender
from healing.tracking.sending.store_errors import (
    asked,
    cure,
    http_status,
    is_away,
    one_line,
    outage,
    require_address,
    short,
    shown,
    stored,
)
from healing.tracking.ui import experiment_page, links, server

ENDPOINT = "API request to endpoint /api/2.0/mlflow/runs/create failed with error code"


def answer(status: int, body: str) -> MlflowException:
    """As MLflow words the answer of a server that speaks plain text."""
    code = {401: UNAUTHENTICATED, 403: PERMISSION_DENIED}[status]
    return MlflowException(f"{ENDPOINT} {status} != 200. Response body: '{body}'", error_code=code)


def upload(status: int) -> requests.HTTPError:
    found = requests.Response()
    found.status_code = status
    return requests.HTTPError("Client Error for url: http://u:pw@h/a", response=found)


def s3(code: str, status: int) -> BaseException:
    """As boto3 words a failed upload."""
    exceptions = pytest.importorskip("botocore.exceptions")
    failed = pytest.importorskip("boto3.exceptions").S3UploadFailedError
    content = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    try:
        try:
            raise exceptions.ClientError(content, "PutObject")
        except exceptions.ClientError as error:
            raise failed(f"Failed to upload: {error}")  # noqa: B904 (as boto3 does)
    except failed as error:
        return error


def of_botocore(name: str, **values: str) -> Exception:
    error = getattr(pytest.importorskip("botocore.exceptions"), name)(**values)
    assert isinstance(error, Exception)
    return error


FULL = "database or disk is full"


def raised_by(make) -> Exception:
    try:
        make()
    except MlflowException as error:
        return error
    raise AssertionError


def of_mlflow(error: Exception) -> Exception:
    """As MLflow passes a database's error on."""
    found = MlflowException(str(error), error_code=TEMPORARILY_UNAVAILABLE)
    found.__cause__ = error
    return found


MLFLOW, AWS = "MLFLOW_TRACKING_USERNAME", "AWS_ACCESS_KEY_ID"
KINDS = {
    "no such user": (lambda: answer(401, "You are not authenticated."), 401, True, MLFLOW),
    "may not": (lambda: answer(403, "Permission denied"), 403, True, MLFLOW),
    "may not, as JSON": (
        lambda: RestException({"error_code": "PERMISSION_DENIED", "message": "no"}), 403, True,
        MLFLOW,
    ),
    "another host": (lambda: answer(403, "Invalid Host header - x"), 403, True, "--allowed-hosts"),
    "upload refused": (lambda: upload(401), 401, True, MLFLOW),
    "upload failed": (lambda: upload(500), 500, True, ""),
    "no boto3": (lambda: ModuleNotFoundError("x", name="boto3"), None, True, "install boto3`"),
    "no psycopg2": (
        lambda: ModuleNotFoundError("x", name="psycopg2"), None, True, "install psycopg2-binary`",
    ),
    "no Google": (
        lambda: ModuleNotFoundError("x", name="google.cloud"), None, True, "google-cloud-storage`",
    ),
    "S3: no such key": (lambda: s3("InvalidAccessKeyId", 403), 403, True, AWS),
    "S3: busy": (lambda: s3("SlowDown", 503), 503, True, ""),
    "S3: no such bucket": (lambda: s3("NoSuchBucket", 404), 404, False, ""),
    "S3: nobody": (lambda: of_botocore("NoCredentialsError"), None, True, AWS),
    "S3: away": (
        lambda: of_botocore("EndpointConnectionError", endpoint_url="http://h"), None, True, "",
    ),
    "a folder": (lambda: raised_by(FileStore), 400, False, "migrate-filestore"),
    "database: full disk": (
        lambda: of_mlflow(
            sqlalchemy.exc.OperationalError(
                "INSERT INTO tags", {"key": "phase"}, sqlite3.OperationalError(FULL)
            )
        ),
        503, True, "",
    ),
    "database: away": (
        lambda: sqlalchemy.exc.OperationalError("select 1", {}, Exception("refused")), None, True,
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_one_line_with_its_cure(kind) -> None:
    make, status, away, todo = KINDS[kind]
    error = make()
    assert http_status(error) == status
    assert is_away(error) is away
    assert (todo in cure(error)) if todo else not cure(error)
    for where in (stored("metrics of run r"), asked(lambda why: f"asked: {why}")):
        with pytest.raises(TrackingError) as caught, where:
            raise error
        text = str(caught.value)
        assert "\n" not in text
        assert todo in text
        assert "u:pw@" not in text
        assert isinstance(caught.value, OutageError) is away
        assert getattr(caught.value, "denied", False) is bool(away and todo)


def test_a_defect_of_this_program_is_none_of_a_stores() -> None:
    for where in (stored("metrics"), asked(str)):
        with pytest.raises(ZeroDivisionError), where:
            raise ZeroDivisionError


@pytest.mark.parametrize(
    ("address", "wanted"),
    [
        ("http://me:se%40cret@h:5000/x", "http://me:***@h:5000/x"),
        ("postgresql+psycopg2://me:s/ecret@h:1/db", "postgresql+psycopg2://me:***@h:1/db"),
        ("sqlite:////a@b/mlflow.db", "sqlite:////a@b/mlflow.db"),
        ("http://h:5000", "http://h:5000"),
        ("http://me:secret@h:port/x", "http://***@h:port/x"),
        ("s3://b/x@v", "s3://b/x@v"),
        ("runs:/r/a@b", "runs:/r/a@b"),
        ("postgresql://h/db?password=secret&x=1", "postgresql://h/db?password=***&x=1"),
    ],
)
def test_an_address_is_shown_without_its_password(address, wanted) -> None:
    assert shown(address) == wanted


def test_no_message_has_a_login(monkeypatch) -> None:
    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "postgresql://me:s/ecret@h/db")
    text = one_line(ValueError("postgresql://me:s/ecret@h/db and\nhttp://a:b@c/x, d@e"))
    assert text == "postgresql://***@h/db and http://***@c/x, d@e"


def test_who_is_not_let_in_at_first_is_refused_with_what_to_do() -> None:
    class Closed:
        def __call__(self, request: Request, file: pathlib.Path | None, *, again: bool) -> None:
            raise outage("not stored", answer(401, "Who are you?"))

        def run_id(self, run: str) -> str:
            return run

        experiment_id = run_id

    sender = Sender(Closed())
    with pytest.raises(TrackingError) as caught:
        sender.put(Request("r", "create"), patience=10.0)
    sender.forget()
    assert not isinstance(caught.value, OutageError)
    assert caught.value.reason == "401: Who are you?"
    assert MLFLOW in caught.value.cure


def test_what_an_outage_is_called_keeps_what_the_user_can_do() -> None:
    said = {}
    for error in (answer(401, "Who?"), upload(500)):
        with pytest.raises(OutageError) as caught, stored("metrics of run r"):
            raise error
        said[error] = short(caught.value)
        assert "start again" not in said[error]
    first, second = said.values()
    assert first.endswith("those of a user whom it knows")
    assert "make that store reachable" not in second


def test_a_missing_library_is_named_where_a_command_begins(store, monkeypatch) -> None:
    def absent(*_args: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg2'", name="psycopg2")

    monkeypatch.setattr("healing.tracking.sending.requests.MlflowClient", absent)
    with (
        pytest.raises(TrackingError, match=r"cannot be used \(.*\): install .*psycopg2-binary"),
        open_runs.start("a", {}, keep=store / "kept"),
    ):
        pass
    assert not list(store.glob("kept/*"))


def test_why_a_file_cannot_be_had_is_its_own_stores_word(store, monkeypatch) -> None:
    with open_runs.start("a", {}) as run:
        pass

    class Store:
        def download_artifacts(self, path: str, folder: str) -> str:
            raise ModuleNotFoundError(f"{path}: no", name="boto3")

    monkeypatch.setattr(queries, "get_artifact_repository", lambda root: Store())
    with pytest.raises(TrackingError, match=r"m\.json cannot be had: m\.json: no: .*install boto3"):
        queries.download(f"runs:/{run.run_id}/m.json")


def test_a_question_that_needs_a_login_is_not_one_to_try_later(store, monkeypatch) -> None:
    def closed(*_args: object, **_options: object) -> None:
        raise answer(401, "Who?")

    def stage(_config: object) -> None:
        monkeypatch.setattr(MlflowClient, "get_experiment_by_name", closed)
        queries.find_experiment("x")

    entry = _cli.STAGES["summarize"]
    monkeypatch.setattr(type(entry), "load", lambda self, values: stage)
    with pytest.raises(SystemExit) as ended:
        _cli.run_stage("summarize", entry, {})
    assert ended.value.code == 1


def test_who_may_only_read_gets_the_page_of_all_runs(store, monkeypatch) -> None:
    with open_runs.start("a", {}) as run:
        pass

    def closed(*_args: object) -> None:
        raise answer(403, "Permission denied")

    monkeypatch.setattr(MlflowClient, "set_experiment_tag", closed)
    assert experiment_page.page(run.experiment_id) == links.runs_page(run.experiment_id)


def test_a_databases_password_is_in_no_command_line(monkeypatch) -> None:
    seen = []

    def started(command: list[str], **options: object) -> None:
        seen.append((command, options["env"]))
        raise OSError("enough")

    monkeypatch.setattr(mlflow, "get_tracking_uri", lambda: "postgresql://me:secret@h/db")
    monkeypatch.setattr(server.subprocess, "Popen", started)
    with pytest.raises(OSError, match="enough"), server.serving():
        pass
    ((command, environment),) = seen
    assert "secret" not in " ".join(command)
    assert environment["MLFLOW_BACKEND_STORE_URI"] == "postgresql://me:secret@h/db"


def test_of_a_database_the_line_has_what_it_said_alone() -> None:
    """Neither the statement nor its values, and what to do about a full disk."""
    error = KINDS["database: full disk"][0]()
    for where in (stored("tags of run r"), asked(lambda why: f"asked: {why}")):
        with pytest.raises(OutageError) as caught, where:
            raise error
        assert FULL in str(caught.value)
        assert "INSERT" not in str(caught.value)
        assert "phase" not in str(caught.value)
    with pytest.raises(OutageError, match=r"free some of the disk"), stored("tags of run r"):
        raise error


def test_mlflow_prints_no_traceback_beside_the_line(store, caplog) -> None:
    """It would, of every statement that a database does not take."""
    client = MlflowClient()
    run = client.create_run(client.create_experiment("e")).info.run_id
    with sqlite3.connect(store / "mlflow.db") as other:
        other.execute("drop table tags")
    other.close()
    with pytest.raises(OutageError), stored("a tag"):
        client.set_tag(run, "a", "b")
    assert not caplog.records
    with pytest.raises(MlflowException):
        client.set_tag(run, "a", "b")
    assert "Traceback" in caplog.text  # who uses MLflow beside is left alone


@pytest.mark.parametrize(
    "uri",
    [
        "sqlite://", "sqlite:///:memory:", "sqlite:///{0}", "sqlite:///{0}/text/mlflow.db",
        "sqlite:///{0}/text", "sqlite:///{0}/\udcff.db", "http://[::1", "http://h:99999",
        "http://h:0", "http://h:x", "http://", "http:///x", "http://a b", "http://a\x1b[31mb/",
        "http://" + "a" * 5000, "https://a..b", "http://h\n", "http://\u2100.example",
    ],
)  # fmt: skip
def test_an_address_that_can_be_no_stores_is_refused_at_once(store, monkeypatch, uri) -> None:
    """MLflow would try some of them for minutes, keep nothing at others, and fail at the rest with
    errors of the libraries below.
    """
    (store / "text").write_text("no database\n" * 100)
    before = {path: path.read_bytes() for path in store.iterdir() if path.is_file()}
    mlflow.set_tracking_uri(uri.format(store))
    for question in (lambda: queries.get_run("r"), lambda: queries.search("1", "")):
        with pytest.raises(TrackingError, match=r"^MLflow store .*MLFLOW_TRACKING_URI") as caught:
            question()
        assert not isinstance(caught.value, OutageError)
        assert "\n" not in str(caught.value)
    run = open_runs.start("n", {"stage": "t"}, keep=store / "out" / PLACE)
    with pytest.raises(TrackingError, match=r"^MLflow store .*MLFLOW_TRACKING_URI"), run:
        pytest.fail("no run begins")
    assert {path: path.read_bytes() for path in store.iterdir() if path.is_file()} == before


def test_addresses_of_stores_are_let_through(store) -> None:
    for uri in (
        f"sqlite:///{store}/mlflow.db", f"sqlite:///{store}/new/deeper.db", "sqlite:///relative.db",
        "http://localhost:5000", "https://u:p%40w@h.example:1/x/", "http://[::1]:5000",
        "http://b\u00fccher.example", "postgresql://u@h/db", "databricks",
    ):  # fmt: skip
        mlflow.set_tracking_uri(uri)
        require_address()
