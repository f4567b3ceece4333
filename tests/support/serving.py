"""A server in a thread of this process, on a free port of this machine."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
