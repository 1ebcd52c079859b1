"""MLflow's client against a server that takes every request and answers none."""

from __future__ import annotations

import http.server
import os
import threading
from collections import Counter
from collections.abc import Iterator

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from healing.errors import OutageError
from healing.tracking.sending.requests import Messenger, create


@pytest.fixture
def seen(monkeypatch) -> Iterator[Counter[str]]:
    """How often each address was asked of a server that hangs up without a byte."""
    found = Counter[str]()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found[self.path.rpartition("/mlflow/")[2]] += 1
            self.close_connection = True

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"http://127.0.0.1:{server.server_port}")
    yield found
    mlflow.set_tracking_uri(before)
    server.shutdown()
    server.server_close()


def test_a_run_is_asked_for_once_at_a_time(seen) -> None:
    request = create("f" * 32, {"id": "0"}, "r", {}, 0)
    with pytest.raises(OutageError, match="could not be stored"):
        Messenger()(request, None, again=False)
    assert seen == {"runs/create": 1}


def test_questions_are_repeated_as_the_environment_says(seen) -> None:
    Messenger()
    with pytest.raises(MlflowException, match=r"Connection aborted|Max retries"):
        MlflowClient().create_run("0")
    assert seen == {"runs/create": 3}
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "2"
