"""What keys and values in fewer bits cost: log-probabilities and perplexity of a text, by the dtype of the cache.

    python -m benchmarks.cache_dtypes [MODEL] [--text FILE] [--tokens N] [--random]

MODEL is the bundled one if omitted, the text the story that was held out of its training. All is computed in fp32, but
for the first row, which is in float64, cache and all; errors are differences to it. The text goes through the cache in
chunks. --random measures a random model in its place (2 layers, heads of 64, weights as nn.Linear draws them, times 3).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mistral.args import ModelArgs
from mistral.formats.folder import BUNDLED, read_folder
from mistral.formats.random import random_folder
from mistral.loader.assemble import assemble
from mistral.loader.load import load
from mistral.logprobs import logprobs
from mistral.model import Transformer
from mistral.tokenizer import encode

STORY = Path(__file__).parents[1] / "tests" / "data" / "dwarf_long_nose.txt"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
CHUNK = 256
SHAPE = ModelArgs(512, 2, 64, 1024, 8, 2, 1e-5, 4096, sliding_window=128, rope_theta=1e4)


@torch.inference_mode()
def scores(model: Transformer, ids: Tensor) -> tuple[Tensor, float]:
    """Log-probs [T, V] of a text through a cache, and the largest magnitude among keys and values that it holds."""
    cache = model.make_cache(1, len(ids))
    found = [logprobs(model(part, [len(part)], cache)) for part in ids.split(CHUNK)]
    kept = (x for store in cache.layers for x in store.decode(store.storage, torch.float32))
    return torch.cat(found), max(float(x.abs().max()) for x in kept)


def models(where: str | None, random: bool) -> tuple[Transformer, Transformer]:
    """The model in float64, and in fp32."""
    folder = random_folder(SHAPE, Path()) if random else read_folder(BUNDLED if where is None else where)
    exact, model = (assemble(folder, device="cpu", dtype=d, execution="eager")[0] for d in ("float64", "float32"))
    if random:
        for one in (exact, model):
            for name, weight in one.named_parameters():
                if name.startswith("layers") and weight.dim() > 1:
                    weight.data *= 3 * (weight.shape[1] * 12) ** -0.5 / weight.std()
    return exact, model


def row(name: str, true: Tensor, got: Tensor, ids: Tensor) -> str:
    """One line of the table."""
    off = got - true
    of_text = got[:-1].gather(-1, ids[1:, None])
    kl = float((true.exp() * (true - got)).sum(-1).mean())
    same = float((true.argmax(-1) == got.argmax(-1)).double().mean())
    rms, largest, perplexity = float(off.square().mean().sqrt()), float(off.abs().max()), math.exp(-of_text.mean())
    return f"{name:10} {largest:12.2e} {rms:12.2e} {kl:10.1e} {same:9.2%} {perplexity:12.4f}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", type=Path, default=STORY)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args(words)
    exact, model = models(options.model, options.random)
    if options.random:
        ids = torch.randint(SHAPE.vocab_size, (options.tokens,), generator=torch.Generator().manual_seed(0))
    else:
        tokenizer = load(options.model, device="cpu").tokenizer
        ids = torch.tensor(encode(tokenizer, options.text.read_text(encoding="utf-8"))[: options.tokens])
    true, largest = scores(exact, ids)
    print(f"{len(ids)} tokens; the largest magnitude of a key or value is {largest:.1f}")
    print(f"{'cache':10} {'max |dlogp|':>12} {'rms':>12} {'KL':>10} {'same top':>9} {'perplexity':>12}")
    print(row("float64", true, true, ids))
    for dtype in DTYPES:
        model.kept_in = {torch.float32: dtype}
        print(row(str(dtype).removeprefix("torch."), true, scores(model, ids)[0], ids), flush=True)


if __name__ == "__main__":
    main()
