"""Bodies that the server cannot mean, in large numbers: each must be answered, or refused in OpenAI's form.

    python -m tools.fuzz.bodies [--bodies 10000] [--seed 0] [--url http://127.0.0.1:8000]

Without --url a server of the bundled model is started, and ended again. A violation is a status of 500 and above,
another form of error, an error of ours within a stream, no answer within a minute, or a server that has died.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx
from tqdm import tqdm

from mistral.serve.fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE, Kind
from tools.fuzz.mutate import RAW

_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TOOL = {"type": "function", "function": {"name": "f", "parameters": _SCHEMA}}
VALUES: list[Any] = [
    *(None, True, -1, 0, 1, 2**70, 1e308, -0.5, "", "a", "\ud800", "é" * 50, [], [[]], [1, 2], ["a", ""], [1, "a"], {}),
    *({"1": 1}, {"type": "text"}, [{"role": "user", "content": "a"}], [{"role": "user"}], [{}], [[1], ["a"]]),
    *({"include_usage": 1}, [{"role": "user", "content": [{"type": "text", "text": 1}]}], [None], [[1, 2], [3]]),
    *([_TOOL], [_TOOL, _TOOL], [{"type": "function"}], [{**_TOOL, "function": {"name": "f", "parameters": 1}}]),
    *("required", "none", "auto", {"type": "function", "function": {"name": "f"}}, {"type": "json_object"}),
    *({"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}, {"choice": ["a", "b"]}),
    *({"type": "json_schema", "json_schema": {"schema": {"$ref": "#"}}}, {"regex": "(" * 50}, {"json": {"type": 1}}),
    *({"choice": ["\ud800"]}, {"regex": "\ud800"}, [{**_TOOL, "function": {"name": "f", "description": "\ud800"}}]),
    [{"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{"}}]}],
    [{"role": "user", "content": "a"}, {"role": "tool", "tool_call_id": "1", "content": "b"}],
]
GOOD: dict[str, tuple[dict[str, Any], Mapping[str, Kind]]] = {
    "/v1/completions": ({"prompt": "a"}, COMPLETION),
    "/v1/chat/completions": ({"messages": [{"role": "user", "content": "a"}]}, CHAT),
    "/tokenize": ({"prompt": "a"}, TOKENIZE),
    "/detokenize": ({"tokens": [1]}, DETOKENIZE),
}


def make_body(rng: random.Random) -> tuple[str, bytes]:
    """A path and a body for it: a good one in which some fields hold anything, or anything of their type, perhaps
    broken as JSON."""
    path = rng.choice(list(GOOD))
    body, fields = GOOD[path]
    body = {**body, **({"max_tokens": 2} if path.startswith("/v1") else {})}
    for name in rng.choices([*fields, "functions", "x\ud800"], k=rng.randint(1, 3)):
        fitting = [value for value in VALUES if name in fields and fields[name].test(value)]
        body[name] = rng.choice(fitting if fitting and rng.random() < 0.7 else VALUES)
    content = json.dumps(body)
    if rng.random() < 0.2:
        at = rng.randrange(len(content))
        content = content[:at] + rng.choice(["", "[" * 3000, '"', rng.choice(RAW)]) + content[at + 1 :]
    return path, content.encode()


def violation(answer: httpx.Response) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if answer.status_code not in (200, 400, 404, 413, 429):
        return f"status {answer.status_code}"
    if answer.status_code != 200 and not answer.json().get("error", {}).get("message"):
        return "no error in OpenAI's form"
    if '"internal"' in answer.text:
        return "an error of ours in a stream"
    return None


@contextmanager
def server(*flags: str, positions: int = 2000) -> Iterator[str]:
    """A server of the bundled model, with flags of `serve`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    limits = ["--port", str(port), "--max_positions", str(positions)]
    process = subprocess.Popen([sys.executable, "-m", "main", "serve", *limits, *flags])
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.ConnectError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def main(argv: list[str] | None = None) -> int:
    """Read the flags, send the bodies, print violations and a count of statuses."""
    parser = argparse.ArgumentParser(prog="python -m tools.fuzz.bodies", description="Send bodies of all sorts.")
    parser.add_argument("--bodies", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--url", help="of a server that runs already")
    given = parser.parse_args(argv)
    if given.url is None:
        with server() as url:
            return _send(url, given.bodies, given.seed)
    return _send(given.url, given.bodies, given.seed)


def _send(url: str, bodies: int, seed: int) -> int:
    rng, seen, broken = random.Random(seed), Counter[str](), 0
    with httpx.Client(base_url=url, timeout=60, headers={"Content-Type": "application/json"}) as client:
        for _ in tqdm(range(bodies), unit="body", disable=None, leave=False):
            path, content = make_body(rng)
            try:
                answer = client.post(path, content=content)
                problem = violation(answer)
                seen[str(answer.status_code)] += 1
            except httpx.HTTPError as error:
                problem = type(error).__name__
            if problem:
                broken += 1
                print(f"{problem}: {path} {content[:500]!r}", flush=True)
        alive = client.get("/health").status_code == 200
    told = ", ".join(f"{count} answered with {status}" for status, count in sorted(seen.items()))
    print(f"{bodies} bodies: {told}; {broken} violations; the server {'works' if alive else 'has died'}")
    return int(broken > 0 or not alive)


if __name__ == "__main__":
    sys.exit(main())
