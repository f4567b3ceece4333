"""What quantized weights cost: perplexity and KL of the bundled model on a story it has not seen, and the error of
products at 7B's shapes.

    python -m benchmarks.quality [FOLDER] [FILE]

FILE is text; left out, it is the story that was held out of the training of the bundled model.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mistral.eval.bench import SHAPES
from mistral.loader.load import load
from mistral.logprobs import logprobs
from mistral.quant import KINDS
from mistral.tokenizer import encode

STORY = Path(__file__).parents[1] / "tests" / "data" / "dwarf_long_nose.txt"


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", metavar="FOLDER", help="a model; default: the bundled one")
    parser.add_argument("file", nargs="?", metavar="FILE", type=Path, default=STORY)
    given = parser.parse_args()
    folder, text = given.folder, given.file.read_text(encoding="utf-8")
    base = load(folder, device="cpu")
    ids = torch.tensor(encode(base.tokenizer, text))
    want = logprobs(base.model(ids, [len(ids)]))[:-1]
    targets = ids[1:, None]
    print(f"{base.folder.name}, {len(ids)} tokens, {base.runtime.describe()}")
    print(f"{'':22} {'perplexity':>10} {'mean KL':>9} {'largest KL':>11} {'same top token':>15} {'bytes':>8}")
    models = {"as stored": base.model} | {q: load(folder, device="cpu", quant=q).model for q in KINDS}
    for name, model in models.items():
        got = logprobs(model(ids, [len(ids)]))[:-1]
        perplexity = (-got.gather(-1, targets).mean()).exp()
        kl = (want.exp() * (want - got)).sum(-1)
        same = (got.argmax(-1) == want.argmax(-1)).double().mean()
        size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
        print(f"{name:22} {perplexity:10.3f} {kl.mean():9.5f} {kl.max():11.4f} {same:15.1%} {size / 1e6:6.1f} M")
    print("\nrandom layers in 7B's shapes, normal weights: |error| / |product|, root mean squares")
    args = SHAPES["7b"]
    generator = torch.Generator().manual_seed(0)
    heads, keys = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    shapes = {"wq, wo": (heads, args.dim), "wk, wv": (keys, args.dim), "w1, w3": (args.hidden_dim, args.dim)}
    for names, (n, k) in (shapes | {"w2": (args.dim, args.hidden_dim)}).items():
        weight = torch.randn(n, k, generator=generator) * 0.02
        x = torch.randn(8, k, generator=generator)
        truth = x.double() @ weight.double().T
        errors = {q: (kind.of(weight)(x) - truth).square().mean().sqrt() for q, kind in KINDS.items()}
        each = ", ".join(f"{q} {error / truth.square().mean().sqrt():.4f}" for q, error in errors.items())
        print(f"{names:8} {n} x {k}: {each}")


if __name__ == "__main__":
    main()
