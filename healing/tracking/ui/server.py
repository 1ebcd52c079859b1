"""MLflow's own server over the tracking store, for the time that somebody looks at it."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator

import mlflow

from healing.errors import TrackingError
from healing.tracking.ui import links

PORT = 5000
"""Taken where it is free."""
START_SECONDS = 120.0
"""What a busy machine may need until the server answers."""
_END_SECONDS = 10.0


def choose_port(wanted: int = 0) -> int:
    """A port of this machine that is free: the wanted one, or else 5000 or any.

    Raises:
        TrackingError: The wanted one is taken.
    """
    for port in (wanted,) if wanted else (PORT, 0):
        with socket.socket() as found:
            # As servers do: a port that was in use a moment ago is free.
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                found.bind(("127.0.0.1", port))
                return int(found.getsockname()[1])
    raise TrackingError(f"port {wanted} is taken: give another --port, or none for any free one")


@contextlib.contextmanager
def serving(wanted: int = 0) -> Iterator[str]:
    """The address of the tracking store's UI while the block runs: the tracking server's own, or
    one that is started here, for this machine alone.

    Args:
        wanted: Port; 0 = 5000 or any free one.

    Raises:
        TrackingError: The port is taken, or the server does not start.
    """
    if links.is_served():
        yield links.absolute("").rstrip("/")
        return
    port = choose_port(wanted)
    command = [sys.executable, "-m", "mlflow", "server"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    # Its requests would push the address off the terminal.
    command += ["--uvicorn-opts", "--log-level warning"]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Everybody on this machine sees a command line, and a database's address has a password.
        "MLFLOW_BACKEND_STORE_URI": mlflow.get_tracking_uri(),
    }
    with tempfile.TemporaryFile() as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait(server, port)
            yield f"http://127.0.0.1:{port}"
        except _DiedError as error:
            log.seek(0)
            said = log.read().decode(errors="replace").strip().splitlines()
            why = said[-1] if said else "it said nothing"
            raise TrackingError(f"MLflow's server did not start: {why}") from error
        finally:
            _end(server)


class _DiedError(Exception):
    """The server ended before it answered."""


def _wait(server: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        if server.poll() is not None:
            raise _DiedError
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.2)
    raise TrackingError(f"MLflow's server did not answer within {START_SECONDS:.0f} s")


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server and the processes that it started."""
    for name in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, name)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(_END_SECONDS)
            return
