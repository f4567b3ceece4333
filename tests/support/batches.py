"""Batch jobs for tests: files of requests, the answers in a file, and a server that is only pretended."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


def request(
    custom_id: str, prompt: str | list[int] = "The king", url: str = "/v1/completions", **body: Any
) -> dict[str, Any]:
    """A line's fields."""
    what = {"prompt": prompt} if url == "/v1/completions" else {"messages": [{"role": "user", "content": prompt}]}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": {**what, **body}}


def write_lines(path: Path, *lines: Any) -> Path:
    """A file of these lines: objects as JSON, text as it is."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def answers(path: Path) -> list[dict[str, Any]]:
    """The lines of an output file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def by_name(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of an output file by custom_id, each once."""
    found = answers(path)
    named = {one["custom_id"]: one for one in found}
    assert len(named) == len(found)
    return named


# What a pretended server answers: a status, headers, and a body; from how often it was asked and what the body was.
Reply = tuple[int, dict[str, str], Any]


@dataclass
class Pretender:
    """A server that answers as a function says.

    Args:
        url: of it.
        asked: bodies, in the order in which they came.
        keys: what was in Authorization.
    """

    url: str = ""
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)


def completion(prompt: str) -> Any:
    """The body of a completion that repeats the prompt."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "cmpl-1", "model": "pretended", "choices": [{"index": 0, "text": prompt}], "usage": usage}


@contextmanager
def pretending(reply: Callable[[int, dict[str, Any]], Reply]) -> Iterator[Pretender]:
    """Such a server, until the block ends."""
    pretender, lock = Pretender(), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                pretender.asked.append(body)
                pretender.keys.append(self.headers["Authorization"])
                number = len(pretender.asked)
            status, headers, answer = reply(number, body)
            data = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *about: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    pretender.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield pretender
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
