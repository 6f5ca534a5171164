"""A small Hugging Face hub on this machine: real HTTP, repositories served from folders.

It speaks what `hf_hub_download` and `snapshot_download` of huggingface_hub 2.4 ask for: a file's metadata and content
under `/[datasets/]OWNER/NAME/resolve/REVISION/FILE`, and `/api/{models,datasets}/OWNER/NAME` with `/revision/R` or
`/tree/R`. It also takes what `HfApi.upload_folder` sends, every file in one piece, under `/api/whoami-v2`,
`/api/repos/create` and `/api/models/OWNER/NAME/{preupload,commit}/main`; the token `hf_refused` is refused. The client
reads its address from HF_ENDPOINT when it is imported, so a test runs the client in a process of its own, with
`HubServer.environment` as its environment.
"""

import base64
import hashlib
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Request:
    """One request, as the client made it."""

    method: str
    path: str
    range: str | None


@dataclass
class HubServer:
    """A hub with the repositories that were added; `with HubServer().run() as hub: ...`.

    Each repository has one commit, known by its hash and as `main`.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    """`models/OWNER/NAME` or `datasets/OWNER/NAME` -> the folder with its files."""
    gated: set[str] = field(default_factory=set)
    """Repositories whose terms nobody has accepted."""
    status: int | None = None
    """Answer everything with this HTTP status."""
    drop_after: int | None = None
    """Close the connection after this many bytes of the next file's content; then this is None again."""
    drops_left: int = 1
    """How many contents in a row are cut off by `drop_after`."""
    visibility: dict[str, str] = field(default_factory=dict)
    """Of the repositories that a client has made, as `folders` names them."""
    refuse_uploads: int | None = None
    """Answer uploads of files with this HTTP status."""
    requests: list[Request] = field(default_factory=list)
    address: str = ""
    uploads: Path = Path()
    """Where the files of repositories that clients make are kept, while it runs."""

    def add(self, kind: str, repo: str, folder: Path) -> None:
        """Serves `folder` as `repo`; `kind` is `models` or `datasets`."""
        self.folders[f"{kind}/{repo}"] = folder

    def downloads(self, filename: str) -> list[Request]:
        """The requests for the content of `filename` so far."""
        return [
            request
            for request in self.requests
            if request.method == "GET" and re.search(rf"/resolve/[^/]+/{re.escape(filename)}$", request.path)
        ]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """A process's environment in which this is the hub, and its cache is in `home`."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_", "SEARCHE1_LITE_")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
        proxies = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
        return kept | proxies | {"HF_ENDPOINT": self.address, "HF_HOME": str(home)} | more

    @contextmanager
    def run(self) -> Iterator["HubServer"]:
        """Serves on a free port of 127.0.0.1 while the body runs."""
        handler = type("Handler", (_Handler,), {"hub": self})
        with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
            server.daemon_threads = True
            self.address = f"http://127.0.0.1:{server.server_address[1]}"
            thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
            thread.start()
            with tempfile.TemporaryDirectory() as uploads:
                self.uploads = Path(uploads)
                try:
                    yield self
                finally:
                    server.shutdown()
                    thread.join()


def _commit(key: str) -> str:
    return hashlib.sha1(key.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Nothing: the tests read `HubServer.requests`."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            refused = self.headers.get("Authorization") == "Bearer hf_refused"
            return self._refuse(401, "") if refused else self._send_json({"type": "user", "name": "me", "orgs": []})
        if path == "/api/agent-harnesses":  # huggingface_hub asks for this once a day, for its user agent
            return self._send(404, {}, b"{}")
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        if self.hub.status is not None:
            return self._send(self.hub.status, {}, b"no service")
        if api := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            kind, repo, what, revision = api.groups()
            key = f"{kind}/{repo}"
            if self._refused(key, revision, listing=True):
                return None
            if what == "tree":
                entries = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": _etag(file)}
                    for name, file in self._files(key).items()
                ]
                return self._send_json(entries)
            siblings = [{"rfilename": name} for name in self._files(key)]
            return self._send_json({"id": repo, "sha": _commit(key), "siblings": siblings, "private": False})
        if file := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            prefix, repo, revision, name = file.groups()
            key = f"{(prefix or 'models/')}{repo}"
            if self._refused(key, revision, listing=False):
                return None
            if name not in self._files(key):
                return self._refuse(404, "EntryNotFound", {"X-Repo-Commit": _commit(key)})
            return self._send_file(key, self._files(key)[name])
        return self._refuse(404, "RepoNotFound")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(Request(self.command, path, None))
        if path == "/api/repos/create":
            asked = json.loads(body)
            key = f"models/{asked['organization']}/{asked['name']}"
            self.hub.visibility[key] = asked.get("visibility", "public")
            self.hub.folders[key] = self.hub.uploads / key
            self.hub.folders[key].mkdir(parents=True, exist_ok=True)
            return self._send_json({"url": f"{self.hub.address}/{key.removeprefix('models/')}", "id": key})
        if path == "/api/validate-yaml":
            return self._send_json({"warnings": [], "errors": []})
        upload = re.fullmatch(r"/api/(models/[^/]+/[^/]+)/(preupload|commit)/main", path)
        if upload is None or upload[1] not in self.hub.folders:
            return self._refuse(404, "RepoNotFound")
        if self.hub.refuse_uploads is not None:
            return self._send(self.hub.refuse_uploads, {}, b"no uploads")
        if upload[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return self._send_json(
                {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            )
        for line in map(json.loads, body.decode().splitlines()):
            if line["key"] == "file":
                place = self.hub.folders[upload[1]] / line["value"]["path"]
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(base64.b64decode(line["value"]["content"]))
        commit = _commit(upload[1])
        return self._send_json({"commitOid": commit, "commitUrl": f"{self.hub.address}/{upload[1]}/commit/{commit}"})

    def _files(self, key: str) -> dict[str, Path]:
        folder = self.hub.folders[key]
        return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}

    def _refused(self, key: str, revision: str | None, listing: bool) -> bool:
        """Refuses as the hub does: 401 where it does not tell a private repository from none."""
        if key not in self.hub.folders:
            self._refuse(401, "RepoNotFound")
        elif revision not in (None, "main", _commit(key)):
            self._refuse(404, "RevisionNotFound")
        elif key in self.hub.gated and not listing:  # a gated repository's list of files is public
            self._refuse(401, "GatedRepo", {"X-Repo-Commit": _commit(key)})
        else:
            return False
        return True

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": f"{code}.", **(headers or {})}, b"")

    def _send_json(self, value: object) -> None:
        self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _send_file(self, key: str, file: Path) -> None:
        content = file.read_bytes()
        headers = {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": _commit(key), "Accept-Ranges": "bytes"}
        start = 0
        if asked := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(asked[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206 if start else 200, headers, content[start:], droppable=True)

    def _send(self, status: int, headers: dict[str, str], body: bytes, droppable: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if droppable and self.hub.drop_after is not None:
            body = body[: self.hub.drop_after]
            self.hub.drops_left -= 1
            if self.hub.drops_left <= 0:
                self.hub.drop_after, self.hub.drops_left = None, 1
            self.close_connection = True
        self.wfile.write(body)


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
