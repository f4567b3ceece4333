"""Decoding with a mixture of experts beside a dense model of which a step reads as many bytes, in turn.

    python -m benchmarks.moe [QUANT]

QUANT is int8 or int4; left out, weights are bf16. Two layers of half of Mixtral 8x7B's widths, random weights; the
dense model's feed-forward is as wide as the experts that a token goes through.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import torch

from mistral.eval.bench import SHAPES, decode, read_rate, weight_bytes
from mistral.formats.random import random_folder
from mistral.loader.assemble import assemble
from mistral.loader.options import LoadOptions

ROUNDS, STEPS, CONTEXT = 7, 12, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quant", nargs="?", choices=("int8", "int4"))
    quant = parser.parse_args().quant
    shape = replace(SHAPES["moe"], n_layers=2)
    assert shape.moe is not None
    wide = replace(shape, moe=None, hidden_dim=shape.hidden_dim * shape.moe.num_experts_per_tok)
    options = LoadOptions(device="cpu", quant=quant)  # decoding steps are one call of the kernels, for both
    models = {}
    for name, args in (("moe", shape), ("dense", wide)):
        models[name], run = assemble(random_folder(args, Path()), options=options)
        print(f"{name:6} {run.describe()}")
    rates: dict[str, list[float]] = {name: [] for name in models}
    memory = []
    for _ in range(ROUNDS):
        memory.append(read_rate(torch.device("cpu")))
        for name, model in models.items():
            rates[name].append(1 / statistics.median(decode(model, CONTEXT, 1, STEPS)))
    for name, model in models.items():
        rate, size = statistics.median(rates[name]), weight_bytes(model)
        share = rate * size / statistics.median(memory)
        print(f"{name:6} {size / 1e6:6.0f} MB a token  {rate:6.1f} tokens/s  {share:4.0%} of the rate of memory")
    ratios = sorted(one / other for one, other in zip(rates["moe"], rates["dense"], strict=True))
    spread = f"median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}"
    print(f"moe over dense, {quant or 'bf16'}: {spread}")


if __name__ == "__main__":
    main()
