"""A hub on this machine's loopback, of one repository in a folder: what huggingface_hub's own client asks of one."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1234567890abcdef1234567890abcdef12345678"


@dataclass
class Hub:
    """Args:
    repository: `owner/name` that it has; all others are not found.
    folder: its files.
    gated: whether they need rights that nobody has here.
    fetched: paths of files that were downloaded.
    """

    repository: str
    folder: Path
    gated: bool = False
    fetched: list[str] = field(default_factory=list)
    endpoint: str = ""

    def files(self) -> list[Path]:
        return sorted(path for path in self.folder.rglob("*") if path.is_file())


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            api, resolve = f"/api/models/{hub.repository}", f"/{hub.repository}/resolve/"
            if path == api or path.startswith(f"{api}/"):
                rest = path.removeprefix(api).strip("/")
                if rest.startswith("revision/") and rest not in ("revision/main", f"revision/{COMMIT}"):
                    self._fail(404, "RevisionNotFound")
                elif hub.gated:
                    self._fail(403, "GatedRepo")
                else:
                    self._json(self._tree() if rest.startswith("tree/") else self._info())
            elif path.startswith(resolve):
                self._file(path.removeprefix(resolve).partition("/")[2], body)
            else:
                self._fail(404, "RepoNotFound")

        def _info(self) -> object:
            siblings = [
                {"rfilename": file.relative_to(hub.folder).as_posix(), "size": file.stat().st_size}
                for file in hub.files()
            ]
            return {"_id": "1", "id": hub.repository, "sha": COMMIT, "siblings": siblings, "private": False}

        def _tree(self) -> object:
            return [
                {
                    "type": "file",
                    "path": file.relative_to(hub.folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in hub.files()
            ]

        def _file(self, name: str, body: bool) -> None:
            content = (hub.folder / name).read_bytes()
            if body:
                hub.fetched.append(name)
            self._send(200, content, body, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

        def _fail(self, status: int, code: str) -> None:
            self._send(status, b"{}", self.command == "GET", {"X-Error-Code": code, "X-Error-Message": code})

        def _json(self, content: object) -> None:
            self._send(200, json.dumps(content).encode(), True, {"Content-Type": "application/json"})

        def _send(self, status: int, content: bytes, body: bool, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if body:
                self.wfile.write(content)

    return Handler


@contextmanager
def serve(repository: str, folder: Path) -> Iterator[Hub]:
    """Runs a hub until the block ends."""
    hub = Hub(repository, folder)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
