"""A server in a thread of this process, on a free port of this machine."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import uvicorn

from mistral.loader.load import Loaded, load
from mistral.serve.app import make_app
from mistral.serve.protocol import Served
from mistral.serve.settings import Listen, served_of
from mistral.serve.worker import Worker


@dataclass(frozen=True)
class Running:
    """A server that answers."""

    url: str
    loaded: Loaded
    served: Served
    worker: Worker
    server: uvicorn.Server


@contextmanager
def serving(
    folder: Path | None = None,
    *,
    rows: int = 4,
    max_queue: int = 64,
    api_key: str | None = None,
    cors: tuple[str, ...] = (),
    most: int | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Serve a folder, or the bundled model, until the block ends."""
    loaded = load(folder, device="cpu", max_batch_size=rows, **options)
    served = served_of(loaded, rows=rows, most=most, name=None, template=None)
    worker = Worker(loaded.model, loaded.tokenizer, rows=rows, max_queue=max_queue)
    hosts = Listen.of("127.0.0.1", 0, None, [], []).hosts
    app = make_app(served, worker, hosts=hosts, api_key=api_key, cors=cors)
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=20))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield Running(f"http://127.0.0.1:{port}", loaded, served, worker, server)
    finally:
        server.should_exit = True
        thread.join()


def free_port() -> int:
    """A port where nobody listens.

    It is below those that the system hands out: one of these may be another test's before a server has started.
    """
    while True:
        port = random.SystemRandom().randrange(10_000, 32_000)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


def soon(true: Callable[[], bool]) -> bool:
    """Whether something comes true within two minutes: nothing takes so long, however busy the machine is."""
    end = time.monotonic() + 120
    while not (found := true()) and time.monotonic() < end:
        time.sleep(0.01)
    return found


def as_sent(url: str, body: Any, *, length: int | None = None, key: str = "none") -> bytes:
    """A request for a completion as it goes over a connection; its body is as long as it says, if `length` does not."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {urlsplit(url).netloc}\r\nAuthorization: Bearer {key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content) if length is None else length}\r\n\r\n"
    return head.encode() + content


def connected(url: str) -> socket.socket:
    """A connection to a server."""
    place = urlsplit(url)
    return socket.create_connection((place.hostname, place.port), timeout=120)


def answers(url: str) -> bool:
    """Whether a server is ready."""
    try:
        return httpx.get(f"{url}/health", timeout=60).status_code == 200
    except httpx.HTTPError:
        return False
