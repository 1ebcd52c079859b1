"""A real MLflow server that comes and goes, and a proxy before it that misbehaves."""

from __future__ import annotations

import contextlib
import http.server
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence

import mlflow
import pytest


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def beside_sqlite(folder: pathlib.Path, empty: pathlib.Path) -> Iterator[str]:
    """A folder with a store in a file, to work in for the block: what a server is compared with.

    Args:
        folder: Working directory.
        empty: Database without runs, which is copied.

    Yields:
        The store's address.
    """
    uri, before = f"sqlite:///{shutil.copy(empty, folder / 'mlflow.db')}", mlflow.get_tracking_uri()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        mlflow.set_tracking_uri(uri)
        yield uri
        mlflow.set_tracking_uri(before)


class Server:
    """``mlflow server`` with proxied artifacts on a port that stays the same.

    Args:
        folder: Of its files.
        options: In place of its SQLite database and its folder of artifacts.
        environment: Of its process, beside this one's.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.port = folder, free_port()
        self._options, self._environment = options, environment or {}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve, and wait until it answers."""
        arguments = [
            "--artifacts-destination", str(self.folder / "artifacts"), *self._options,
            "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1",
        ]  # fmt: skip
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            # Eight processes beside the server, for judges and the like, that nobody asks here.
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{self.folder}/mlflow.db",
            **self._environment,
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        log = self.folder / "server.log"
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlflow", "server", *arguments],
                stdout=stream, stderr=stream, env=environment, start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + 90
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise TimeoutError(f"the MLflow server did not start: {log.read_text()[-2000:]}")

    def stop(self) -> None:
        """Gone, with its workers, as when a machine goes down."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, 9)
            self._process.wait()
            self._process = None


Fault = Callable[[http.server.BaseHTTPRequestHandler, int], bool]
"""Given a request and its number: misbehaves and says so, or leaves it to be forwarded."""


class Proxy:
    """Forwards to a server what its fault does not take."""

    def __init__(self, target: str, fault: Fault) -> None:
        self.fault, self.seen = fault, 0
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                length = int(self.headers.get("Content-Length", 0))
                body = self.rfile.read(length)
                proxy.seen += 1
                self.forwarded = lambda: forwarded(self, body)
                if not proxy.fault(self, proxy.seen):
                    status, content = self.forwarded()
                    reply(self, status, content)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

            def log_message(self, *_args: object) -> None:
                pass

        def forwarded(handler: Handler, body: bytes) -> tuple[int, bytes]:
            headers = {
                k: v for k, v in handler.headers.items()
                if k.lower() not in ("host", "content-length", "connection", "accept-encoding")
            }  # fmt: skip
            request = urllib.request.Request(
                target + handler.path, body or None, headers, method=handler.command
            )
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return answer.status, answer.read()
            except urllib.error.HTTPError as error:
                return error.code, error.read()

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def reply(handler: http.server.BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content)
