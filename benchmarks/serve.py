"""Servers side by side, with 1, 4 and 16 clients at once: tokens a second, time to the first token, 95th percentile.

    python -m benchmarks.serve --start NAME='COMMAND {port}' [--start ..] [--clients 1,4,16] [--json FILE]
    python -m benchmarks.serve --url NAME=http://127.0.0.1:8000 [--url ..]

Each server is started in turn (`{port}` in its command is a free port), asked until it answers, measured, and ended.
Each client sends one request after the other, streamed, greedy, for --tokens tokens each, and with a beginning of its
own, so that no prefix is shared; --ids 85 makes prompts of 85 ids, for models whose tokenizers differ, or have no
words. End-of-sequence is ignored (`ignore_eos`, or --body with a bias against it). Where a
server gives no usage, pieces of text are counted as tokens. For instance

    --start ours='python -m main serve MODEL.gguf --rows 16 --port {port}'
    --start llama-server='llama-server -m MODEL.gguf -np 16 -c 16384 -t 2 --port {port}'
    --start llama_cpp.server='python -m llama_cpp.server --model MODEL.gguf --n_threads 2 --port {port}'
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

RUN = os.getpid()  # so that no server still has the prompts of an earlier run
IDS = range(1000, 4000)  # of words, in the vocabularies that there are
WORDS = "The old king had three daughters who lived in a castle above the sea, and every evening "


@dataclass(frozen=True)
class Figures:
    """Of one server with some clients.

    Args:
        clients: at once.
        tokens_per_second: of all of them together.
        first_median, first_p95: seconds from a request to its first text.
        request_p95: seconds that a request took.
        requests: that were finished in time.
    """

    server: str
    clients: int
    tokens_per_second: float
    first_median: float
    first_p95: float
    request_p95: float
    requests: int


@contextmanager
def started(command: str) -> Iterator[str]:
    """A server's address, while it runs."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(shlex.split(command.replace("{port}", str(port))), stdout=quiet, stderr=quiet)
    url = f"http://127.0.0.1:{port}"
    try:
        while not _ready(url):
            if process.poll() is not None:
                sys.exit(f"{command} ended with {process.returncode}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/v1/models", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


def prompt(number: int, ids: int) -> str | list[int]:
    """A text, or so many ids, that no other number has."""
    if ids:
        return [1, *random.Random(f"{RUN} {number}").choices(IDS, k=ids - 1)]
    return f"Tale {RUN} {number}. {WORDS * 4}"


def ask(client: httpx.Client, url: str, number: int, base: dict[str, Any], ids: int) -> tuple[float, float, int]:
    """One request: seconds to its first text, seconds in all, and tokens."""
    body = {
        "prompt": prompt(number, ids),
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        **base,
    }
    began, first, count, pieces = time.perf_counter(), 0.0, 0, 0
    with client.stream("POST", f"{url}/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            raise RuntimeError(f"{url} answered {answer.status_code}: {answer.read().decode()}")
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                count = event["usage"]["completion_tokens"]
            if event.get("choices") and event["choices"][0].get("text"):
                first = first or time.perf_counter() - began
                pieces += 1
    return first, time.perf_counter() - began, count or pieces


def measure(server: str, url: str, clients: int, base: dict[str, Any], ids: int, seconds: float) -> Figures:
    """Some clients at once, each with request after request, until the time is over and the last has its answer."""
    found: list[tuple[float, float, int]] = []
    began = time.perf_counter()

    def client(number: int) -> None:
        rounds = 0
        with httpx.Client(timeout=600) as mine:  # which takes 25 ms to make, and is no part of a request
            while not rounds or time.perf_counter() - began < seconds:
                found.append(ask(mine, url, 1000 * clients + 100 * rounds + number, base, ids))
                rounds += 1

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    elapsed = time.perf_counter() - began
    firsts, wholes, counts = zip(*found, strict=True)
    return Figures(
        server,
        clients,
        round(sum(counts) / elapsed, 1),
        round(statistics.median(firsts), 3),
        round(_p95(firsts), 3),
        round(_p95(wholes), 3),
        len(found),
    )


def _p95(values: tuple[float, ...]) -> float:
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


def main(argv: list[str] | None = None) -> None:
    """Read the flags, measure each server, print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve", description="Measure servers side by side.")
    parser.add_argument("--start", action="append", default=[], metavar="NAME=COMMAND", help="a server to start")
    parser.add_argument("--url", action="append", default=[], metavar="NAME=URL", help="a server that runs already")
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--tokens", type=int, default=64, help="generated by each request: %(default)s")
    parser.add_argument("--ids", type=int, default=0, help="prompts of so many ids, and not of text")
    parser.add_argument("--seconds", type=float, default=8, help="for each number of clients: %(default)s")
    parser.add_argument("--body", type=json.loads, default={}, help="JSON with more fields of each request")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(argv)
    rows: list[Figures] = []

    def run(name: str, url: str) -> None:
        model = httpx.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"]
        base = {"model": model, "max_tokens": given.tokens, **given.body}
        with httpx.Client(timeout=600) as first:
            ask(first, url, 0, {**base, "max_tokens": 4}, given.ids)  # once, to warm up
        for clients in map(int, given.clients.split(",")):
            rows.append(measure(name, url, clients, base, given.ids, given.seconds))
            print(" ".join(f"{key}={value}" for key, value in asdict(rows[-1]).items()), flush=True)

    for one in given.start:
        name, _, command = one.partition("=")
        with started(command) as url:
            run(name, url)
    for one in given.url:
        name, _, url = one.partition("=")
        run(name, url)
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
