"""A small server that speaks the model hub's protocol, as far as huggingface_hub asks for it to get or put a model.

api/models/{repo}[/revision/{rev}] lists files; [datasets/]{repo}/resolve/{rev}/{file} serves them, with HEAD, ETag, the
commit and ranges. Large files are answered with a redirect to another path, as the hub redirects to its storage.

Uploads: api/repos/create, branch/{name}, validate-yaml, preupload/{rev} (which files are large), git-lfs's batch with
PUT to the storage in one part or several, and commit/{rev} in lines of JSON.
"""

import base64
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

import yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin", ".model", ".gguf", ".onnx", ".data")
"""Names that the hub would keep in large-file storage."""


@dataclass
class Hub:
    """What the server holds, how it misbehaves, and what it was asked.

    Attributes:
        repositories: folder of each by name; all have one commit, COMMIT, with the branch "main" and the tag "v1".
        gated: names that need the token.
        token: the one that is accepted.
        break_after: cut the connection after so many bytes of a large file (one that is uploaded: at once); once per
            entry, first come first served.
        die_after: answer nothing any more after so many bytes of a large file.
        status: an HTTP error to answer everything with.
        damage: flip a byte of large files on their way.
        asked: (method, path, Range header or None) of each request.
        leaked: tokens that were sent to the storage, which is on another host and must not see them.
        organization: where the token may write.
        branches: of every repository.
        private: names that were made private.
        part_bytes: size of the parts in which large files are taken; None takes them whole.
        stored: large files that were uploaded, by SHA-256.
        commits: what each commit put where: repository, branch, files by path.
        parts: of large files that are on their way, by SHA-256 and number.
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
    organization: str = "me"
    branches: set[str] = field(default_factory=lambda: {"main"})
    private: set[str] = field(default_factory=set)
    part_bytes: int | None = None
    stored: dict[str, bytes] = field(default_factory=dict)
    commits: list[tuple[str, str, dict[str, bytes]]] = field(default_factory=list)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
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
        elif revision not in (*self.hub.branches, "v1", COMMIT):
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

    def do_PUT(self) -> None:
        self._write()

    def do_POST(self) -> None:
        self._write()

    def _write(self) -> None:
        """Whatever changes something; all but the storage of large files needs the token."""
        path, body = self.path.split("?")[0], self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.asked.append((self.command, path, None))
        if self.hub.status is not None:
            self._error(self.hub.status, None, "the server is unwell")
        elif self.hub.break_after and path.startswith("/storage/"):
            self.hub.break_after.pop()
            self.close_connection = True
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})/(\d+)", path):
            self.hub.leaked += self.headers.get_all("Authorization", [])
            self.hub.parts.setdefault(match[1], {})[int(match[2])] = body
            self._send(200, b"", {"ETag": f'"{_sha256(body)}"'})
        elif match := re.fullmatch(r"/complete/([0-9a-f]{64})", path):
            self._complete(match[1], json.loads(body))
        elif (sent := self.headers.get("Authorization")) != f"Bearer {self.hub.token}":
            self._error(401, None, "Invalid credentials in Authorization header" if sent else "Who are you?")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == "/api/validate-yaml":
            front = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if isinstance(front, dict) and "pipeline_tag" in front else [{"message": "no metadata"}]
            self._json({"errors": wrong, "warnings": []}, 400 if wrong else 200)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            if self._writable(match[1], "main"):
                self._json({"objects": [self._place(entry) for entry in json.loads(body)["objects"]]})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", path):
            if self._writable(match[1], "main"):
                self.hub.branches.add(match[2])
                self._json({})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/([^/]+)", path):
            if self._writable(match[1], match[3]):
                self._preupload(json.loads(body)) if match[2] == "preupload" else self._commit(match[1], match[3], body)
        else:
            self._error(404, None, "no such page")

    def _writable(self, repository: str, revision: str) -> bool:
        if self._allowed(repository, revision) is None:
            return False
        if repository.split("/")[0] != self.hub.organization:
            self._error(403, None, "You don't have the rights to write here")
            return False
        return True

    def _create(self, wanted: dict[str, Any]) -> None:
        repository = f"{wanted['organization']}/{wanted['name']}"
        if wanted["organization"] != self.hub.organization:
            self._error(403, None, "You don't have the rights to create a model under this namespace")
        elif repository in self.hub.repositories:
            self._error(409, None, "You already created this model repo")
        else:
            self.hub.repositories[repository] = Path("/nowhere")
            if wanted.get("visibility") == "private" or wanted.get("private"):
                self.hub.private.add(repository)
            self._json({"url": f"{self.hub.url}/{repository}"})

    def _preupload(self, wanted: dict[str, Any]) -> None:
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular", "shouldIgnore": False}
            for f in wanted["files"]
        ]
        self._json({"files": modes})

    def _place(self, entry: dict[str, Any]) -> dict[str, Any]:
        """Where a large file goes; nowhere if it is there."""
        oid, length = entry["oid"], entry["size"]
        if oid in self.hub.stored:
            return entry
        storage = f"{self.hub.url.replace('127.0.0.1', 'localhost')}/storage/{oid}"
        part = self.hub.part_bytes
        if part is None:
            upload, verify = {"href": f"{storage}/1"}, {"verify": {"href": f"{self.hub.url}/complete/{oid}"}}
        else:
            header = {f"{n + 1:05d}": f"{storage}/{n + 1}" for n in range(-(-length // part))}
            upload = {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(part)} | header}
            verify = {}
        return entry | {"actions": {"upload": upload} | verify}

    def _complete(self, oid: str, said: dict[str, Any]) -> None:
        data = b"".join(part for _, part in sorted(self.hub.parts.pop(oid).items()))
        if said["oid"] != oid or _sha256(data) != oid:
            self._error(400, None, "what arrived has another hash")
            return
        self.hub.stored[oid] = data
        self._json({})

    def _commit(self, repository: str, branch: str, body: bytes) -> None:
        files = {}
        for entry in map(json.loads, body.splitlines()):
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
        self.hub.commits.append((repository, branch, files))
        self._json({"success": True, "commitOid": COMMIT, "commitUrl": f"{self.hub.url}/{repository}/commit/{COMMIT}"})

    def _json(self, content: dict[str, Any], status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

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
