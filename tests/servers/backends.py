"""What a team's MLflow server stands on: PostgreSQL, an S3-compatible store, users."""

from __future__ import annotations

import base64
import contextlib
import glob
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from tests.outages.servers import free_port

USER, PASSWORD = "mlflow", "p%40ss%2Fw%3Ard"
"""Of PostgreSQL: a password with signs that addresses are cut at, as it stands in one."""


def missing(*modules: str) -> str:
    """Why a test is skipped whose libraries are not all there; empty where they are."""
    absent = [name for name in modules if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)} (pip install -e '.[dev]')" if absent else ""


def postgresql_programs() -> pathlib.Path | None:
    """Folder of ``initdb`` and ``pg_ctl``: Debian keeps them out of the path."""
    found = shutil.which("initdb")
    folders = [pathlib.Path(found).resolve().parent] if found else []
    folders += [pathlib.Path(f) for f in sorted(glob.glob("/usr/lib/postgresql/*/bin"))[::-1]]
    return next((f for f in folders if (f / "pg_ctl").is_file()), None)


def no_postgresql() -> str:
    """Why there is no PostgreSQL to test with; empty where there is one."""
    if postgresql_programs() is None:
        return "no PostgreSQL here (Debian: apt-get install postgresql)"
    if os.geteuid() == 0 and not (shutil.which("runuser") and account()):
        return "PostgreSQL does not run as root, and there is no other account to run it as"
    return missing("psycopg2")


def account() -> str:
    """Of this machine, that PostgreSQL runs as where this process is root's."""
    import pwd

    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), "")


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """The address of a new, empty PostgreSQL database while the block runs."""
    programs, port = postgresql_programs(), free_port()
    assert programs is not None, "asked for before"
    as_other: list[str] = []
    # Not below pytest's folder, which is closed to other accounts.
    place = pathlib.Path(tempfile.mkdtemp(prefix="llm-healing-postgresql-"))
    password = place / "password"
    password.write_text("p@ss/w:rd")
    if os.geteuid() == 0:
        as_other = ["runuser", "-u", account(), "--"]
        for path in (place, password):
            shutil.chown(path, account())

    def run(*command: str) -> None:
        # pg_ctl leaves its server the output: a pipe would never end.
        with (place.parent / f"{place.name}.log").open("ab") as log:
            done = subprocess.run(
                [*as_other, *command], cwd=place, stdout=log, stderr=log, timeout=120, check=False
            )
        if done.returncode:
            said = (place.parent / f"{place.name}.log").read_text()[-2000:]
            raise RuntimeError(f"{command[0]} ended with {done.returncode}: {said}")

    data = str(place / "data")
    settings = f"-p {port} -k {place} -c listen_addresses=127.0.0.1 -c fsync=off"
    try:
        run(str(programs / "initdb"), "-D", data, "-U", USER, f"--pwfile={password}",
            "--auth=scram-sha-256", "--no-sync", "--encoding=UTF8", "--locale=C")  # fmt: skip
        run(str(programs / "pg_ctl"), "-D", data, "-w", "-t", "60", "-l", str(place / "log"),
            "-o", settings, "start")  # fmt: skip
        try:
            yield f"postgresql+psycopg2://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"
        finally:
            run(str(programs / "pg_ctl"), "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(place, ignore_errors=True)
        (place.parent / f"{place.name}.log").unlink(missing_ok=True)


BUCKET = "runs"
S3_LOGIN = {
    "AWS_ACCESS_KEY_ID": "somebody", "AWS_SECRET_ACCESS_KEY": "something",
    "AWS_DEFAULT_REGION": "us-east-1",
}  # fmt: skip


@contextlib.contextmanager
def s3() -> Iterator[dict[str, str]]:
    """The environment that leads to a new S3-compatible store with one bucket."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    try:
        end = time.monotonic() + 60
        while True:
            try:
                made = urllib.request.Request(f"{address}/{BUCKET}", method="PUT")
                urllib.request.urlopen(made, timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                if time.monotonic() > end or process.poll() is not None:
                    raise
                time.sleep(0.2)
        yield {**S3_LOGIN, "MLFLOW_S3_ENDPOINT_URL": address}
    finally:
        process.kill()
        process.wait()


ADMIN = ("admin", "the admin's own 1")
LOGIN = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
"""Variables in which MLflow's clients look for who they are."""


def basic_auth(folder: pathlib.Path) -> tuple[list[str], dict[str, str]]:
    """Options and environment of a server that asks who one is."""
    settings = folder / "basic_auth.ini"
    settings.write_text(
        "[mlflow]\n"
        "default_permission = READ\n"
        f"database_uri = sqlite:///{folder}/basic_auth.db\n"
        f"admin_username = {ADMIN[0]}\n"
        # A password is hashed slowly, at every request unless its result is kept.
        "auth_cache_ttl_seconds = 600\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
    )
    environment = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of the tests",
    }
    return ["--app-name", "basic-auth"], environment


def as_admin(uri: str, path: str, method: str, **content: str) -> None:
    """A request to the users of a server."""
    login = base64.b64encode(":".join(ADMIN).encode()).decode()
    headers = {"Authorization": f"Basic {login}", "Content-Type": "application/json"}
    request = urllib.request.Request(
        f"{uri}/api/2.0/mlflow/users/{path}", json.dumps(content).encode(), headers, method=method
    )
    urllib.request.urlopen(request, timeout=30).close()
