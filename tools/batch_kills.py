"""Kill a batch job a hundred times, wherever it is, and look whether every line was answered once.

    python -m tools.batch_kills [--kills 100] [--lines 3000] [--own]

A job of random lengths asks a server of ours, which serves the bundled model from a process of its own, or, with --own,
has the model in its own process. It is ended by SIGKILL after a random time, and started again by the same command.
After the last kill it may end. Half the kills also cut the file at a random byte of its last line, as a machine that
loses its power may. The exit code is 0 if every line is there once and the answers are those of a job that nobody
killed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.compare_vllm import ROOT, end, free_port, wait_for

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


def main() -> int:
    """Read the flags, kill, look; 0 if all is there once."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.batch_kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--lines", type=int, default=3000)
    parser.add_argument("--own", action="store_true", help="the library's own engine in the job's process")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rng = random.Random(given.seed)
    with tempfile.TemporaryDirectory(prefix="batch-kills-") as place:
        work = Path(place)
        names = write_requests(work / "in.jsonl", given.lines, rng)
        how = ["--device", "cpu"] if given.own else []
        server = None
        if not given.own:
            server, url = serve(work / "server.log")
            how = ["--engine", url, "--concurrency", "8"]
        try:
            killed = kill(work, how, given.kills, rng)
            run([*command(work / "out.jsonl", work), *how])
            run([*command(work / "alone.jsonl", work), *how])
        finally:
            if server is not None:
                end(server)
        return verdict(work, names, killed)


def write_requests(path: Path, n: int, rng: random.Random) -> list[str]:
    """Requests for short texts, long texts and conversations; their names."""
    names = [f"request-{i}" for i in range(n)]
    with open(path, "w", encoding="utf-8") as file:
        for name in names:
            chat = rng.random() < 0.3
            text = f"Once {rng.randrange(1000)} kings"
            prompt = {"messages": [{"role": "user", "content": text}]} if chat else {"prompt": text}
            body = {**prompt, "max_tokens": rng.choice((1, 3, 12)), "temperature": 0}
            url = "/v1/chat/completions" if chat else "/v1/completions"
            file.write(json.dumps({"custom_id": name, "method": "POST", "url": url, "body": body}) + "\n")
    return names


def serve(log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """A server of the bundled model."""
    port = free_port()
    words = [sys.executable, "-m", "main", "serve", "--port", str(port), "--device", "cpu", "--rows", "8"]
    with open(log, "wb") as file:
        process = subprocess.Popen(words, cwd=ROOT, env=ENVIRONMENT, stderr=file, start_new_session=True)
    wait_for(f"http://127.0.0.1:{port}", process, log)
    return process, f"http://127.0.0.1:{port}"


def command(out: Path, work: Path) -> list[str]:
    return [sys.executable, "-m", "main", "batch", str(work / "in.jsonl"), str(out)]


def run(words: list[str]) -> None:
    subprocess.run(words, cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, check=True)


def kill(work: Path, how: list[str], kills: int, rng: random.Random) -> list[int]:
    """Start the job and kill it, again and again; how many lines there were each time."""
    out, found = work / "out.jsonl", []
    for number in range(kills):
        process = subprocess.Popen(
            [*command(out, work), *how], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.DEVNULL, start_new_session=True
        )
        size = out.stat().st_size if out.exists() else 0
        while process.poll() is None and (not out.exists() or out.stat().st_size <= size):
            time.sleep(0.001)
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            raise SystemExit(f"the job was done after {number} kills: give it more --lines")
        data = out.read_bytes()
        found.append(data.count(b"\n"))
        if number % 2 and data:
            begin = data.rstrip(b"\n").rfind(b"\n") + 1
            out.write_bytes(data[: rng.randint(begin, len(data))])
        print(f"kill {number + 1}: {found[-1]} lines", file=sys.stderr)
    return found


def verdict(work: Path, names: list[str], killed: list[int]) -> int:
    """What came of it, printed; 0 if it is as it should be."""
    lines = [json.loads(line) for line in (work / "out.jsonl").read_bytes().splitlines()]
    alone = {one["custom_id"]: texts(one) for one in map(json.loads, (work / "alone.jsonl").read_bytes().splitlines())}
    once = sorted(one["custom_id"] for one in lines) == sorted(names)
    equal = all(texts(one) == alone[one["custom_id"]] for one in lines)
    print(f"{len(killed)} kills, at {killed[0]} to {killed[-1]} lines of {len(names)}")
    print(f"every line {'exactly once' if once else 'NOT EXACTLY ONCE'}; answers {'equal' if equal else 'DIFFERENT'}")
    return 0 if once and equal else 1


def texts(one: dict[str, Any]) -> Any:
    """What an answer says."""
    return [choice.get("text") or choice.get("message") for choice in one["response"]["body"]["choices"]]


if __name__ == "__main__":
    sys.exit(main())
