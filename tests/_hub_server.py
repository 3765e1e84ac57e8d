"""A small server that speaks the model hub's protocol, as far as huggingface_hub asks for it when it downloads a model.

api/models/{repo}[/revision/{rev}] lists files; [datasets/]{repo}/resolve/{rev}/{file} serves them, with HEAD, ETag, the
commit and ranges. Large files are answered with a redirect to another path, as the hub redirects to its storage.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".model")
"""Names that the hub would keep in large-file storage."""


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        repositories: folder of each by name; all have one commit, COMMIT, with the branch "main" and the tag "v1".
        gated: names that need the token.
        token: the one that is accepted.
        break_after: cut the connection after so many bytes of a large file; once per entry, first come first served.
        die_after: answer nothing any more after so many bytes of a large file.
        status: an HTTP error to answer everything with.
        damage: flip a byte of large files on their way.
        asked: (method, path, Range header or None) of each request.
        leaked: tokens that were sent to the storage, which is on another host and must not see them.
    """

    repositories: dict[str, Path]
    gated: set[str] = field(default_factory=set)
    token: str = "hf_good"
    break_after: list[int] = field(default_factory=list)
    die_after: int | None = None
    status: int | None = None
    damage: bool = False
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)
    url: str = ""

    def fetched(self) -> set[str]:
        """Names of the files whose contents were asked for."""
        paths = [path for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]
        return {path.rsplit("/", 1)[-1] for path in paths}

    def ranges(self) -> list[str]:
        """The Range headers of all requests for a large file's contents, in order."""
        return [wanted for method, path, wanted in self.asked if method == "GET" and "/storage/" in path and wanted]


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Serve until the context ends; `hub.url` is then set."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = self.path.split("?")[0]
        self.hub.asked.append((self.command, path, self.headers.get("Range")))
        if self.hub.die_after is not None and self.hub.die_after < 0:
            self.close_connection = True
        elif self.hub.status is not None:
            self._error(self.hub.status, None, "the server is unwell")
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})", path):
            self._contents(match[1])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path):
            if folder := self._allowed(match[1], match[2] or "main"):
                self._listing(match[1], folder)
        elif match := re.fullmatch(r"(?:/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            if folder := self._allowed(match[1], match[2]):
                self._file(folder / match[3])
        else:
            self._error(404, None, "no such page")

    def _allowed(self, repository: str, revision: str) -> Path | None:
        sent = self.headers.get("Authorization")
        if sent is not None and sent != f"Bearer {self.hub.token}":
            self._error(401, None, "Invalid credentials in Authorization header")
        elif repository not in self.hub.repositories:
            self._error(404 if sent else 401, "RepoNotFound", "Repository not found")
        elif repository in self.hub.gated and sent is None:
            self._error(401, "GatedRepo", f"Access to model {repository} is restricted")
        elif revision not in ("main", "v1", COMMIT):
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return self.hub.repositories[repository]
        return None

    def _listing(self, repository: str, folder: Path) -> None:
        siblings = []
        for file in sorted(p for p in folder.iterdir() if p.is_file()):
            data = file.read_bytes()
            entry: dict[str, Any] = {"rfilename": file.name, "size": len(data), "blobId": _git_id(data)}
            if file.name.endswith(LARGE):
                entry["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        gated = "manual" if repository in self.hub.gated else False
        listing = {"id": repository, "sha": COMMIT, "private": False, "gated": gated, "siblings": siblings}
        self._send(200, json.dumps(listing).encode(), {"Content-Type": "application/json"})

    def _file(self, file: Path) -> None:
        if not file.is_file():
            self._error(404, "EntryNotFound", "Entry not found")
            return
        data, headers = file.read_bytes(), {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if file.name.endswith(LARGE):
            headers |= {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
            headers["Location"] = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{_sha256(data)}"
            self._send(302, b"", headers)
        else:
            self._send(200, data, headers | {"ETag": f'"{_git_id(data)}"'})

    def _contents(self, sha256: str) -> None:
        files = (f for folder in self.hub.repositories.values() for f in folder.iterdir() if f.name.endswith(LARGE))
        data = next(d for d in (file.read_bytes() for file in files) if _sha256(d) == sha256)
        if self.hub.damage:
            data = data[:-1] + bytes([data[-1] ^ 1])
        self.hub.leaked += self.headers.get_all("Authorization", [])
        start = 0
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            start = int(wanted[1])
        headers = {"ETag": f'"{sha256}"', "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
        body = data[start:]
        cut = None
        if self.hub.break_after:
            cut = self.hub.break_after.pop(0)
        elif self.hub.die_after is not None:
            cut, self.hub.die_after = self.hub.die_after, -1
        self._send(206 if start else 200, body, headers if start else {"ETag": headers["ETag"]}, cut)

    def _error(self, status: int, code: str | None, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, body: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[:cut])
        if cut is not None and cut < len(body):
            self.close_connection = True


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
