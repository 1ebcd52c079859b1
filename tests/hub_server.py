"""A loopback server that speaks the Hugging Face Hub's protocol, as far as models and data sets of
tests need it: information, trees, files by range, error codes. It can gate a repository, break
downloads off, and stay silent; it counts what is asked for.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
import urllib.parse
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self


def commit_of(files: dict[str, bytes]) -> str:
    """A commit hash that follows the content (40 hex digits)."""
    digest = hashlib.sha1(b"commit")
    for path, body in sorted(files.items()):
        digest.update(path.encode() + body)
    return digest.hexdigest()


@dataclass
class Repository:
    """One repository.

    Attributes:
        revisions: Branch or tag → path → content.
        gated: Tells of itself, but gives no file to the anonymous.
        head: Branch whose commit a request without a revision means.
    """

    revisions: dict[str, dict[str, bytes]]
    gated: bool = False
    head: str = "main"

    def find(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a branch, tag or commit."""
        for name, files in self.revisions.items():
            if revision in (name, commit_of(files)):
                return commit_of(files), files
        return None


@dataclass(frozen=True)
class Request:
    """One request: method, path, range asked for, bytes of the body that were sent."""

    method: str
    path: str
    range: str
    sent: int


@dataclass
class Hub:
    """The server; ``with Hub(...) as hub`` starts and stops it.

    Attributes:
        repositories: ``models/owner/name`` or ``datasets/owner/name`` → repository.
        breaks: End of a file's path → bytes after which its connection is broken off, every time.
        stops: End of a file's path → bytes after which no more of it is sent, on no connection.
        silent: Whether requests are accepted and never answered.
        instead: Status and content with which the next questions about data sets are answered;
            status 0 = as ever.
        requests: All requests so far.
    """

    repositories: dict[str, Repository]
    breaks: dict[str, int] = field(default_factory=dict)
    stops: dict[str, int] = field(default_factory=dict)
    silent: bool = False
    instead: list[tuple[int, bytes]] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.port = self._server.server_address[1]
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.port}"

    def file_requests(self) -> list[Request]:
        """Those that name a file (HEAD or GET)."""
        return [r for r in self.requests if "/resolve/" in r.path]

    def sent(self, end: str) -> int:
        """Bytes sent of files whose path ends so."""
        return sum(r.sent for r in self.requests if r.path.split("?")[0].endswith(end))


def _entry(path: str, body: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(body), "oid": _etag(body)}


