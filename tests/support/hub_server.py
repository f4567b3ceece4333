"""A hub in a thread: as much of the Hugging Face hub's API as fetching a model needs, from folders here.

What it was asked for is recorded, and it can be told to refuse, to break off and to stall.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Repositories, by id: `files` by revision, all of them small.

    Args:
        gated: ids whose files are refused, and not their listing.
        cut: how many more answers with this file break off half way.
        stall: a file of which one half is sent, and then nothing until `go_on`.
        down: the status that everything is answered with.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, dict[str, bytes]]] = {}
        self.gated: set[str] = set()
        self.cut: dict[str, int] = {}
        self.stall = ""
        self.go_on, self.stalled = threading.Event(), threading.Event()
        self.down = 0
        self.asked: list[tuple[str, str, str]] = []  # method, file or "listing", the Range header
        self.url = ""

    def add(self, repo: str, folder: Path, revision: str = "main", **more: bytes | str) -> None:
        """A repository with the files of a folder, and more of them given by name, with __ for the dot."""
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        for name, data in more.items():
            files[name.replace("__", ".")] = data.encode() if isinstance(data, str) else data
        self.repos.setdefault(repo, {})[revision] = files

    def commit(self, repo: str, revision: str = "main") -> str:
        """The commit that a revision is."""
        return hashlib.sha1(f"{repo} {revision}".encode()).hexdigest()

    def sent(self) -> set[str]:
        """The files that were asked for with their contents."""
        return {name for method, name, _ in self.asked if method == "GET" and name != "listing"}

    def find(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        """Commit and files of a revision, which may be given as its commit."""
        for name, files in self.repos[repo].items():
            if revision in (name, self.commit(repo, name)):
                return self.commit(repo, name), files
        return None


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        hub = self.hub
        if hub.down:
            self.answer(hub.down)
        elif listing := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/(.+))?", path):
            hub.asked.append((self.command, "listing", ""))
            if found := self.found(listing[1], unquote(listing[3] or "main")):
                commit, files = found
                siblings = [{"rfilename": name} for name in files]
                self.answer(200, json.dumps({"id": listing[1], "sha": commit, "siblings": siblings}).encode())
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            hub.asked.append((self.command, unquote(file[3]), self.headers.get("Range", "")))
            if found := self.found(file[1], unquote(file[2])):
                self.file(file[1], *found, unquote(file[3]))
        else:
            self.answer(404)

    do_HEAD = do_GET

    def found(self, repo: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if repo not in self.hub.repos:  # what the hub says to those who are not logged in
            self.answer(401, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        found = self.hub.find(repo, revision)
        if found is None:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        return found

    def file(self, repo: str, commit: str, files: dict[str, bytes], name: str) -> None:
        if repo in self.hub.gated:
            self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            return
        if name not in files:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        data = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"', "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(part[1])
            headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
            self.answer(206, data[first:], headers, name)
        else:
            self.answer(200, data, headers, name)

    def answer(self, status: int, data: bytes = b"", headers: dict[str, str] | None = None, name: str = "") -> None:
        hub = self.hub
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if hub.cut.get(name, 0):
            hub.cut[name] -= 1
            self.wfile.write(data[: len(data) // 2])
            self.close_connection = True
            return
        if name and name == hub.stall:
            self.wfile.write(data[: len(data) // 2])
            hub.stalled.set()
            hub.go_on.wait(60)
            self.close_connection = True
            return
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that answers at its `url` until the block ends."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
