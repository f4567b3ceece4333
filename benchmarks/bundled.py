"""The bundled model: decode rate, and prefill cost a token against the prompt's length.

    python -m benchmarks.bundled [THREADS]

A timing is printed, never tested. Prefill must be flat: with a window, a token costs the same anywhere.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from mistral.generate import complete
from mistral.loader.load import Loaded, load

REPEATS = 5


def seconds(loaded: Loaded, prompt: str | list[int], max_tokens: int) -> float:
    """Median time of a greedy completion."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        complete([prompt], loaded.model, loaded.tokenizer, max_tokens=max_tokens, temperature=0)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("threads", nargs="?", type=int)
    threads = parser.parse_args().threads
    if threads is not None:
        torch.set_num_threads(threads)
    loaded = load()
    print(loaded.describe())
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, medians of {REPEATS}")
    seconds(loaded, "Once", 2)  # the first call of a process is slower
    print(f"decode: {200 / seconds(loaded, 'Once upon a time', 200):.0f} tokens/s over 200 tokens")
    random = torch.Generator().manual_seed(0)
    for length in (2_000, 8_000, 32_000):
        ids = torch.randint(3, loaded.args.vocab_size, (length,), generator=random).tolist()
        print(f"prefill of {length:6,}: {seconds(loaded, ids, 1) / length * 1e6:.1f} microseconds a token")


if __name__ == "__main__":
    main()
