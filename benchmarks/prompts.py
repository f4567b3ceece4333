"""What it costs to round the inputs of a prompt's products: log-probabilities of a text, beside float64.

    python -m benchmarks.prompts [FOLDER] [--text FILE] [--tokens 256]

Of each way to compute a prompt: how far the log-probabilities of the text's tokens are off, the divergence from float64
over the whole vocabulary, how often the most likely token is the same, and how far a prompt in chunks of one token is
from the same prompt as a whole.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mistral.cache import RollingBufferCache
from mistral.loader.load import Loaded, load
from mistral.tokenizer import encode

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "float32, --prompt_dtype bfloat16": {"dtype": "float32", "prompt_dtype": "bfloat16"},
    "bfloat16": {"dtype": "bfloat16"},
}


@torch.inference_mode()
def logprobs(loaded: Loaded, ids: list[int], chunk: int) -> Tensor:
    """[n, V] float64 of a prompt, as the engine processes one that is to be continued."""
    model = loaded.model
    cache = RollingBufferCache(model.args, 1, dtype=model.dtype, positions=len(ids))
    out = []
    for piece in torch.tensor(ids).split(chunk):
        plan = replace(cache.plan([len(piece)]), prompts=frozenset({0}))
        out.append(model.logits(model.step(piece, plan, cache)))
        cache.commit(plan)
    return torch.cat(out).double().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--text", type=Path, default=Path("docs/how-it-works.md"))
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    exact = load(options.folder, device="cpu", dtype="float64", execution="eager")
    ids = encode(exact.tokenizer, options.text.read_text(encoding="utf-8"))[: options.tokens]
    truth = logprobs(exact, ids, len(ids))
    print(f"{exact.describe()}\n{len(ids)} tokens of {options.text}")
    print(f"{'':34} {'largest':>9} {'mean':>9} {'mean KL':>9} {'same top':>9} {'in chunks of 1':>15}")
    for name, how in WAYS.items():
        loaded = load(options.folder, device="cpu", **how)
        found = logprobs(loaded, ids, len(ids))
        own = (found - truth)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).abs()
        divergence = (truth.exp() * (truth - found)).sum(-1).mean()
        same = (found.argmax(-1) == truth.argmax(-1)).double().mean()
        apart = (logprobs(loaded, ids, 1) - found)[:-1].gather(1, torch.tensor(ids[1:])[:, None]).abs().max()
        print(f"{name:34} {own.max():9.1e} {own.mean():9.1e} {divergence:9.1e} {same:9.1%} {apart:15.1e}", flush=True)


if __name__ == "__main__":
    main()
