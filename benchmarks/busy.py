"""Decoding beside programs that keep cores busy: what default options give, and what the best setting does.

    python -m benchmarks.busy MODEL [--busy 1] [--tokens 150] [--rounds 3]

Each setting is a process of its own that imports this library, loads the model, prefills a prompt of 64 tokens and
generates; the settings take turns. Beside them run `--busy` processes that count for ever.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from typing import Any

GENERATE = """
import sys, time
import mistral
threads = int(sys.argv[2])
loaded = mistral.load(sys.argv[1], device="cpu", threads=threads or None)
times = [time.perf_counter()]
options = {"max_tokens": int(sys.argv[3]), "temperature": 0}
for _ in mistral.stream([list(range(100, 164))], loaded.model, loaded.tokenizer, **options):
    times.append(time.perf_counter())
print(times[1] - times[0], (len(times) - 2) / (times[-1] - times[1]))
"""
# Threads (0: as many as by default), and variables of the environment.
SETTINGS: dict[str, tuple[int, dict[str, str]]] = {
    "default": (0, {}),
    "--threads 1": (1, {}),
    "--threads 2": (2, {}),
    "OMP_WAIT_POLICY=PASSIVE": (0, {"OMP_WAIT_POLICY": "PASSIVE"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--busy", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(given.busy)]
    first: dict[str, list[float]] = {name: [] for name in SETTINGS}
    rates: dict[str, list[float]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(given.rounds):
            for name, (threads, variables) in SETTINGS.items():
                command: list[Any] = [sys.executable, "-c", GENERATE, given.model, str(threads), str(given.tokens)]
                done = subprocess.run(
                    command, capture_output=True, text=True, check=True, env={**os.environ, **variables}
                )
                one, rate = map(float, done.stdout.split())
                first[name].append(one)
                rates[name].append(rate)
                print(f"{name}: {one:.2f} s, {rate:.1f} tokens/s", file=sys.stderr, flush=True)
    finally:
        for process in busy:
            process.kill()
    best = max(statistics.median(each) for each in rates.values())
    for name in SETTINGS:
        rate = statistics.median(rates[name])
        print(
            f"{name:24} first token {statistics.median(first[name]):6.2f} s   then {rate:6.1f} tokens/s   "
            f"{rate / best:.2f} of the best",
            flush=True,
        )


if __name__ == "__main__":
    main()