def _etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            self._answer()

        def do_HEAD(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            self._answer()

        def _answer(self) -> None:
            posted = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if hub.silent:
                time.sleep(30)
                return
            path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
            if hub.instead and path.startswith("api/datasets/"):
                status, body = hub.instead.pop(0)
                if status:  # 0: as ever
                    return self._send(
                        status, {"Content-Type": "text/html", "Retry-After": "3600"}, body
                    )
            if found := re.fullmatch(r"api/(models|datasets)/([^/]+/[^/]+)(?:/(.*))?", path):
                return self._api(f"{found[1]}/{found[2]}", found[3] or "", posted)
            if found := re.fullmatch(r"(datasets/)?([^/]+/[^/]+)/resolve/(.+)", path):
                return self._file(f"{found[1] or 'models/'}{found[2]}", found[3])
            return self._error(404, "", "no such page")

        def _repository(self, name: str) -> Repository | None:
            repository = hub.repositories.get(name)
            if repository is None:
                # The Hub answers 401 to the anonymous: it does not tell missing from private.
                self._error(401, "RepoNotFound", "Invalid username or password.")
            else:
                return repository
            return None

        def _api(self, name: str, rest: str, posted: bytes) -> None:
            repository = self._repository(name)
            if repository is None:
                return
            found = re.match(r"(revision|tree|paths-info)/([^/]+)(?:/(.*))?", rest)
            action, revision = (found[1], found[2]) if found else ("", repository.head)
            if rest and not found:
                return self._error(404, "", "no such page")
            known = repository.find(revision)
            if known is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            commit, files = known
            short = name.split("/", 1)[1]
            if action in ("", "revision"):
                siblings = [{"rfilename": path} for path in sorted(files)]
                return self._json(
                    {"id": short, "_id": "0", "sha": commit, "siblings": siblings, "tags": [],
                     "private": False, "gated": False, "disabled": False, "downloads": 0}
                )  # fmt: skip
            below = (found[3] or "") if found else ""
            if action == "tree":
                return self._tree(files, below)
            form = urllib.parse.parse_qs(posted.decode())
            if self.headers.get("Content-Type", "").startswith("application/json"):
                form = json.loads(posted)
            wanted = form.get("paths", [])
            wanted = [wanted] if isinstance(wanted, str) else wanted
            entries = [_entry(p, files[p]) for p in wanted if p in files]
            folders = {p for p in wanted if any(f.startswith(p.rstrip("/") + "/") for f in files)}
            entries += [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)]
            return self._json(entries)

        def _tree(self, files: dict[str, bytes], below: str) -> None:
            query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
            recursive = query.get("recursive", ["False"])[0].lower() in ("true", "1")
            prefix = f"{below}/" if below else ""
            inside = {p: b for p, b in files.items() if p.startswith(prefix)}
            if below and not inside:
                return self._error(404, "EntryNotFound", f"{below} does not exist")
            parents = {
                "/".join(p.split("/")[:depth])
                for p in inside
                for depth in range(1, p.count("/") + 1)
            }
            folders = sorted(p for p in parents if p.startswith(prefix) and p != below)
            entries = [{"type": "directory", "path": p, "oid": "0" * 40} for p in folders]
            entries += [_entry(path, body) for path, body in sorted(inside.items())]
            shown = [e for e in entries if recursive or "/" not in e["path"][len(prefix) :]]
            return self._json(shown)

        def _file(self, name: str, rest: str) -> None:
            repository = self._repository(name)
            if repository is None:
                return
            if repository.gated:
                return self._error(401, "GatedRepo", f"Access to {name} is restricted.")
            revision, _, path = rest.partition("/")
            known = repository.find(revision)
            if known is None:
                return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            commit, files = known
            if path not in files:
                return self._error(404, "EntryNotFound", f"{path} does not exist", commit)
            body, status, headers = files[path], 200, {"X-Repo-Commit": commit}
            headers |= {"ETag": f'"{_etag(body)}"', "Accept-Ranges": "bytes"}
            whole = len(body)
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(span[1]), min(int(span[2] or whole - 1), whole - 1)
                if start >= whole:
                    headers["Content-Range"] = f"bytes */{whole}"
                    return self._send(416, headers, b"")
                status, body = 206, body[start : end + 1]
                headers["Content-Range"] = f"bytes {start}-{end}/{whole}"
            limit = next((n for end_, n in hub.breaks.items() if path.endswith(end_)), None)
            for end_, total in hub.stops.items():
                if path.endswith(end_):
                    limit = max(0, total - hub.sent(end_))
            return self._send(status, headers, body, limit)

        def _json(self, content: Any) -> None:
            headers = {"Content-Type": "application/json"}
            self._send(200, headers, json.dumps(content).encode())

        def _error(self, status: int, code: str, message: str, commit: str = "") -> None:
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            if commit:
                headers["X-Repo-Commit"] = commit
            self._send(status, headers, json.dumps({"error": message}).encode())

        def _send(
            self, status: int, headers: dict[str, str], body: bytes, limit: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            sent = 0
            try:
                if self.command != "HEAD":
                    part = body if limit is None else body[:limit]
                    # In pieces: a reader that has enough hangs up, and the rest is not sent.
                    for start in range(0, len(part), 65_536):
                        self.wfile.write(part[start : start + 65_536])
                        self.wfile.flush()
                        sent += len(part[start : start + 65_536])
                    if limit is not None and limit < len(body):
                        self.close_connection = True
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                asked = self.headers.get("Range", "")
                hub.requests.append(Request(self.command, self.path, asked, sent))

    return Handler
