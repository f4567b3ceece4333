"""Decoding with guesses over plain decoding: text that repeats its prompt, and text that does not.

    python -m benchmarks.draft FOLDER [--threads 1] [--quant int4] [--rounds 3] [--draft ngram]

Both take turns; the figure is the median over the rounds of the ratio of tokens a second after the prompt. The first
text stands in its prompt twice, so that a model copies it; the second once, and a small model soon goes its own way;
the third is sampled at temperature 1.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from mistral.engine import Engine
from mistral.loader.load import Loaded, load
from mistral.sampling_params import SamplingParams

CODE = '''def add(first, second):
    """Return the sum of the first and the second number."""
    result = first + second
    return result


def multiply(first, second):
    """Return the product of the first and the second number."""
    result = first * second
    return result


def divide(first, second):
    """Return the quotient of the first and the second number."""
    result = first / second
    return result
'''


def speed(loaded: Loaded, ids: list[int], params: SamplingParams) -> tuple[float, int, list[int]]:
    """Tokens a second after the first; steps; the tokens."""
    engine = Engine(loaded.model, eos_ids=())
    request = engine.add(ids, params)
    while not request.output_ids:
        engine.step()
    began, steps = time.perf_counter(), 0
    while not engine.done:
        engine.step()
        steps += 1
    return (len(request.output_ids) - 1) / (time.perf_counter() - began), steps, request.output_ids


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quant")
    parser.add_argument("--draft", default="ngram")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=120)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    options = {"device": "cpu", "threads": given.threads, "quant": given.quant}
    plain = load(given.folder, **options)
    drafted = load(given.folder, draft=given.draft, **options)
    encode = plain.tokenizer.encode
    texts = {
        "copies its prompt": (
            encode(CODE + "\n\n" + CODE + "\n\n" + CODE[:60]),
            SamplingParams(max_tokens=given.tokens, temperature=0),
        ),
        "repeats its prompt": (
            encode(CODE + "\n\n" + CODE[:60]),
            SamplingParams(max_tokens=given.tokens, temperature=0),
        ),
        "does not": (
            encode("Once upon a time"),
            SamplingParams(max_tokens=given.tokens, temperature=1, top_p=1, seed=1),
        ),
    }
    for name, (ids, params) in texts.items():
        ratios, steps = [], 0
        for _ in range(given.rounds):
            one, _, want = speed(plain, ids, params)
            other, steps, got = speed(drafted, ids, params)
            ratios.append(other / one)
            if got != want:
                raise SystemExit(f"{name}: other tokens")
        print(
            f"{name}: {statistics.median(ratios):.2f} of plain decoding ({min(ratios):.2f} to {max(ratios):.2f}), "
            f"{steps} steps for {given.tokens - 1} tokens"
        )


if __name__ == "__main__":
    main()
