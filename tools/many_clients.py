"""Many clients at once, some of which leave: with --deterministic each gets the tokens that it gets alone.

    python -m tools.many_clients [--requests 200] [--rows 8] [--seed 0]

Requests have random lengths and settings, and some share their beginnings. A server of the bundled model is started,
and ended again; then each prompt is continued alone by the library. The exit code is 1 if any token differs.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx

from mistral import complete, load
from mistral.loader.load import Loaded
from tools.fuzz.bodies import server


@dataclass(frozen=True)
class Asked:
    """A request.

    Args:
        body: of /v1/completions.
        leaves_after: tokens after which the client goes away; None: it stays.
    """

    body: dict[str, Any]
    leaves_after: int | None


def make_requests(rng: random.Random, count: int, longest: int) -> list[Asked]:
    """Requests for a vocabulary of 4096, of up to `longest` tokens each."""
    shared = [rng.randrange(3, 4096) for _ in range(9)]

    def one() -> Asked:
        own = [rng.randrange(3, 4096) for _ in range(rng.randint(1, 30))]
        body: dict[str, Any] = {"prompt": [1, *shared[: rng.choice((0, 4, 9))], *own]}
        body |= {"max_tokens": rng.randint(1, longest), "temperature": rng.choice((0, 1.0)), "seed": rng.randrange(9)}
        return Asked({**body, "return_token_ids": True, "ignore_eos": True}, rng.choice((None, None, 1, 3)))

    return [one() for _ in range(count)]


def ask(url: str, asked: Asked) -> list[int]:
    """The ids of a streamed completion, as far as the client stays.

    Raises:
        RuntimeError: an error came instead.
    """
    ids: list[int] = []
    with httpx.stream("POST", f"{url}/v1/completions", json={**asked.body, "stream": True}, timeout=300) as answer:
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            ids += [i for choice in event["choices"] for i in choice["token_ids"]]
            if asked.leaves_after is not None and len(ids) >= asked.leaves_after:
                break
    return ids


def ask_at_once(url: str, requests: Sequence[Asked]) -> list[list[int]]:
    """The ids that each client got."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(ask, [url] * len(requests), requests))


def differences(requests: Sequence[Asked], got: Sequence[list[int]], loaded: Loaded) -> list[int]:
    """Numbers of the requests that got other tokens than alone."""
    wrong = []
    for number, (asked, ids) in enumerate(zip(requests, got, strict=True)):
        settings = {name: asked.body[name] for name in ("max_tokens", "temperature", "seed")}
        prompt = [asked.body["prompt"]]
        (want,) = complete(prompt, loaded.model, loaded.tokenizer, eos_ids=(), top_p=1.0, **settings)
        if ids != (want.tokens if asked.leaves_after is None else want.tokens[: len(ids)]):
            wrong.append(number)
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Read the flags, ask, compare, and print what differs."""
    parser = argparse.ArgumentParser(prog="python -m tools.many_clients", description="Many clients at once.")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(argv)
    requests = make_requests(random.Random(given.seed), given.requests, longest=80)
    flags = ("--deterministic", "--rows", str(given.rows), "--max_queue", str(given.requests), "--device", "cpu")
    with server(*flags) as url:
        began = time.monotonic()
        got = ask_at_once(url, requests)
        seconds = time.monotonic() - began
        idle = "mistral_running 0" in httpx.get(f"{url}/metrics").text
    wrong = differences(requests, got, load(deterministic=True, device="cpu"))
    left = sum(asked.leaves_after is not None for asked in requests)
    print(
        f"{len(requests)} requests at once, {left} of them left early; {sum(map(len, got))} tokens in {seconds:.1f} s"
    )
    print(f"{len(wrong)} differ from what they get alone{f': {wrong}' if wrong else ''}; rows are free: {idle}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
