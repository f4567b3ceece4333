"""What choosing a token costs beside the model's step: milliseconds of one thread's time, by the size of a vocabulary.

    python -m benchmarks.sampling

"sorted" is a draw from the whole distribution, sorted; "here" is `sampling.sample`, which gives the same token; then
the 20 most likely tokens and their log-probabilities, sorted and here. Logits are random, 3 standard deviations wide.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch

from mistral.logprobs import most_likely
from mistral.sampling import distribution, sample
from mistral.sampling_params import SamplingParams

SIZES = {"v0.1": 32000, "SmolLM2": 49152, "Nemo": 131072}
WAYS = {
    "temperature 1": SamplingParams(temperature=1, top_p=1),
    "top_p 0.8": SamplingParams(temperature=0.7, top_p=0.8),
}


def milliseconds(work: Callable[[], object], times: int = 30) -> float:
    """Of the fastest of some runs; processor time, so that a busy machine changes little."""
    work()
    found = []
    for _ in range(times):
        began = time.thread_time()
        work()
        found.append(time.thread_time() - began)
    return 1e3 * min(found)


def main() -> None:
    """Print a line for each vocabulary and each way to sample."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    torch.set_num_threads(1)
    uniform = torch.tensor([0.3])
    for name, size in SIZES.items():
        logits = torch.randn(1, size, generator=torch.Generator().manual_seed(0)) * 3
        row = [f"{name:8} {size:7}"]
        for way, params in WAYS.items():
            whole = milliseconds(partial(distribution, logits, params))
            here = milliseconds(partial(sample, logits, uniform, params))
            row.append(f"{way}: sorted {whole:.2f}, here {here:.2f}")
        whole = milliseconds(partial(logits.argsort, dim=-1, descending=True, stable=True))
        row.append(f"top 20: sorted {whole:.2f}, here {milliseconds(partial(most_likely, logits, [20])):.2f}")
        print("   ".join(row), flush=True)


if __name__ == "__main__":
    main()
